"""Scores of a classifier, in numpy: fast enough to be computed for every draw of a bootstrap.

Those that ``classification_metrics`` logs have the same names, definitions and values here.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from lightning_automl.metrics.calibration import expected_calibration_error, reliability
from lightning_automl.metrics.predictions import Labels, Scores, check_predictions

#: Where the negative log-likelihood cuts probabilities, so that one certain error does not make it infinite.
SMALLEST = float(np.finfo(np.float64).eps)


def accuracy(probabilities: Scores, labels: Labels) -> float:
    """Share of images whose most probable class is their own, in [0, 1].

    Args:
        probabilities: ``(images, classes)``; of equally probable classes the first one is predicted.
        labels: ``(images,)``, in [0, classes).

    Raises:
        UserError: If there are no images, the shapes differ, a label is no class or a score is not finite.
    """
    check_predictions(probabilities, labels)
    return float((probabilities.argmax(1) == labels).mean())


def balanced_accuracy(probabilities: Scores, labels: Labels) -> float:
    """Mean recall of the classes that occur in ``labels``, in [0, 1]; arguments and errors as in ``accuracy``."""
    check_predictions(probabilities, labels)
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    right = np.bincount(labels[probabilities.argmax(1) == labels], minlength=len(counts))
    occurs = counts > 0
    return float((right[occurs] / counts[occurs]).mean())


def f1(probabilities: Scores, labels: Labels) -> float:
    """Mean F1 of the classes that occur in ``labels`` or are predicted, in [0, 1]; arguments as in ``accuracy``."""
    check_predictions(probabilities, labels)
    predicted = probabilities.argmax(1)
    right = np.bincount(labels[predicted == labels], minlength=probabilities.shape[1])
    either = np.bincount(labels, minlength=len(right)) + np.bincount(predicted, minlength=len(right))
    occurs = either > 0
    return float((2 * right[occurs] / either[occurs]).mean())


def auroc_by_class(probabilities: Scores, labels: Labels) -> NDArray[np.float64]:
    """Area under the ROC curve of each class against the rest, ties counted half.

    The share of pairs, of an image of the class and one of another class, in which the former has the higher score
    (Mann and Whitney's U).

    Args:
        probabilities: ``(images, classes)``; scores of any scale will do.
        labels: ``(images,)``, in [0, classes).

    Returns:
        ``(classes,)`` in [0, 1]; NaN for a class that no image or every image has.

    Raises:
        UserError: If there are no images, the shapes differ, a label is no class or a score is not finite.
    """
    check_predictions(probabilities, labels)
    areas = np.full(probabilities.shape[1], np.nan)
    # Looking up is two to five times as fast as scipy.stats.rankdata, which a bootstrap waits for.
    for index, own, everyone in _sorted_scores(probabilities, labels):
        # Twice the images that score lower, those with the same score counted once; among themselves, n * n in all.
        twice_lower = np.searchsorted(everyone, own).sum() + np.searchsorted(everyone, own, side="right").sum()
        areas[index] = (twice_lower - len(own) ** 2) / (2 * len(own) * (len(everyone) - len(own)))
    return areas


def auroc(probabilities: Scores, labels: Labels) -> float:
    """Mean of ``auroc_by_class`` over the classes for which it is defined; NaN when there is none. Chance is 0.5."""
    return _mean(auroc_by_class(probabilities, labels))


def average_precision_by_class(probabilities: Scores, labels: Labels) -> NDArray[np.float64]:
    """Average precision of each class against the rest: the area under precision over recall, without interpolation.

    The mean, over the images of the class, of the precision when everything that scores at least as high is taken for
    the class; as ``sklearn.metrics.average_precision_score``. Random scores give the prevalence of the class, so that
    a value is to be read beside it.

    Args:
        probabilities: ``(images, classes)``; scores of any scale will do.
        labels: ``(images,)``, in [0, classes).

    Returns:
        ``(classes,)`` in [0, 1]; NaN for a class that no image or every image has.

    Raises:
        UserError: If there are no images, the shapes differ, a label is no class or a score is not finite.
    """
    check_predictions(probabilities, labels)
    precision = np.full(probabilities.shape[1], np.nan)
    for index, own, everyone in _sorted_scores(probabilities, labels):
        found = len(own) - np.searchsorted(own, own)
        taken = len(everyone) - np.searchsorted(everyone, own)
        precision[index] = (found / taken).mean()
    return precision


def average_precision(probabilities: Scores, labels: Labels) -> float:
    """Mean of ``average_precision_by_class`` over the classes for which it is defined; NaN when there is none.

    Also with two classes it is the mean of both, as ``auroc`` is: class 1 alone would depend on the order of the
    names, and where that makes the common class the positive one, would hide how the rare one is found. The value of
    random scores is the mean prevalence of those classes, 1 / (number of classes that occur).
    """
    return _mean(average_precision_by_class(probabilities, labels))


def calibration_error(probabilities: Scores, labels: Labels) -> float:
    """Expected calibration error with 15 bins of equal width, in [0, 1]: see ``expected_calibration_error``.

    A confidence of exactly 1 is in the last bin, as in the paper.
    """
    return expected_calibration_error(reliability(probabilities, labels))


def brier_score(probabilities: Scores, labels: Labels) -> float:
    """Mean over images of the squared distance between probabilities and one-hot label, in [0, 2].

    Brier, *Verification of Forecasts Expressed in Terms of Probability*, Monthly Weather Review 78:1-3, 1950:
    the sum over all classes. With two classes it is twice the form that looks at class 1 alone.
    Arguments and errors as in ``accuracy``.
    """
    check_predictions(probabilities, labels)
    distances = probabilities.astype(np.float64)
    distances[np.arange(len(labels)), labels] -= 1
    return float(np.square(distances).sum(1).mean())


def negative_log_likelihood(probabilities: Scores, labels: Labels) -> float:
    """Mean over images of minus the natural logarithm of the own class's probability, in [0, 36.05].

    Probabilities below 2.2e-16 count as 2.2e-16 (``SMALLEST``), as in scikit-learn. Arguments and errors as in
    ``accuracy``.
    """
    check_predictions(probabilities, labels)
    own = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, SMALLEST)).mean())


#: Scores of ``(probabilities, labels)`` by name; a task logs the first five under the same names.
SCORES: dict[str, Callable[[Scores, Labels], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "auroc": auroc,
    "f1": f1,
    "calibration_error": calibration_error,
    "average_precision": average_precision,
    "brier_score": brier_score,
    "negative_log_likelihood": negative_log_likelihood,
}


def _sorted_scores(probabilities: Scores, labels: Labels) -> Iterator[tuple[int, Scores, Scores]]:
    # Of each class that has images and is not all there is: its number, and its scores of its own and of all images.
    everyone = np.sort(probabilities, axis=0)
    for index in range(probabilities.shape[1]):
        own = np.sort(probabilities[labels == index, index])
        if 0 < len(own) < len(labels):
            yield index, own, everyone[:, index]


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
