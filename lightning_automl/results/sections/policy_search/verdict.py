"""What a reader of a policy search's page has to know first: the verdict, and what limits it."""

import math

from lightning_automl.results.page import Notes, Section
from lightning_automl.results.policy_search import ARMS, Acceptance, Comparison, PolicySearchRecord, failed
from lightning_automl.results.sections.policy_words import MINUS
from lightning_automl.results.sections.wording import counted, duration, joined, metric

#: From this share on failures are worth a look.
MANY_FAILURES = 0.1
#: Values of an arm that are few for a test.
FEW = 10


def verdict(record: PolicySearchRecord) -> list[str]:
    """What a reader has to know, in one to three sentences."""
    return [_state(record), *comparison(record)]


def _state(record: PolicySearchRecord) -> str:
    if not record.record or not record.finished:
        return _unfinished(record)
    scored = int(record.record.get("evaluations") or 0)
    seconds = sum(float(each or 0) for each in (record.record.get("seconds") or {}).values())
    epochs = sum(int(each or 0) for each in (record.record.get("epochs") or {}).values())
    steps = int(record.record.get("sub_policies") or 0)
    how = f"{scored:,} policies were scored on {counted(record.folds, 'fold')}"
    if record.by_density and record.rounds > 1:
        how += f" in {record.rounds} rounds each"
    found = sum(map(failed, record.values.values()))
    how += f", of which {found:,} gave no value" if found else ""
    return (
        f"{how}; the best {len(record.kept):,} together are a policy of {counted(steps, 'sub-policy')}. ".replace(
            "sub-policys", "sub-policies"
        )
        + f"All took {counted(epochs, 'epoch')} and {duration(seconds)} of all workers together."
    )


def _unfinished(record: PolicySearchRecord) -> str:
    reason = (record.summary or {}).get("reason") or "not finished"
    beginning = "This search is not finished"
    if record.summary is not None and record.summary.get("status") == "failed" and reason != "not finished":
        beginning += f" ({reason})"
    parts = []
    if record.by_density:
        scored = sum(map(len, record.values.values()))
        wanted = record.folds * record.rounds * record.trials
        parts.append(f"the networks of {record.trained_folds} of {record.folds} folds are trained")
        parts.append(f"{scored:,} of {wanted:,} policies are scored")
    if record.compared_runs:
        parts.append(f"{counted(record.compared_runs, 'run')} of the comparison {_be(record.compared_runs)} done")
    return f"{beginning}{': ' + joined(parts) if parts else ''}."


def comparison(record: PolicySearchRecord) -> list[str]:
    """Whether the searched policy beat the simple arms, and what ``policy.json`` is."""
    found = record.acceptance
    if found is None:
        if record.finished and record.config.get("acceptance"):
            return [
                "The search has gone on since, and what it has found now is not compared yet: policy.json is what the "
                "former comparison came to."
            ]
        if record.finished:
            return [
                "The searched policy was compared with nothing: policy.json names it; whether it helps is not known."
            ]
        return []
    beaten = [each for each in found.comparisons if each.better]
    others = [each for each in found.comparisons if not each.better]
    where = f"On {_runs(found)} that the search had not seen, the searched policy"
    if not others:
        said = f"{where} beat {joined([_gap(each, found) for each in beaten])}"
    else:
        said = f"{where} did not beat {' or '.join(_gap(each, found) for each in others)}"
        if beaten:
            said += f", though it beat {joined([_gap(each, found) for each in beaten])}"
    return [f"{said}; {_adopted(record, found)}."]


def _adopted(record: PolicySearchRecord, found: Acceptance) -> str:
    if found.adopted == "none":
        return "policy.json therefore says to train without a policy"
    name = "the searched policy" if found.adopted == "searched" else ARMS.get(found.adopted, found.adopted)
    space = f" in the space {record.space_name}" if found.adopted == "trivial_augment" and record.space_name else ""
    return f"policy.json names {name}{space}"


