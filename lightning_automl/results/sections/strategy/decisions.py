"""What the chosen model decides: the operating point of two classes, and which answers it is unsure of."""

import math
from typing import Any

import numpy as np

from lightning_automl.results.evidence import split_name
from lightning_automl.results.page import Section, Table, Text
from lightning_automl.results.run import Predictions
from lightning_automl.results.sections.predictions import prevalence_table
from lightning_automl.results.sections.scoring import exact
from lightning_automl.results.sections.wording import percent
from lightning_automl.results.strategy import StrategyRecord, finite


def operating_point(record: StrategyRecord) -> Section | None:
    """Of two classes: rates at the threshold that validation chose, with exact intervals."""
    evidence, threshold = record.evidence, finite(record.model.get("threshold"))
    if evidence is None or len(evidence.class_names) != 2 or not math.isfinite(threshold):
        return None
    names = evidence.class_names
    known = {split: found for split in ("test", "val") if (found := evidence.predictions(split)) is not None}
    columns = {split: _counts(found, threshold) for split, found in known.items()}
    meaning = (f"of {names[1]!r}", f"of {names[0]!r}", f"when it says {names[1]!r}", f"when it says {names[0]!r}")
    rows = [
        [f"{name} (right {what})", *(_share(*counts[name]) for counts in columns.values())]
        for name, what in zip(_RATES, meaning, strict=True)
    ]
    head = ["", *(f"{split_name(split)} (exact 95 % interval)" for split in columns)]
    text = (
        f"An image is taken for {names[1]!r} where its probability is {threshold:.3f} or more: of all thresholds the "
        "one with the largest sum of sensitivity and specificity on validation (Youden's J), so that the validation "
        "column flatters. The metrics above take the more probable class instead."
    )
    if any(found.groups is not None for found in known.values()):
        text += " The intervals are too narrow where a group has several images."
    blocks: list[Any] = [Text(text), Table(head, rows)]
    sensitivity, specificity = (columns[evidence.split][name] for name in _RATES[:2])
    if sensitivity[1] and specificity[1]:
        share = sensitivity[1] / (sensitivity[1] + specificity[1])
        rates = sensitivity[0] / sensitivity[1], specificity[0] / specificity[1]
        blocks.append(
            Text(f"How far an answer can be believed depends on how common {names[1]!r} is where it is used:")
        )
        blocks.append(prevalence_table(*rates, share, names, split_name(evidence.split)))
    return Section("Operating point", blocks)


_RATES = ("sensitivity", "specificity", "precision", "negative predictive value")


def _counts(found: Predictions, threshold: float) -> dict[str, tuple[int, int]]:
    """Hits and all images of each rate."""
    truth, said = found.labels == 1, found.probabilities[:, 1] >= threshold
    pairs = ((said, truth), (~said, ~truth), (truth, said), (~truth, ~said))
    return {name: (int((hit & of).sum()), int(of.sum())) for name, (hit, of) in zip(_RATES, pairs, strict=True)}


def _share(hits: int, count: int) -> str:
    if not count:
        return "no image"
    low, high = exact(hits, count)
    return f"{percent(hits / count)} ({percent(low)} to {percent(high)}; {hits} of {count})"


def unsure(record: StrategyRecord) -> Section | None:
    """Answers that `classify` marks, and how often the others are right."""
    evidence, below = record.evidence, finite(record.model.get("unsure_below"))
    if evidence is None or not math.isfinite(below):
        return None
    rows = []
    for split in ("test", "val"):
        found = evidence.predictions(split)
        if found is None:
            continue
        doubtful = found.probabilities.max(1) < below
        right = found.predicted == found.labels
        marked = f"{int(doubtful.sum())} of {len(doubtful)} ({percent(float(doubtful.mean()))})"
        rows.append([split_name(split), marked, *(_right(right, chosen) for chosen in (~doubtful, doubtful))])
    text = (
        f"classify marks an answer as unsure where its probability is below {_below_one(below)}: of the validation "
        "images about the least sure tenth. Somebody should look at these."
    )
    head = ["", "unsure", "right where sure (exact 95 % interval)", "right where unsure"]
    return Section("Unsure answers", [Text(text), Table(head, rows)])


def _below_one(value: float) -> str:
    """A probability with three decimals, or as many more as it takes not to be called 1."""
    digits = next((digits for digits in range(3, 12) if value >= 1 or float(f"{value:.{digits}f}") < 1), 12)
    return f"{value:.{digits}f}"


def _right(right: "np.ndarray[Any, np.dtype[np.bool_]]", chosen: "np.ndarray[Any, np.dtype[np.bool_]]") -> str:
    return _share(int((right & chosen).sum()), int(chosen.sum()))
