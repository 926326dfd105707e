"""How the searched policy did against simple ways of augmenting, on folds that the search had not seen."""

import math
from typing import Any

from lightning_automl.results.page import Folded, Section, Table, Text, pictures
from lightning_automl.results.policy_search import Acceptance, Comparison, PolicySearchRecord
from lightning_automl.results.sections.policy_search.verdict import signed, worse
from lightning_automl.results.sections.wording import metric


def acceptance(record: PolicySearchRecord) -> Section | None:
    """The arms with their values, and the paired comparisons."""
    found = record.acceptance
    if found is None:
        return None
    from lightning_automl.plots import acceptance_values, paired_differences

    drawn = {
        "acceptance": acceptance_values(
            [arm.label for arm in found.arms],
            [[(fold, value) for fold, _, value in arm.values] for arm in found.arms],
            [(arm.mean, arm.low, arm.high) for arm in found.arms],
            metric=found.metric,
            maximize=found.maximize,
        ),
        "differences": paired_differences(
            [each.label for each in found.comparisons],
            [(each.difference, each.low, each.high) for each in found.comparisons],
            metric=found.metric,
            maximize=found.maximize,
        ),
    }
    blocks: list[Any] = [pictures(**drawn), _arms(found), _values(found)]
    if found.comparisons:
        rows = [[f"minus {each.label}", *_compared(each, found)] for each in found.comparisons]
        blocks.append(Table(["searched policy", "difference, 95 % interval", "p", ""], rows))
    text = (
        "Every fold and seed is a training with each arm, equal in all else: the same images, network and number of "
        "epochs. The searched policy is adopted only if the interval of its difference from both others excludes 0; "
        "otherwise policy.json is no policy, or TrivialAugment in the same space if its mean is better."
    )
    return Section("Searched policy against simple ones", [*blocks, Text(text)])


def _arms(found: Acceptance) -> Table:
    rows = []
    for arm in found.arms:
        interval = f"{metric(arm.low)} to {metric(arm.high)}" if math.isfinite(arm.low) else ""
        name = f"{arm.label} (adopted)" if arm.name == found.adopted else arm.label
        rows.append([name, _cell(arm.mean), interval])
    return Table(["", f"mean {found.metric}", "95 % interval"], rows)


def _values(found: Acceptance) -> Folded:
    """Each run; a row for each fold and seed, so that one sees what is compared with what."""
    places = list(dict.fromkeys((fold, seed) for arm in found.arms for fold, seed, _ in arm.values))
    own = [{(fold, seed): value for fold, seed, value in arm.values} for arm in found.arms]
    rows = [
        [f"fold {fold}, seed {seed}", *(_cell(values.get((fold, seed), math.nan)) for values in own)]
        for fold, seed in places
    ]
    return Folded(f"The {found.metric} of each run", Table(["", *(arm.label for arm in found.arms)], rows))


def _compared(each: Comparison, found: Acceptance) -> list[str]:
    shown = signed(each.difference) if math.isfinite(each.difference) else "none"
    if math.isfinite(each.low) and math.isfinite(each.high):
        shown += f" ({signed(each.low)} to {signed(each.high)})"
    word = "better" if each.better else "worse" if worse(each, found) else "not told apart"
    p_value = f"{each.p_value:.2g}" if math.isfinite(each.p_value) else ""
    return [shown, p_value, word]


def _cell(value: float) -> str:
    return metric(value) if math.isfinite(value) else "none"
