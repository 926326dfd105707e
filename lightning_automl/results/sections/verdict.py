"""What a reader of a run's page has to know first: the verdict, and what limits it."""

import numpy as np

from lightning_automl.results.evidence import Evidence, split_name
from lightning_automl.results.page import Notes, Section
from lightning_automl.results.sections.architecture import search_verdict
from lightning_automl.results.sections.scoring import FEW, exact, recall_counts, score_of, times_opened, units_of
from lightning_automl.results.sections.training import epochs_done
from lightning_automl.results.sections.wording import interval_text, percent, some


def verdict(evidence: Evidence) -> list[str]:
    """What a reader has to know, in two sentences; of an architecture search first what it has found."""
    found = search_verdict(evidence)
    if not found:
        return [_state(evidence), weakness(evidence)]
    if evidence.judged is None:
        return [*found, _state(evidence), weakness(evidence)]
    state = _state(evidence)
    return [*found, f"The network of the search, which holds all operations: {state[0].lower()}{state[1:]}"]


def _state(evidence: Evidence) -> str:
    run, judged, split = evidence.run, evidence.judged, evidence.split
    reason = (run.summary or {}).get("reason", "not finished")
    beginning = ""
    if run.summary is not None and run.summary["status"] == "pruned":
        beginning = f"This run was pruned ({epochs_done(evidence)}); "
    elif not run.finished and reason.startswith("not finished"):  # as an evaluation or larger limits leave it, too
        beginning = f"This run is not finished ({epochs_done(evidence)}); "
    elif not run.finished:
        beginning = f"This run failed ({reason}); "
    if judged is None:
        why = evidence.doubts[0].removesuffix(".") if evidence.doubts else "no predictions are there yet"
        sentence = f"{beginning}{why}, so that nothing can be said of its quality."
        return sentence[0].upper() + sentence[1:]
    score = score_of("balanced_accuracy", evidence)
    opened = times_opened(evidence)
    there = sum(run.data.get("counts", {}).get(split, judged.labels.shape))
    part = f"{len(judged.labels):,} of the " * (len(judged.labels) < there)
    where = f"on {part or 'the '}{there:,} {split_name(split)} images"
    if split == "test":
        where += f", opened {'once' if opened == 1 else f'{opened} times'}"
    classes, occurring = len(evidence.class_names), len(np.unique(judged.labels))
    which = f"{classes} classes" if occurring == classes else f"{occurring} of {classes} classes that occur"
    sentence = (
        f"{where}, the mean recall of the {which} is {percent(score[0])} ({interval_text(score)}), where "
        f"guessing would give {percent(1 / classes)}"
    )
    if split == "val":
        closed = "no test of these weights is there" if times_opened(evidence) else "the test split is still closed"
        sentence += f"; {closed}, and validation, which chose the epoch, flatters"
    sentence = f"{beginning}{sentence}."
    return sentence[0].upper() + sentence[1:]


def weakness(evidence: Evidence) -> str:
    """The weakest class, or why nothing can be said of one."""
    judged = evidence.judged
    if judged is None and evidence.doubts:
        return "Look at its learning curves, and try a smaller learning rate."
    if judged is None:
        return "Give the command that started it again: it goes on from the newest checkpoint."
    hits, counts = recall_counts(judged, len(evidence.class_names))
    units, unit = units_of(judged, len(evidence.class_names))
    present = np.flatnonzero(counts)
    rarest = int(present[units[present].argmin()])
    if units[rarest] < FEW:
        return (
            f"That is not conclusive for every class: of {evidence.class_names[rarest]!r} there "
            f"{f'is only 1 {unit}' if units[rarest] == 1 else f'are only {units[rarest]} {unit}s'}, and {FEW} of {FEW} "
            "right would still leave a recall of 69 % possible."
        )
    worst = int(present[(hits[present] / counts[present]).argmin()])
    low, high = exact(hits[worst], counts[worst])
    how_sure = f"95 % interval {percent(low)} to {percent(high)}"
    if judged.groups is not None:  # the interval holds for independent images
        how_sure = f"in {units[worst]} groups"
    return (
        f"The weakest class is {evidence.class_names[worst]!r}: {hits[worst]} of its {counts[worst]} images are "
        f"recognised ({percent(hits[worst] / counts[worst])}, {how_sure})."
    )


def cautions(evidence: Evidence) -> Section:
    """What limits the numbers of this page."""
    run, judged = evidence.run, evidence.judged
    notes = ["One run with one seed: another seed gives other numbers, which no interval here contains."]
    notes += evidence.doubts
    if judged is not None:
        units, unit = units_of(judged, len(evidence.class_names))
        few = [name for name, count in zip(evidence.class_names, units, strict=True) if count < FEW]
        if few:
            notes.append(
                f"{len(few)} of {len(units)} classes have fewer than {FEW} {split_name(evidence.split)} {unit}s "
                f"({some(few)}): their recall is hardly known."
            )
    if times_opened(evidence) > 1:
        notes.append(
            f"The test split was opened {times_opened(evidence)} times: whatever was chosen in between has seen it."
        )
    leaks = run.data.get("leak_count", 0)
    if leaks:
        pairs = ", ".join(f"{first} = {second}" for first, second in run.data["leaks"][:3])
        notes.append(f"{leaks} images of validation or test are also in another split ({pairs}{' …' * (leaks > 3)}).")
    if run.data.get("counts") and run.data.get("groups") is None:
        notes.append(
            "No groups were given: if several images are of one patient or object, they may be in several splits, and "
            "the intervals are too narrow."
        )
    notes.append("The numbers hold for images like these. This program is not a medical device.")
    return Section("To keep in mind", [Notes(notes)])
