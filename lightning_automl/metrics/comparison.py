"""Comparison of two models: how much better one is, and whether that is more than chance."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_automl.metrics.intervals import Rows, bootstrap_interval, check_confidence
from lightning_automl.rundir import UserError


class PairedDifference(NamedTuple):
    """First model minus second, its interval, and how many draws had no value."""

    difference: float
    low: float
    high: float
    undefined: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval speaks for one of the models; never when an end is NaN."""
        return self.low > 0 or self.high < 0


class ResampledTTest(NamedTuple):
    """First model minus second, its interval, Student's t and the two-sided p-value."""

    difference: float
    low: float
    high: float
    t: float
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval speaks for one of the models; never when an end is NaN."""
        return self.low > 0 or self.high < 0


class SampleDifference(NamedTuple):
    """A value minus the mean of a sample, its interval, Student's t and the two-sided p-value."""

    difference: float
    low: float
    high: float
    t: float
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the value lies beyond what another draw of the sample would give; never when an end is NaN."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    first: Callable[[Rows], float],
    second: Callable[[Rows], float],
    images: int,
    groups: NDArray[np.generic] | None = None,
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Difference of a score between two models on the same images, with the interval of a percentile bootstrap.

    Both are scored on the same draws, so that what makes images hard for both cancels out, and the interval is
    narrower than those of the two models would let one expect (Efron and Tibshirani 1993, section 13.3; Koehn 2004,
    *Statistical Significance Tests for Machine Translation Evaluation*, does so for scores of whole sets).
    It speaks of other images, not of other training seeds: for those average several runs in ``first`` and ``second``,
    or use ``corrected_resampled_t_test``.

    Args:
        first: Maps row numbers to the first model's score: ``lambda rows: auroc(scores[rows], labels[rows])``, or of
            one value an image ``lambda rows: right[rows].mean()``.
        second: The same of the second model.
        images: Number of images.
        groups: One value an image; whole groups are drawn, see ``bootstrap_interval``.
        draws: How often to resample, 1 or more.
        confidence: In (0, 1).
        seed: Decides about the draws.

    Returns:
        The difference on all images, NaN where a score is, and its interval.

    Raises:
        UserError: As ``bootstrap_interval``.
    """

    def difference(rows: Rows) -> float:
        return first(rows) - second(rows)

    interval = bootstrap_interval(difference, images, groups, draws, confidence, seed)
    return PairedDifference(float(difference(np.arange(images))), *interval)


def corrected_resampled_t_test(
    differences: Sequence[float] | NDArray[np.floating],
    train_images: int,
    test_images: int,
    confidence: float = 0.95,
) -> ResampledTTest:
    """Whether two ways of training differ, from their scores on several splits of the same images.

    Nadeau and Bengio, *Inference for the Generalization Error*, Machine Learning 52:239-281, 2003,
    https://doi.org/10.1023/A:1024068626366 (the corrected resampled t-test). The training sets of the splits
    overlap, hence so do the errors, and the variance of the mean is taken for ``(1/k + test/train) s**2`` instead of
    ``s**2 / k``, with k differences of variance s**2; t has k - 1 degrees of freedom.

    Equal differences have no variance to judge their mean by. When all are zero, the models do not differ on what was
    tried: t is 0, p is 1 and the interval [0, 0]. When all have another value, as small test sets may give, t, p and
    the interval are NaN: nothing is claimed.

    Args:
        differences: Score of the first minus that of the second, one a split (or fold, or repetition), two or more.
        train_images: Images that each model of a split was trained on.
        test_images: Images that each was scored on.
        confidence: In (0, 1).

    Returns:
        The mean difference, its interval, t and p.

    Raises:
        UserError: If there are fewer than two differences, one is not finite, a number of images is below 1 or
            ``confidence`` outside (0, 1).
    """
    from scipy.stats import t as student

    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"differences have shape {values.shape}; give one number a split, of two splits or more")
    if not np.isfinite(values).all():
        raise UserError("some differences are not finite; leave out the splits where a score is undefined")
    if train_images < 1 or test_images < 1:
        raise UserError(f"{train_images} train and {test_images} test images; give 1 or more of both")
    check_confidence(confidence)
    mean = float(values.mean())
    # Differences of scores are equal up to rounding.
    if np.ptp(values) <= 1e-12 + 1e-9 * np.abs(values).max():
        nan = float("nan")
        return ResampledTTest(0.0, 0.0, 0.0, 0.0, 1.0) if abs(mean) <= 1e-12 else ResampledTTest(mean, *[nan] * 4)
    error = float(np.sqrt((1 / len(values) + test_images / train_images) * values.var(ddof=1)))
    freedom = len(values) - 1
    reach = float(student.ppf((1 + confidence) / 2, freedom)) * error
    return ResampledTTest(
        mean, mean - reach, mean + reach, mean / error, float(2 * student.sf(abs(mean) / error, freedom))
    )


def difference_from_sample(
    value: float, sample: Sequence[float] | NDArray[np.floating], confidence: float = 0.95
) -> SampleDifference:
    """Whether a value is unlike a sample, as of one found architecture beside those that were drawn at random.

    If the value were one more draw from the normal distribution of the sample, with K values of variance s**2, its
    difference from their mean would have the variance ``(1 + 1/K) s**2``, and divided by the root of that Student's t
    with K - 1 degrees of freedom (Geisser, *Predictive Inference*, 1993: the prediction interval of a
    single future observation). The interval is the difference plus and minus that root times the quantile of t.
    It is wider than that of the mean of the sample, ``s**2 / K``, which half of all further draws would lie above.

    Args:
        value: The one value.
        sample: The others, two or more; with two or three hardly anything lies outside.
        confidence: In (0, 1).

    Returns:
        The difference, its interval, t and p; all but the difference NaN where the sample has no variance.

    Raises:
        UserError: If the sample has fewer than two values, a value is not finite or ``confidence`` is outside (0, 1).
    """
    from scipy.stats import t as student

    others = np.asarray(sample, np.float64)
    if others.ndim != 1 or len(others) < 2:
        raise UserError(f"the sample has shape {others.shape}; give two values or more")
    if not np.isfinite([value, *others]).all():
        raise UserError("some values are not finite; leave out those where a score is undefined")
    check_confidence(confidence)
    difference = float(value - others.mean())
    # Scores are equal up to rounding.
    if np.ptp(others) <= 1e-12 + 1e-9 * np.abs(others).max():
        return SampleDifference(difference, *[float("nan")] * 4)
    error, freedom = float(np.sqrt((1 + 1 / len(others)) * others.var(ddof=1))), len(others) - 1
    reach = float(student.ppf((1 + confidence) / 2, freedom)) * error
    p_value = float(2 * student.sf(abs(difference) / error, freedom))
    return SampleDifference(difference, difference - reach, difference + reach, difference / error, p_value)
