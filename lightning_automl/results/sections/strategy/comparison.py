"""Whether what was searched beat the simple arm, in paired trainings on folds that no search had seen."""

import math
from typing import Any

from lightning_automl.results.page import Folded, Section, Table, Text, pictures
from lightning_automl.results.sections.policy_search.verdict import signed
from lightning_automl.results.sections.strategy.words import (
    cell,
    difference_words,
    is_better,
    is_worse,
    metric_name,
    metric_or_zero,
)
from lightning_automl.results.sections.wording import counted, metric
from lightning_automl.results.strategy import KINDS, StrategyRecord, finite


def comparison(record: StrategyRecord) -> Section | None:
    """The paired test with its numbers, and its sentence."""
    found = record.comparison
    title = "Searched against simple"
    if not found:
        why = (record.plan.get("why_not") or {}).get("comparison")
        return Section(title, [Text(f"Not run: {str(why).removesuffix('.')}.")]) if why else None
    sentence = str(found.get("sentence") or "").strip()
    if not math.isfinite(finite(found.get("difference"))):
        return Section(title, [Text(sentence or "Nothing was compared.")])
    name = metric_name(str(found.get("metric") or record.metric))
    rows = [
        ["simple", record.title(found.get("simple")), *_mean(record, "simple")],
        ["searched", record.title(found.get("searched")), *_mean(record, "searched")],
    ]
    difference, low, high = (finite(found.get(key)) for key in ("difference", "low", "high"))
    word = "better" if is_better(found, record.maximize) else "worse" if is_worse(found, record.maximize) else ""
    p_value = finite(found.get("p_value"))
    tested = [
        "searched minus simple",
        signed(difference) if difference else metric_or_zero(0.0),
        f"{signed(low)} to {signed(high)}" if math.isfinite(low) else "none",
        f"{p_value:.2g}" if math.isfinite(p_value) else "",
        word or "did not outperform",
    ]
    blocks: list[Any] = [
        *([Text(sentence)] if sentence else []),
        *_drawn(record, name),
        Table(["", "", f"mean {name}", "trainings"], rows),
        Table(["", "difference", "95 % interval", "p", ""], [tested]),
        Text(_rule(record, name)),
    ]
    if (values := _values(record)) is not None:
        blocks.append(values)
    return Section(title, blocks)


def _own(record: StrategyRecord, which: str) -> dict[tuple[int, int], float]:
    """Value by fold and seed."""
    entries = (record.comparison.get("values") or {}).get(which) or ()
    return {(int(each["fold"]), int(each["seed"])): finite(each.get("value")) for each in entries}


def _mean(record: StrategyRecord, which: str) -> list[Any]:
    values = [value for value in _own(record, which).values() if math.isfinite(value)]
    return [metric(math.fsum(values) / len(values)) if values else "", len(values)]


def _drawn(record: StrategyRecord, name: str) -> list[Any]:
    from lightning_automl.plots import acceptance_values

    labels = ["simple", "searched"]
    own = [_own(record, which) for which in labels]
    if not all(own):
        return []
    values = [[(fold, value) for (fold, _), value in each.items()] for each in own]
    means = []
    for each in own:
        finite_values = [value for value in each.values() if math.isfinite(value)]
        means.append((math.fsum(finite_values) / len(finite_values) if finite_values else math.nan, math.nan, math.nan))
    return [pictures(searched=acceptance_values(labels, values, means, metric=name, maximize=record.maximize))]


def _rule(record: StrategyRecord, name: str) -> str:
    found = record.comparison
    seeds = len({seed for _, seed in _own(record, "searched")})
    folds = len({fold for fold, _ in _own(record, "searched")})
    text = (
        f"Both were trained on {counted(folds, 'fold')} that no search had seen, with {counted(seeds, 'seed')} each, "
        f"equal in all else: {difference_words(found, name)}. "
    )
    if not is_better(found, record.maximize):
        text += "The searched one did not outperform the simple one: "
        text += "it is worse. " if is_worse(found, record.maximize) else "the interval includes 0. "
    kind = KINDS.get(str(found.get("kind")), str(found.get("kind")))
    adopted = "searched" if found.get("adopted") == "searched" else "simple"
    lost = ", but none of its final trainings gave a model, and the simple one is used" if record.instead_of else ""
    text += (
        f"Searched were: {kind}. Adopted is the {adopted} one{lost}; what was searched is adopted only if the interval "
        "of the paired difference (Nadeau and Bengio 2003, which allows for the images that folds share) excludes 0."
    )
    if folds == 1:
        text += " With one fold it knows of other seeds, and little of other images."
    return text


def _values(record: StrategyRecord) -> Folded | None:
    simple, searched = _own(record, "simple"), _own(record, "searched")
    places = list(dict.fromkeys([*simple, *searched]))
    if not places:
        return None
    rows = []
    for place in places:
        one, other = (own.get(place, math.nan) for own in (simple, searched))
        gap = other - one
        shown = (signed(gap) if gap else metric_or_zero(0.0)) if math.isfinite(gap) else ""
        rows.append([f"fold {place[0]}, seed {place[1]}", cell(one), cell(other), shown])
    return Folded("Each training", Table(["", "simple", "searched", "difference"], rows))
