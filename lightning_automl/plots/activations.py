"""Where a network looks: images beside the same images with their class activation maps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots.names import shorten
from lightning_automl.plots.policies import ImageRow, captioned_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAIRS = 3  # of an image and its map, beside each other
#: Share of the colour where a map is 1; the image is seen through it.
_OPACITY = 0.65


def activation_overlay(image: NDArray[np.uint8], values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Lay the colours of a map over an image in grey; where the map is 0 the image is as it is, in grey.

    Args:
        image: ``(channels, height, width)``; grey is the mean of the first three channels.
        values: Map ``(height, width)`` in [0, 1].

    Returns:
        RGB ``(3, height, width)``.
    """
    from matplotlib import colormaps

    grey = image[:3].astype(np.float64).mean(0)[..., None]
    colours = colormaps["inferno"](values)[..., :3] * 255
    share = _OPACITY * values[..., None]
    mixed = grey * (1 - share) + colours * share
    return np.asarray(mixed.round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1))


def class_activations(
    images: NDArray[np.uint8],
    maps: NDArray[np.floating],
    labels: NDArray[np.integer],
    predicted: NDArray[np.integer],
    class_names: Sequence[str],
) -> "Figure":
    """Draw images, each beside itself with its map, those that were recognised first.

    Args:
        images: ``(images, channels, height, width)``.
        maps: ``(images, height, width)`` in [0, 1], of the predicted class.
        labels: True class ``(images,)``.
        predicted: Predicted class ``(images,)``.
        class_names: One name a class.

    Returns:
        The figure.
    """
    rows = []
    for title, chosen in (("recognised", labels == predicted), ("mistaken", labels != predicted)):
        cells = []
        for index in np.flatnonzero(chosen):
            true, said = (shorten(class_names[int(each[index])]) for each in (labels, predicted))
            cells += [
                (images[index], f"is {true}"),
                (activation_overlay(images[index], maps[index]), f"seen as {said}"),
            ]
        if cells:
            rows.append(ImageRow(title, cells))
    return captioned_images(rows, columns=2 * _PAIRS)
