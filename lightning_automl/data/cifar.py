"""CIFAR-10 and CIFAR-100."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_automl.data.arrays import ArraysDataModule
from lightning_automl.data.base import Index
from lightning_automl.rundir import UserError


class CIFAR10DataModule(ArraysDataModule):
    """CIFAR-10: 60,000 colour images of 32 x 32 pixels in 10 classes, 10,000 of them for test.

    Krizhevsky, *Learning multiple layers of features from tiny images*, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html. Nothing is downloaded. The data set's own files are pickles, which
    torchvision reads after comparing their checksums.

    Args:
        path: The folder that torchvision calls ``root`` (it holds ``cifar-10-batches-py``), or an ``.npz`` file in the
            layout of :class:`ArraysDataModule`.
        kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If the files are not there, or hold another number of classes.
    """

    classes: ClassVar[int] = 10
    torchvision_name: ClassVar[str] = "CIFAR10"

    def __init__(self, path: str, **kwargs: Any) -> None:
        self._read_by_torchvision: dict[str, Any] = {}
        super().__init__(path, **kwargs)

    def index(self) -> Index:
        """Labels, by torchvision or from the ``.npz`` file."""
        contents = super().index() if Path(self.path).is_file() else self._torchvision_index()
        if len(contents.class_names) != self.classes:
            raise UserError(
                f"{self.path} has {len(contents.class_names)} classes and {self.torchvision_name} {self.classes}; "
                "use ArraysDataModule for other data"
            )
        return contents

    def _torchvision_index(self) -> Index:
        from torchvision import datasets

        reader = getattr(datasets, self.torchvision_name)
        try:
            files = {split: reader(self.path, train=split == "train") for split in ("train", "test")}
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{self.path} holds no complete folder {reader.base_folder}; give the folder it was unpacked in, "
                "or an .npz file"
            ) from error
        self._read_by_torchvision = {split: data.data for split, data in files.items()}
        self._first = {"train": 0, "test": len(files["train"].targets)}
        counts = [len(data.targets) for data in files.values()]
        return Index(
            labels=np.concatenate([np.asarray(data.targets, dtype=np.int64) for data in files.values()]),
            class_names=list(files["train"].classes),
            channels=3,
            image_size=(32, 32),
            names=[f"{split}[{row}]" for split, count in zip(files, counts, strict=True) for row in range(count)],
            splits=np.repeat(np.array(list(files)), counts),
        )

    def images(self, split: str) -> NDArray[Any]:
        """All images ``(images, 32, 32, 3)`` of a split of the files."""
        if split in self._read_by_torchvision:
            return np.asarray(self._read_by_torchvision[split])
        return super().images(split)

    def close(self) -> None:
        """Forget what torchvision read."""
        super().close()
        self._read_by_torchvision = {}


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: as :class:`CIFAR10DataModule`, with 100 classes; torchvision's folder holds ``cifar-100-python``."""

    classes: ClassVar[int] = 100
    torchvision_name: ClassVar[str] = "CIFAR100"
