"""The chosen model and the simple one beside it: what they reach on the test split, and each of their trainings."""

import math
from typing import Any

from lightning_automl.results.evidence import split_name
from lightning_automl.results.page import Section, Table, Text
from lightning_automl.results.sections.scoring import score, score_of
from lightning_automl.results.sections.strategy.words import (
    cell,
    difference_words,
    is_better,
    is_worse,
    metric_name,
    time_words,
)
from lightning_automl.results.sections.wording import counted, metric, with_interval
from lightning_automl.results.strategy import ModelRecord, StrategyRecord, finite

_SCORES = ("balanced_accuracy", "auroc", "accuracy", "average_precision", "f1")
_AVERAGES = {
    "predictions": "the mean of the predictions",
    "weights": "the mean of the weights",
    "single": "single trainings on average",
}


def models(record: StrategyRecord) -> Section | None:
    """Scores of the models, with intervals, and of every seed."""
    if record.evidence is None or record.chosen is None:
        return None
    split = record.evidence.split
    shown = [record.chosen, *([record.simple] if record.simple else [])]
    names = [name for name in _SCORES if any(name in getattr(each, split) for each in shown)]
    own = record.metric.removeprefix("val_")
    head = ["", *(f"{split_name(split)} {metric_name(name)}" for name in names)]
    head += [f"validation {metric_name(own)}", "epochs", "time"]
    rows: list[list[Any]] = []
    for model, what in zip(shown, ("chosen", "simple arm"), strict=False):
        rows.append([f"{what}: {model.title}", *(_score(record, model, name) for name in names)])
        rows[-1] += [cell(model.val.get(own, math.nan)), "", time_words(sum(each.seconds for each in model.seeds))]
        for each in model.seeds:
            values = getattr(each, split)
            line = [f"seed {each.seed}", *(cell(values.get(name, math.nan)) for name in names)]
            rows.append([*line, cell(each.val.get(own, math.nan)), f"{each.epochs:,}", time_words(each.seconds)])
    blocks: list[Any] = [Table(head, rows), Text(_averaging(record))]
    if (gap := test_difference(record)) is not None:
        blocks.append(Text(gap))
    return Section(f"Chosen model ({split_name(split)})", blocks)


def _score(record: StrategyRecord, model: ModelRecord, name: str) -> str:
    """With the interval where it is known: of the chosen model from its predictions."""
    evidence = record.evidence
    assert evidence is not None
    if model is record.chosen:
        return with_interval(score_of(name, evidence))
    found = model.predictions(record.directory, evidence.split)
    if found is not None:
        return with_interval(score(name, found, len(evidence.class_names)))
    return cell(getattr(model, evidence.split).get(name, math.nan))


def _averaging(record: StrategyRecord) -> str:
    assert record.chosen is not None
    count = len(record.chosen.seeds)
    if count == 1:
        return "One training with one seed, so that there is nothing to average."
    found = record.evaluation.get("averaging") or {}
    values = {name: finite(value) for name, value in (found.get("values") or {}).items()}
    tried = ", ".join(
        f"{_AVERAGES.get(name, name)} {metric(value)}" for name, value in values.items() if math.isfinite(value)
    )
    kind = str(found.get("kind") or record.model.get("average"))
    used = "the best one" if kind == "single" else _AVERAGES.get(kind, kind)
    text = f"Of {counted(count, 'training')} {used} is used"
    name = metric_name(record.metric)
    if record.evaluation.get("folds"):
        text += ". Since validation has few images, each training did without another fold of train and validation, "
        text += f"and values of validation are of the images that it has not seen ({name} of {tried})."
    elif tried:
        text += f", chosen by the {name} on validation ({tried})."
    else:
        why = str(found.get("why") or "").strip().removesuffix(".")
        text += f": {why}." if why else "."
    return f"{text} Single seeds are shown as they are, without the temperature."


def test_difference(record: StrategyRecord) -> str | None:
    """How far the chosen model is from the simple one on the test split, with what may be said of it."""
    found = record.evaluation.get("comparison")
    if not found or not math.isfinite(finite(found.get("difference"))):
        return None
    name = str(found.get("metric") or record.metric)
    maximize = not name.endswith("loss")
    gap = difference_words(found, metric_name(name))
    unit = "groups" if _grouped(record) else "images"
    beginning = (
        f"On the test split the chosen model, compared with the simple one: {gap} (paired bootstrap over {unit})"
    )
    if is_better(found, maximize):
        return f"{beginning}. The interval excludes 0: it is better on images like these."
    if is_worse(found, maximize):
        return f"{beginning}. It is worse than the simple one there."
    return f"{beginning}. The chosen model did not outperform the simple one there: the interval includes 0."


def _grouped(record: StrategyRecord) -> bool:
    judged = None if record.evidence is None else record.evidence.judged
    return judged is not None and judged.groups is not None
