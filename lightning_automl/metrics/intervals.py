"""Intervals: within what a score would lie if other images of the same kind had been tested."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_automl.rundir import UserError

Rows = NDArray[np.int64]


class Interval(NamedTuple):
    """Two ends, both included."""

    low: float
    high: float


class BootstrapInterval(NamedTuple):
    """Two ends, both included, and how many draws had no value; the ends are NaN when no draw had one."""

    low: float
    high: float
    undefined: int


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a share, such as the recall of a class.

    Clopper and Pearson, *The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial*, Biometrika
    26:404-413, 1934. It covers the true share at least as often as it says, also when all or none succeeded: 10 of 10
    leaves a lower end of 0.69. The trials have to be independent: count patients where one has several images.

    Args:
        successes: In [0, trials].
        trials: 0 or more; of none, nothing is known, and the interval is [0, 1].
        confidence: In (0, 1).

    Returns:
        The interval, within [0, 1].

    Raises:
        UserError: If ``successes`` is outside [0, trials] or ``confidence`` outside (0, 1).
    """
    from scipy.special import betaincinv

    if not 0 <= successes <= trials:
        raise UserError(f"{successes} of {trials} is no share; give successes from 0 up to the number of trials")
    check_confidence(confidence)
    tail = (1 - confidence) / 2
    low = betaincinv(successes, trials - successes + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, trials - successes, 1 - tail) if successes < trials else 1.0
    return Interval(float(low), float(high))


def mean_recall_interval(
    successes: NDArray[np.integer], trials: NDArray[np.integer], confidence: float = 0.95
) -> Interval:
    """Interval of the mean recall of the classes (balanced accuracy), which keeps its width when nothing went wrong.

    Zou, Huang and Zhang, *A note on confidence interval estimation for a linear function of binomial proportions*,
    Computational Statistics & Data Analysis 53:1080-1085, 2009: with the limits ``l`` and ``u`` of each recall ``p``
    after Wilson (1927), the mean of ``p`` less the root of the sum of ``((p - l) / classes)**2``, and likewise above.
    The images have to be independent.

    Args:
        successes: Recognised images ``(classes,)``.
        trials: All images ``(classes,)``; classes without one are left out.
        confidence: In (0, 1).

    Returns:
        The interval, within [0, 1]; it contains the mean recall.

    Raises:
        UserError: If ``successes`` is outside [0, trials], no class has an image, or ``confidence`` is out of range.
    """
    from scipy.special import ndtri

    check_confidence(confidence)
    hits, counts = np.asarray(successes)[trials > 0], np.asarray(trials)[trials > 0]
    if not len(counts) or (hits < 0).any() or (hits > counts).any():
        raise UserError(f"{hits.tolist()} of {counts.tolist()} are no shares; give successes from 0 up to the trials")
    z = ndtri((1 + confidence) / 2)
    recall = hits / counts
    middle = (recall + z**2 / (2 * counts)) / (1 + z**2 / counts)
    half = z * np.sqrt(recall * (1 - recall) / counts + z**2 / (4 * counts**2)) / (1 + z**2 / counts)
    below, above = (np.sqrt(((recall - end) ** 2).sum()) / len(counts) for end in (middle - half, middle + half))
    mean = recall.mean()
    return Interval(max(0.0, float(mean - below)), min(1.0, float(mean + above)))


def bootstrap_interval(
    metric: Callable[[Rows], float],
    images: int,
    groups: NDArray[np.generic] | None = None,
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Percentile bootstrap of any score: over images, or over whole groups of them.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993 (section 13.3). Images of one patient resemble each
    other, so that drawing them one by one would promise too narrow an interval; with ``groups`` it is the patients that
    are drawn, with replacement, each with all of its images.

    A score at its limit (10 images of 10 are right) gives an interval without width, which is too narrow;
    for shares ``clopper_pearson`` does better, and for their mean ``mean_recall_interval``.

    Args:
        metric: Maps row numbers, some of them several times, to a score: ``lambda rows: auroc(scores[rows],
            labels[rows])``. A value that is not finite (the AUROC of one class) is left out and counted.
        images: Number of images.
        groups: One value an image; ``None`` when every image is independent of the others.
        draws: How often to resample, 1 or more.
        confidence: In (0, 1).
        seed: Decides about the draws; two metrics with the same seed see the same ones.

    Returns:
        The ends and the number of draws left out.

    Raises:
        UserError: If there are fewer than two images or groups, ``groups`` has another length, or ``draws`` or
            ``confidence`` is out of range.
    """
    values = np.array([metric(rows) for rows in resamples(images, groups, draws, seed)], np.float64)
    return percentiles(values, confidence)


def resamples(images: int, groups: NDArray[np.generic] | None, draws: int, seed: int) -> Iterator[Rows]:
    """Give the row numbers of each draw of a bootstrap: see ``bootstrap_interval``."""
    if groups is not None and np.shape(groups) != (images,):
        raise UserError(f"groups have shape {np.shape(groups)} for {images} images; give one value an image")
    if draws < 1:
        raise UserError(f"draws is {draws}; give 1 or more, 2000 for an interval")
    codes = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(codes)
    if len(sizes) < 2:
        unit = "image" if groups is None else "group"
        raise UserError(f"{len(sizes)} {unit}(s) cannot be resampled; an interval needs two {unit}s, better dozens")
    # The rows of a group lie side by side in `rows`, from `starts` on.
    rows, starts = np.argsort(codes, kind="stable"), np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        chosen = generator.integers(len(sizes), size=len(sizes))
        lengths = sizes[chosen]
        shifts = starts[chosen] - (np.cumsum(lengths) - lengths)
        yield rows[np.repeat(shifts, lengths) + np.arange(lengths.sum())]


def percentiles(values: NDArray[np.float64], confidence: float) -> BootstrapInterval:
    """The middle ``confidence`` of values ``(draws,)``, those left out that are not finite."""
    check_confidence(confidence)
    defined = values[np.isfinite(values)]
    if not len(defined):
        return BootstrapInterval(float("nan"), float("nan"), len(values))
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return BootstrapInterval(float(low), float(high), len(values) - len(defined))


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is no share.

    Raises:
        UserError: If it is outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")
