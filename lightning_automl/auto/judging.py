"""Scores of finished models, and whether one outperformed another: a sentence made by rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.metrics import PairedDifference, paired_bootstrap
from lightning_automl.metrics.predictions import Labels, Scores
from lightning_automl.metrics.scores import SCORES
from lightning_automl.rundir import UserError

#: Scores by the names that a task logs them under, where they differ.
_OTHER_NAMES = {"loss": "negative_log_likelihood"}
_WORDS = {"auroc": "AUROC", "f1": "F1"}


def score_name(metric: str) -> str:
    """The score that a metric of the validation is: ``auroc`` for ``val_auroc``.

    Raises:
        UserError: If it is none of those that are computed.
    """
    name = metric.removeprefix("val_")
    name = _OTHER_NAMES.get(name, name)
    if name not in SCORES:
        known = ", ".join(f"val_{each}" for each in ("loss", *SCORES))
        raise UserError(f"unknown metric {metric!r} to compare finished models by; known: {known}")
    return name


def scores_of(probabilities: Scores, labels: Labels) -> dict[str, float]:
    """All :data:`SCORES` by name; NaN where one is undefined."""
    return {name: score(probabilities, labels) for name, score in SCORES.items()}


def compare_models(
    titles: tuple[str, str],
    probabilities: tuple[Scores, Scores],
    labels: Labels,
    groups: NDArray[np.integer] | None,
    metric: str,
    direction: str,
    seeds: Sequence[int] = (1, 1),
) -> dict[str, Any]:
    """Compare the chosen model with the simple one on the images of the test split.

    Args:
        titles: Of the chosen and of the simple model.
        probabilities: Of both ``(images, classes)``.
        labels: ``(images,)``.
        groups: A number ``(images,)`` for each image, equal within a group; None without groups.
        metric: Of the validation, by which all was chosen.
        direction: ``maximize`` or ``minimize`` for it.
        seeds: How many runs each model is made of.

    Returns:
        ``metric``, ``difference`` (chosen minus simple), ``low`` and ``high`` (paired bootstrap, 95 %), ``unit`` that
        was drawn (``image`` or ``group``), ``better``, whether the interval excludes zero in favour of the chosen one;
        ``accuracy``: ``difference``, ``low``, ``high`` of that; and a ``sentence``. Numbers are None where undefined.
    """
    name = score_name(metric)
    found = _difference(name, probabilities, labels, groups)
    better = found is not None and found.excludes_zero and (found.difference > 0) == (direction == "maximize")
    return {
        "metric": metric,
        **_numbers(found),
        "unit": "image" if groups is None else "group",
        "better": better,
        "accuracy": _numbers(_difference("accuracy", probabilities, labels, groups)),
        "sentence": _sentence(titles, _WORDS.get(name, name.replace("_", " ")), found, better, seeds),
    }


def _difference(
    name: str, probabilities: tuple[Scores, Scores], labels: Labels, groups: NDArray[np.integer] | None
) -> PairedDifference | None:
    score = SCORES[name]
    first, second = probabilities
    try:
        return paired_bootstrap(
            lambda rows: score(first[rows], labels[rows]),
            lambda rows: score(second[rows], labels[rows]),
            len(labels),
            groups,
        )
    except UserError:  # a single image or group
        return None


def _numbers(found: PairedDifference | None) -> dict[str, float | None]:
    if found is None:
        return {"difference": None, "low": None, "high": None}
    numbers: Mapping[str, float] = {"difference": found.difference, "low": found.low, "high": found.high}
    return {key: value if np.isfinite(value) else None for key, value in numbers.items()}


def _sentence(
    titles: tuple[str, str], word: str, found: PairedDifference | None, better: bool, seeds: Sequence[int]
) -> str:
    chosen, simple = titles
    if found is None or not np.isfinite([found.difference, found.low, found.high]).all():
        return f"{chosen} and {simple} cannot be compared on the test split: it has no {word}, or too few images."
    several = f" They are models of {seeds[0]} and {seeds[1]} seeds." if seeds[0] != seeds[1] else ""
    if found.difference == found.low == found.high == 0:
        return f"{chosen} did not outperform {simple} on the test split: their {word} is the same.{several}"
    numbers = f"{word} {found.difference:+.4f} (95 % interval {found.low:+.4f} to {found.high:+.4f})"
    if better:
        return f"{chosen} outperformed {simple} on the test split: {numbers}.{several}"
    if found.excludes_zero:
        return f"{chosen} was worse than {simple} on the test split: {numbers}.{several}"
    return f"{chosen} did not outperform {simple} on the test split: {numbers}.{several}"
