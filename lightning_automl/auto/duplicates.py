"""Images that are nearly equal and in different splits, found by a perceptual hash.

The hash is that of Krawetz, *Kind of like that*, 2013 (dHash),
https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html: the image is brought to 8 rows of 9
grey cells, and each of the 64 bits says whether a cell is darker than its right neighbour. Here a cell has to be darker
by more than ``MARGIN`` levels, so that the noise of even ground gives no bits.

A hash alone is too coarse for images that are all of one kind: of the 624 test images of PneumoniaMNIST 611 have a
train image within 8 bits, and none of them is that image. So what the hash finds is compared again on 16 x 16 cells:
both have to correlate by ``CORRELATION`` and to differ in their mean by at most ``LEVELS``. With these numbers 43 of
the 156 test images of BreastMNIST, where patients have several images, look like one of train or val, 10 of the 2,007
of USPS (strokes of the digit 1), and none of PneumoniaMNIST, of scikit-learn's digits and of 6,000 images of
CIFAR-10. Of the images of these sets, when they are saved as JPEG of quality 75, made brighter by 5 % or lose a fifth
of their contrast, at least 97 % are found again (of the digits, with 8 x 8 pixels, as JPEG 85 %). Images that are
shifted or cropped are not found.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lightning_automl.data import LabelledImages

#: Levels, of 255, by which a cell has to be darker than its right neighbour.
MARGIN = 2
#: Bits, of 64, in which two hashes may differ.
BITS = 8
#: Least correlation of the cells of two images.
CORRELATION = 0.995
#: Levels, of 255, by which the means of two images may differ.
LEVELS = 16

_CELLS = 16  # a side, of what is compared after the hash
_LEAST_DEVIATION = 2.0  # levels; what is flatter has nothing that could be compared
_PIXELS_AT_ONCE = 2**22
_PAIRS_AT_ONCE = 2**23
_MOST_PAIRS = 2**28  # some seconds


@dataclass(frozen=True)
class Looks:
    """What is compared of images.

    Args:
        bits: Hashes ``(images, 64)``, 1 and -1 as float32.
        cells: ``(images, 256)`` float32, of mean 0 and length 1; zeros of a flat image.
        means: Mean grey ``(images,)`` in [0, 255].
    """

    bits: NDArray[np.float32]
    cells: NDArray[np.float32]
    means: NDArray[np.float64]

    @classmethod
    def of(cls, dataset: "LabelledImages") -> "Looks":
        """Of all images of a data set, some at a time."""
        import torch

        number = len(dataset)
        _, height, width, channels = dataset.images.shape
        at_once = max(1, _PIXELS_AT_ONCE // (height * width * channels))
        looks = []
        for first in range(0, number, at_once):
            images, _ = dataset[torch.arange(first, min(number, first + at_once))]
            looks.append(cls.of_images(images.permute(0, 2, 3, 1).numpy()))
        return cls(
            np.concatenate([each.bits for each in looks]),
            np.concatenate([each.cells for each in looks]),
            np.concatenate([each.means for each in looks]),
        )

    @classmethod
    def of_images(cls, images: NDArray[np.uint8]) -> "Looks":
        """Of uint8 ``(images, height, width, channels)``."""
        cells = _cells(images, _CELLS, _CELLS).reshape(len(images), -1) / images[0].size
        means = cells.mean(1)
        cells -= means[:, None]
        flat = cells.std(1) < _LEAST_DEVIATION
        length = np.where(flat, 1.0, np.sqrt((cells**2).sum(1)))
        cells[flat] = 0
        bits = np.where(dhash(images), 1, -1).astype(np.float32)
        return cls(bits, (cells / length[:, None]).astype(np.float32), means)


def dhash(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Hashes ``(images, 64)`` of uint8 ``(images, height, width, channels)``; see the head of this file."""
    cells = _cells(images, 8, 9)
    darker = cells[:, :, 1:] - cells[:, :, :-1] > MARGIN * images[0].size
    return np.asarray(darker.reshape(len(images), 64))


def near_duplicates(
    datasets: Mapping[str, "LabelledImages"],
    names: Mapping[str, Sequence[str]],
    known: Collection[str] = (),
) -> list[tuple[str, str]] | None:
    """Pairs of names of nearly equal images in different splits.

    Args:
        datasets: Images by split.
        names: What to call them, likewise.
        known: Names of images that are not looked for, since they are known to be equal to others.

    Returns:
        For each image of a split that looks like one of an earlier split the most similar of these, and itself; None if
        there are too many images to compare.
    """
    splits = list(datasets)
    counts = np.array([len(datasets[split]) for split in splits], dtype=np.int64)
    if int((counts.cumsum()[:-1] * counts[1:]).sum()) > _MOST_PAIRS:
        return None
    looks = {split: Looks.of(datasets[split]) for split in splits}
    pairs: list[tuple[str, str]] = []
    for number, split in enumerate(splits):
        best = np.full(len(datasets[split]), -1.0)
        home = [("", 0)] * len(best)
        for earlier in splits[:number]:
            similar, place = _most_similar(looks[split], looks[earlier])
            for own in np.flatnonzero(similar > best).tolist():
                best[own], home[own] = similar[own], (earlier, int(place[own]))
        for own in np.flatnonzero(best > 0).tolist():
            if names[split][own] not in known:
                earlier, there = home[own]
                pairs.append((names[earlier][there], names[split][own]))
    return pairs


def _most_similar(looks: Looks, others: Looks) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The correlation ``(images,)`` with the most similar near duplicate, or -1 without one, and its place."""
    best = np.full(len(looks.means), -1.0)
    place = np.zeros(len(looks.means), dtype=np.int64)
    at_once = max(1, _PAIRS_AT_ONCE // len(others.means))
    for first in range(0, len(best), at_once):
        own = slice(first, first + at_once)
        near = looks.bits[own] @ others.bits.T >= 64 - 2 * BITS  # each bit that differs takes 2 off
        near &= np.abs(looks.means[own, None] - others.means) <= LEVELS
        theirs = np.flatnonzero(near.any(0))
        if not len(theirs):
            continue
        similar = looks.cells[own] @ others.cells[theirs].T
        similar[~near[:, theirs] | (similar < CORRELATION)] = -1
        closest = similar.argmax(1)
        best[own] = similar[np.arange(len(similar)), closest]
        place[own] = theirs[closest]
    return best, place


def _cells(images: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.float64]:
    """Mean grey of ``rows`` x ``columns`` cells, times values of an image: whole numbers, and so without rounding."""
    grey = images.sum(3, dtype=np.float64)
    return np.asarray(_cover(images.shape[1], rows) @ grey @ _cover(images.shape[2], columns).T, dtype=np.float64)


def _cover(pixels: int, cells: int) -> NDArray[np.float64]:
    """How much of each pixel is in each cell ``(cells, pixels)``, in parts of which a pixel has ``cells``."""
    cell, pixel = np.arange(cells)[:, None] * pixels, np.arange(pixels)[None] * cells
    overlap = np.minimum(cell + pixels, pixel + cells) - np.maximum(cell, pixel)
    return np.asarray(np.maximum(overlap, 0), dtype=np.float64)
