"""What was seen of the data before anything is trained."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_automl.rundir import UserError

#: Images below which a score of them says nothing about an epoch or a model.
FEW = 30
#: Folds from which on a run that does without one of them has about as many images as the train split.
_FOLDS = 4


@dataclass(frozen=True)
class Facts:
    """What all later stages know about the data; kept in ``look.json``. Plain values only.

    Args:
        data: ``class_path`` and ``init_args`` of the data module, without batch size, fold and augmentation; paths in
            it are absolute.
        images: Number of images that can be read.
        counts: Images of each class by split, ``{"train": [classes], "val": […], "test": […]}``.
        class_names: One name a class.
        channels: Number of channels.
        image_size: Height and width that the networks get, in pixels.
        sizes: Height and width, in pixels, of the ``smallest``, the ``median`` and the ``largest`` image as it was
            found; the median is that of each side.
        units: Images, or groups, of each class that are not in the test split.
        unit: What ``units`` counts: ``image`` or ``group``.
        groups: Number of groups, None if none are given.
        official_splits: Names of the splits that the data bring.
        imbalance: Images of the largest class of the train split to those of the smallest, at least 1.
        folds: Number of folds into which train and val together can be cut.
        search_folds: Numbers of the folds that every choice is made on.
        comparison_folds: Numbers of the folds that no choice sees; disjoint from the former, together all.
        broken: File and reason of the files that cannot be read.
        exact_duplicates: Pairs of names of equal images in different splits, the first of them.
        exact_duplicate_count: Number of such pairs.
        near_duplicates: Pairs of names of nearly equal images in different splits, the first of them.
        near_duplicate_count: Number of such pairs.
        modality: Name of the space of safe operations.
        space: That space, as :meth:`~lightning_automl.augment.OperationSpace.to_dict` gives it.
        flips: Whether the space allows mirroring left to right.
        deep: Whether the images have more than 8 bits, which a window of the train split brings to 8.
        notes: What a person should read, one sentence each.
        digest: 32 hexadecimal digits that change when an image gets another name, label or place.
    """

    data: dict[str, Any]
    images: int
    counts: dict[str, list[int]]
    class_names: list[str]
    channels: int
    image_size: list[int]
    sizes: dict[str, list[int]]
    units: list[int]
    unit: str
    groups: int | None
    official_splits: list[str]
    imbalance: float
    folds: int
    search_folds: list[int]
    comparison_folds: list[int]
    broken: list[list[str]]
    exact_duplicates: list[list[str]]
    exact_duplicate_count: int
    near_duplicates: list[list[str]]
    near_duplicate_count: int
    modality: str
    space: dict[str, Any]
    flips: bool
    deep: bool
    notes: list[str]
    digest: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def number(self, split: str) -> int:
        """Images of a split."""
        return sum(self.counts[split])

    @property
    def few(self) -> bool:
        """Whether the validation split is too small to say anything."""
        return self.number("val") < FEW

    @property
    def patience(self) -> int:
        """On how many folds a candidate is judged before others may be said to be better: so many as hold 30 images."""
        return min(self.folds, math.ceil(FEW * self.folds / (self.number("train") + self.number("val"))))

    @property
    def final_folds(self) -> list[int]:
        """Numbers of the folds that final runs do without in turn; empty where they take the data's own splits.

        Of few images none is to be lost to a validation split that says nothing: each is trained on by most runs, and
        judged by the others. Not of images of more than 8 bits, since a model has one window.
        """
        return list(range(self.folds)) if self.few and self.folds >= _FOLDS and not self.deep else []

    def to_dict(self) -> dict[str, Any]:
        """What ``look.json`` holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Facts":
        """From what ``look.json`` holds.

        Raises:
            UserError: If something is missing.
        """
        names = [each.name for each in fields(cls)]
        missing = [name for name in names if name not in content]
        if missing:
            raise UserError(f"look.json has no {missing[0]}; remove it, and the data are looked at again")
        return cls(**{name: content[name] for name in names})
