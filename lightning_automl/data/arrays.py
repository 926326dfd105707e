"""Images in one .npz file, in the layout of MedMNIST."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from lightning_automl.data.base import ImageDataModule, Index
from lightning_automl.data.splits import SPLITS
from lightning_automl.rundir import UserError

_MOST_CHANNELS = 16


class ArraysDataModule(ImageDataModule):
    """Images in one ``.npz`` file: ``{train,val,test}_images`` and ``{train,val,test}_labels``, as MedMNIST has them.

    Yang et al., *MedMNIST v2*, Scientific Data 2023, https://doi.org/10.1038/s41597-022-01721-8. Images are
    ``(images, height, width)`` or ``(images, height, width, channels)`` with at most 16 channels, uint8 or of another
    number type that is then windowed to 8 bits; labels are ``(images,)`` or ``(images, 1)`` of 0 to classes - 1.
    ``{split}_groups`` and ``class_names`` may be there. A missing val or test split is cut off. The file is read
    without pickle.

    Args:
        path: The ``.npz`` file.
        kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If the file is not in that layout.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        self.path = path
        self._kept: tuple[str, NDArray[Any]] | None = None
        super().__init__(**kwargs)

    def index(self) -> Index:
        """Labels and the headers of the images."""
        arrays = _headers(self.path)
        present = [split for split in SPLITS if f"{split}_images" in arrays]
        known = ", ".join(sorted(arrays)) or "nothing"
        if "train" not in present:
            raise UserError(f"{self.path} has no 'train_images'; it holds {known}")
        shapes: dict[str, tuple[int, ...]] = {}
        labels: list[NDArray[np.int64]] = []
        groups: list[NDArray[Any]] = []
        with np.load(self.path, allow_pickle=False) as file:
            for split in present:
                images = arrays[f"{split}_images"]
                _check_images(f"{split}_images of {self.path}", images)
                shapes[split] = images.shape
                if f"{split}_labels" not in arrays:
                    raise UserError(f"{self.path} has '{split}_images' but no '{split}_labels'; it holds {known}")
                _check_plain(self.path, f"{split}_labels", arrays)
                labels.append(_labels(f"{split}_labels of {self.path}", file[f"{split}_labels"]))
                _check_length(self.path, f"{split}_labels", len(labels[-1]), split, images.shape[0])
                if f"{split}_groups" in arrays:
                    _check_plain(self.path, f"{split}_groups", arrays)
                    groups.append(file[f"{split}_groups"].reshape(-1))
                    _check_length(self.path, f"{split}_groups", len(groups[-1]), split, images.shape[0])
            class_names = None
            if "class_names" in arrays:
                _check_plain(self.path, "class_names", arrays)
                class_names = [str(name) for name in file["class_names"].reshape(-1)]
        kinds = {split: (shapes[split][1:], arrays[f"{split}_images"].dtype) for split in present}
        for split, kind in kinds.items():
            if kind != kinds["train"]:
                raise UserError(
                    f"{split}_images of {self.path} are {kind[0]} {kind[1]} and train_images "
                    f"{kinds['train'][0]} {kinds['train'][1]}; all splits need the same size, channels and type"
                )
        if groups and len(groups) != len(present):
            raise UserError(f"{self.path} has groups for some splits only; give '{{split}}_groups' for all or for none")
        together = np.concatenate(labels)
        if class_names is None:
            class_names = [str(label) for label in range(int(together.max(initial=0)) + 1)]
        shape = shapes["train"]
        counts = [shapes[split][0] for split in present]
        #: Where each split begins in the index.
        self._first = dict(zip(present, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        return Index(
            labels=together,
            class_names=class_names,
            channels=shape[3] if len(shape) == 4 else 1,
            image_size=(shape[1], shape[2]),
            names=[f"{split}[{row}]" for split, count in zip(present, counts, strict=True) for row in range(count)],
            splits=np.repeat(np.array(present), counts),
            groups=np.concatenate(groups) if groups else None,
        )

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Images ``(rows, channels, height, width)``; the split that was used last stays in memory."""
        parts = []
        owners = np.searchsorted(list(self._first.values()), rows, side="right") - 1
        splits = list(self._first)
        for owner in np.unique(owners):
            own = owners == owner
            images = self._split(splits[owner])[rows[own] - self._first[splits[owner]]]
            images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
            parts.append((own, images))
        if len(parts) == 1:
            return cast("NDArray[Any]", parts[0][1])
        result = np.empty((len(rows), *parts[0][1].shape[1:]), parts[0][1].dtype)
        for own, images in parts:
            result[own] = images
        return result

    def _split(self, split: str) -> NDArray[Any]:
        if self._kept is None or self._kept[0] != split:
            self._kept = None
            self._kept = split, self.images(split)
        return self._kept[1]

    def images(self, split: str) -> NDArray[Any]:
        """All images ``(images, height, width)`` or ``(images, height, width, channels)`` of a split of the file."""
        with np.load(self.path, allow_pickle=False) as file:
            return np.asarray(file[f"{split}_images"])

    def close(self) -> None:
        """Forget the split that was used last."""
        self._kept = None


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _headers(path: str) -> dict[str, _Header]:
    """Shape and type of each array, without reading the arrays."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; give the path of an .npz file")
    try:
        found = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = npy.read_magic(file)
                    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = reader(file)
                found[member.removesuffix(".npy")] = _Header(tuple(shape), dtype)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"{path} is not an .npz file that numpy reads ({error}); write it with numpy.savez") from error
    return found


def _check_plain(path: str, key: str, arrays: dict[str, _Header]) -> None:
    if arrays[key].dtype.hasobject:
        raise UserError(f"'{key}' of {path} holds Python objects, which only pickle can read; save numbers or text")


def _check_images(what: str, images: _Header) -> None:
    shape, dtype = images.shape, images.dtype
    if dtype.kind not in "uif":
        raise UserError(f"{what} are of type {dtype}; known: uint8, other integers and floats")
    if len(shape) == 4 and shape[3] > _MOST_CHANNELS:
        if shape[1] <= 4:
            raise UserError(f"{what} have the shape {shape}; move the channels to the last axis")
        raise UserError(f"{what} have the shape {shape}: these are volumes, and only flat images can be used")
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        raise UserError(
            f"{what} have the shape {shape}; known: (images, height, width) and (images, height, width, channels)"
        )


def _labels(what: str, labels: NDArray[Any]) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(f"{what} have the shape {labels.shape}; one label an image is needed (no multi-label)")
    if labels.dtype.kind == "f":
        wrong = ~np.isfinite(labels) | (labels != np.round(labels))
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(f"{what} contain {labels[row]} (row {row}); labels are whole numbers from 0")
    elif labels.dtype.kind not in "uib":
        raise UserError(f"{what} are of type {labels.dtype}; use whole numbers from 0, and 'class_names' for names")
    return labels.astype(np.int64)


def _check_length(path: str, key: str, have: int, split: str, images: int) -> None:
    if have != images:
        raise UserError(f"'{key}' of {path} has {have} rows and '{split}_images' {images}; both need one an image")
