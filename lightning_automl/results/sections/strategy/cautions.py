"""What limits the numbers of a strategy's page."""

import math

from lightning_automl.results.evidence import split_name
from lightning_automl.results.page import Notes, Section
from lightning_automl.results.sections.scoring import FEW, times_opened, units_of
from lightning_automl.results.sections.strategy.words import stage_name
from lightning_automl.results.sections.wording import counted, some
from lightning_automl.results.strategy import StrategyRecord, finite

_PAIRS = 3


def cautions(record: StrategyRecord) -> Section:
    """Doubts about the data, what the budget left out, what was not run, and how far the numbers can be trusted."""
    notes = [*_of_state(record), *_of_data(record), *_of_budget(record), *_of_choice(record)]
    notes.append("The numbers hold for images like these. This program is not a medical device.")
    return Section("To keep in mind", [Notes(list(dict.fromkeys(notes)))])


def _of_state(record: StrategyRecord) -> list[str]:
    given = finite(record.config.get("budget"))
    judged = finite(record.evaluation.get("budget") or record.plan.get("budget"))
    if record.chosen is not None and given > judged:
        return ["A longer budget was given since: until the command has ended, this is the model of the shorter one."]
    return []


def _of_data(record: StrategyRecord) -> list[str]:
    look = record.look
    if not look:
        return []
    notes = [_sentence(str(each)) for each in look.get("notes") or ()]
    for key, what in (("exact_duplicate", "equal"), ("near_duplicate", "nearly equal")):
        count = int(look.get(f"{key}_count") or 0)
        known = (look.get(f"{key}s") or ())[:_PAIRS]
        if count and not any(str(name) in each for pair in known for name in pair for each in notes):
            pairs = ", ".join(f"{one} = {other}" for one, other in known)
            more = " …" if count > _PAIRS else ""
            verb = "pair of images is" if count == 1 else "pairs of images are"
            notes.append(f"{count:,} {verb} {what} in different splits ({pairs}{more}): test scores flatter.")
    broken = look.get("broken") or ()
    if broken and not any(word in each for each in notes for word in ("broken", "unreadable", "cannot be read")):
        notes.append(
            f"{counted(len(broken), 'file')} could not be read and {_were(len(broken))} left out: "
            f"{some([str(name) for name, _ in broken])}."
        )
    if look.get("groups") is None and not any("independent" in each for each in notes):
        notes.append(
            "No groups were given, so the intervals assume independent images: if several are of one patient or "
            "object, they are too narrow, and such images may be in several splits."
        )
    return [*notes, *_few(record)]


def _few(record: StrategyRecord) -> list[str]:
    evidence = record.evidence
    if evidence is not None and evidence.judged is not None:
        names = evidence.class_names
        units, unit = units_of(evidence.judged, len(names))
        split, counts = split_name(evidence.split), units.tolist()
    else:
        names, counts = (
            list(record.look.get("class_names") or ()),
            list(record.look.get("counts", {}).get("test") or ()),
        )
        split, unit = "test", "image"
    few = [name for name, count in zip(names, counts, strict=False) if count < FEW]
    if not few or any("not conclusive" in str(each) for each in record.look.get("notes") or ()):
        return []
    verb = "class has" if len(few) == 1 else "classes have"
    return [
        f"{len(few)} of {len(names)} {verb} fewer than {FEW} {split} {unit}s ({some(few)}): not conclusive, since "
        f"{FEW} of {FEW} right would still leave a recall of 69 % possible."
    ]


def _of_budget(record: StrategyRecord) -> list[str]:
    cuts = dict(record.progress.get("cuts") or {})
    if record.selection.get("cut"):
        cuts["selection"] = record.selection["cut"]
    notes = [f"The time ran short ({stage_name(stage)}): {_sentence(str(why), False)}" for stage, why in cuts.items()]
    missing = [
        (str(each.get("title") or each["name"]), str(each.get("why"))) for each in record.plan.get("not_run") or ()
    ]
    by_reason: dict[str, list[str]] = {}
    for title, why in missing:
        by_reason.setdefault(why, []).append(title)
    return notes + [
        f"Not run: {'; '.join(titles)}. The reason: {_sentence(why, False)}" for why, titles in by_reason.items()
    ]


def _of_choice(record: StrategyRecord) -> list[str]:
    notes = []
    means = [each.mean for each in record.candidates if math.isfinite(each.mean)]
    if means:
        notes.append(
            "Arms and values were chosen by their values on validation folds, which is optimistic: the best of several "
            "noisy values is too good. Nothing was chosen by the test split."
        )
    if record.chosen is not None and len(record.chosen.seeds) == 1:
        notes.append("The model is one training with one seed: another seed gives other numbers, in no interval here.")
    by_reason: dict[str, list[str]] = {}
    for each in record.evaluation.get("left_out") or ():
        by_reason.setdefault(str(each.get("reason")), []).append(f"seed {each.get('seed')} of {each.get('title')}")
    notes += [f"Final trainings left out: {some(own)}: {_sentence(why, False)}" for why, own in by_reason.items()]
    if record.evidence is not None:
        notes += record.evidence.doubts
        if times_opened(record.evidence) > 1:
            notes.append(
                f"The test split was opened {times_opened(record.evidence)} times: whatever was chosen in between has "
                "seen it."
            )
    if record.look.get("modality") not in (None, "natural"):
        notes.append(
            f"What may be done to images in the space {record.look['modality']} is a choice to be reviewed by somebody "
            "who reads such images."
        )
    return notes


def _sentence(text: str, capital: bool = True) -> str:
    text = text.strip().removesuffix(".")
    return f"{text[:1].upper() if capital else text[:1]}{text[1:]}."


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