def _runs(found: Acceptance) -> str:
    values = max((arm.values for arm in found.arms), key=len, default=())
    folds, seeds = len({fold for fold, _, _ in values}), len({seed for _, seed, _ in values})
    return f"{counted(folds, 'fold')} with {counted(seeds, 'seed')} each"


def _gap(each: Comparison, found: Acceptance) -> str:
    """An arm, with how far the searched policy is from it, in words."""
    name = "training without a policy" if each.against == "none" else each.label
    if not math.isfinite(each.difference):
        return f"{name} (no values to compare)"
    size = metric(abs(each.difference))
    direction = "higher" if each.difference > 0 else "lower"
    interval = "no interval, since all differences are equal"
    if math.isfinite(each.low) and math.isfinite(each.high):
        interval = f"95 % interval {signed(each.low)} to {signed(each.high)}"
    text = f"{found.metric} {size} {direction}, {interval}" if each.difference else f"the same {found.metric}"
    return f"{name} ({text}{', so that it is worse' if worse(each, found) else ''})"


def worse(each: Comparison, found: Acceptance) -> bool:
    """Whether the searched policy is worse by more than chance."""
    return each.high < 0 if found.maximize else each.low > 0


def signed(value: float) -> str:
    """A difference with its sign: a true minus, and a plus."""
    return f"{'+' if value > 0 else MINUS if value < 0 else ''}{metric(abs(value))}"


def cautions(record: PolicySearchRecord) -> Section:
    """What limits the numbers of this page."""
    notes = []
    if record.by_density:
        notes.append(
            "Policies are scored by whether a network that was trained without them still recognises augmented images: "
            "that rewards what is harmless, not what helps. Whether a policy helps, only the comparison tells."
        )
        if record.arguments.get("reduce") == "min":
            notes.append(
                "With reduce min the best of several augmented copies counts, as in the released code of Fast "
                "AutoAugment: a sub-policy that destroys images is hidden by a mild one beside it."
            )
    notes += _of_acceptance(record.acceptance) if record.acceptance is not None else []
    former = len(list(record.directory.glob("superseded/searched-*")))
    if former:
        notes.append(
            f"{former} {'policy' if former == 1 else 'policies'} of fewer trials had been compared on the same folds "
            "before: who searches on until one is adopted will find it by chance."
        )
    values = [value for each in record.values.values() for value in each]
    lost = failed(values)
    if lost and lost >= MANY_FAILURES * len(values):
        notes.append(f"{lost:,} of {len(values):,} policies gave no value; they were never kept.")
    name = record.space_name
    if name and name != "natural":
        notes.append(
            f"What the space {name} allows, and how much of it, are choices to be reviewed by somebody who reads such "
            "images: look at its picture below."
        )
    if record.finished and not (record.summary or {}).get("test_opened"):
        notes.append("The test split was not opened by this search: best.yaml opens it, once, when it is trained.")
    notes.append("The numbers hold for images like these. This program is not a medical device.")
    return Section("To keep in mind", [Notes(notes)])


def _of_acceptance(found: Acceptance) -> list[str]:
    notes = []
    counts = [sum(math.isfinite(value) for _, _, value in arm.values) for arm in found.arms]
    if counts and min(counts) < FEW:
        notes.append(
            f"With {min(counts)} values an arm only large differences can be told from chance: that the searched "
            "policy did not win does not show that it is no better."
        )
    lost = sum(len(arm.values) for arm in found.arms) - sum(counts)
    if lost:
        notes.append(f"{counted(lost, 'run')} of the comparison gave no number, as when training has diverged.")
    if len({fold for arm in found.arms for fold, _, _ in arm.values}) == 1:
        notes.append(
            "All runs were compared on the same images: the intervals tell how much seeds matter, and little of how "
            "other images would decide. Several folds tell more."
        )
    notes.append(
        "Runs of a fold share images, and so do folds: the paired test widens its interval for that (Nadeau and Bengio "
        "2003), the intervals of single arms are not widened."
    )
    return notes


def _be(count: int) -> str:
    return "is" if count == 1 else "are"
