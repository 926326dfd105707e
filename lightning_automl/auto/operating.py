"""How a finished model is used: its temperature, its threshold and when it is unsure, all from the validation split."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.metrics import fit_temperature, rates
from lightning_automl.metrics.scores import negative_log_likelihood
from lightning_automl.results.ensemble import SMALLEST, combine

#: Validation images below which nothing but the threshold is fitted: it would be the noise of a few of them.
FEWEST = 20
#: Share of the validation images that a model is to be unsure of.
UNSURE = 0.1
#: Twice the gain in log-likelihood from which on a model is made surer: the 95 % quantile of chi-square with one degree
#: of freedom.
SURER = 3.84

Probabilities = NDArray[np.float64]
Labels = NDArray[np.int64]


def choose_temperature(probabilities: Probabilities, labels: Labels) -> tuple[float, str]:
    """The temperature of a model, and why it is that.

    Args:
        probabilities: Of the validation images ``(images, classes)``, not calibrated.
        labels: Their classes ``(images,)``.

    Returns:
        The temperature, above 0, and a sentence. It is 1 unless another one lowers the negative log-likelihood of the
        validation images, of which there have to be 20. A model is made less sure at once, but surer only if that is
        more than chance (likelihood-ratio test): where it errs once or never, the fit promises what nobody knows.
    """
    if len(labels) < FEWEST:
        return 1.0, f"{len(labels)} validation images are too few to fit a temperature to; it takes {FEWEST}"
    found = fit_temperature(np.log(np.maximum(probabilities, SMALLEST)), labels)
    before, after = (negative_log_likelihood(combine([probabilities], each), labels) for each in (1.0, found))
    if found == 1 or not after < before:
        return 1.0, f"no temperature lowers the negative log-likelihood of the validation images, {before:.4f}"
    if found < 1 and 2 * len(labels) * (before - after) < SURER:
        return 1.0, (
            f"a temperature of {found:.2f} would lower the negative log-likelihood of the {len(labels)} validation "
            f"images from {before:.4f} to {after:.4f}, which may be chance: the model is not made surer of itself"
        )
    changed = "too sure" if found > 1 else "not sure enough"
    return found, (
        f"the model was {changed} of itself: the negative log-likelihood of the validation images falls from "
        f"{before:.4f} to {after:.4f}"
    )


def choose_threshold(scores: NDArray[np.float64], labels: Labels) -> float | None:
    """The operating point of two classes: from which probability on an image is said to be of class 1.

    Youden, *Index for rating diagnostic tests*, Cancer 3:32-35, 1950: where J, recall plus specificity minus 1, is
    largest. Looked at are 0.5 and the middles between neighbouring scores; of equally good ones the nearest to 0.5 is
    taken, so that it is 0.5 unless another one is better.

    Args:
        scores: Calibrated probability of class 1 for the validation images ``(images,)``.
        labels: Their classes ``(images,)``, 0 or 1.

    Returns:
        The threshold in (0, 1); None when only one class is there.
    """
    if len(np.unique(labels)) < 2:
        return None
    known = np.unique(scores)
    places = np.append(0.5, (known[1:] + known[:-1]) / 2)
    sick, well = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    recall, specificity = 1 - np.searchsorted(sick, places) / len(sick), np.searchsorted(well, places) / len(well)
    good = places[recall + specificity >= (recall + specificity).max() - 1e-12]
    return float(good[np.abs(good - 0.5).argmin()])


def choose_unsure_below(probabilities: Probabilities) -> float | None:
    """The probability of the predicted class below which the least sure tenth of the validation images lies.

    Args:
        probabilities: Calibrated ``(images, classes)``.

    Returns:
        It, in (0, 1]; None of fewer than 20 images.
    """
    if len(probabilities) < FEWEST:
        return None
    sureness = np.sort(probabilities.max(1))
    return float(sureness[int(len(sureness) * UNSURE)])


def sure_and_unsure(probabilities: Probabilities, labels: Labels, below: float) -> dict[str, float | None]:
    """How many images a model is unsure of, and how often it is right with these and with the others.

    Returns:
        ``share`` of images it is unsure of, ``accuracy_sure`` and ``accuracy_unsure``, all in [0, 1]; an accuracy of no
        image is None.
    """
    unsure = probabilities.max(1) < below
    right = probabilities.argmax(1) == labels
    return {
        "share": float(unsure.mean()),
        "accuracy_sure": float(right[~unsure].mean()) if not unsure.all() else None,
        "accuracy_unsure": float(right[unsure].mean()) if unsure.any() else None,
    }


def rates_at(threshold: float, probabilities: Probabilities, labels: Labels) -> dict[str, Any]:
    """The rates of class 1 of two at a threshold, by name."""
    return rates(labels, probabilities[:, 1], threshold)._asdict()
