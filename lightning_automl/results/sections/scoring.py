"""Scores of a run's predictions with their intervals, and what of them is independent."""

import math

import numpy as np
from numpy.typing import NDArray

from lightning_automl.results.evidence import Evidence
from lightning_automl.results.run import Predictions

#: Below so many images a class's recall says little: 10 of 10 leave a lower end of 69 %.
FEW = 10
#: Of a bootstrap.
DRAWS = 2000
_VALUES_AT_FULL_DRAWS = 20_000  # images times classes; more get fewer draws, so that a report takes no minutes
_FEWEST_DRAWS = 100


def score_of(name: str, evidence: Evidence, split: str | None = None) -> tuple[float, float, float]:
    """A score of a split with the ends of its 95 % interval."""
    judged = evidence.predictions(split or evidence.split)
    assert judged is not None
    return score(name, judged, len(evidence.class_names))


def score(name: str, judged: Predictions, classes: int) -> tuple[float, float, float]:
    """A score of predictions with the ends of its 95 % interval, which are NaN when there is none."""
    from lightning_automl.metrics import SCORES, bootstrap_interval, mean_recall_interval

    metric, probabilities, labels = SCORES[name], judged.probabilities, judged.labels
    value = metric(probabilities, labels)
    if name == "accuracy" and judged.groups is None:
        return (value, *exact(int((judged.predicted == labels).sum()), len(labels)))
    if name == "balanced_accuracy" and judged.groups is None:
        return (value, *mean_recall_interval(*recall_counts(judged, classes)))
    units = len(labels) if judged.groups is None else len(np.unique(judged.groups))
    if name == "calibration_error" or units < 2 or not math.isfinite(value):
        return value, math.nan, math.nan
    found = bootstrap_interval(
        lambda rows: metric(probabilities[rows], labels[rows]), len(labels), judged.groups, draws=draws(judged)
    )
    if found.low == found.high:  # nothing went wrong, so that no resampling shows what might
        return value, math.nan, math.nan
    return value, found.low, found.high


def draws(judged: Predictions) -> int:
    """Draws of a bootstrap over these predictions."""
    affordable = DRAWS * _VALUES_AT_FULL_DRAWS // judged.probabilities.size
    return int(np.clip(affordable, _FEWEST_DRAWS, DRAWS))


def recall_counts(judged: Predictions, classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Recognised images and all images ``(classes,)``."""
    hits = np.bincount(judged.labels[judged.predicted == judged.labels], minlength=classes)
    return hits, np.bincount(judged.labels, minlength=classes)


def units_of(judged: Predictions, classes: int) -> tuple[NDArray[np.int64], str]:
    """What is independent: the number of images ``(classes,)``, or of groups where there are groups, and its name."""
    if judged.groups is None:
        return np.bincount(judged.labels, minlength=classes), "image"
    pairs = np.unique(np.stack([judged.labels, judged.groups]), axis=1)
    return np.bincount(pairs[0], minlength=classes), "group"


def exact(hits: int, count: int) -> tuple[float, float]:
    """The ends of the exact 95 % interval of a share."""
    from lightning_automl.metrics import clopper_pearson

    low, high = clopper_pearson(int(hits), int(count))
    return low, high


def times_opened(evidence: Evidence) -> int:
    """How often the run was evaluated on its test split."""
    opened = int((evidence.run.summary or {}).get("test_opened", 0))
    return max(1, opened) if evidence.split == "test" else opened  # a test may have ended before it was counted
