"""The handwritten digits that come with scikit-learn."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.data.base import ImageDataModule, Index


class DigitsDataModule(ImageDataModule):
    """1797 handwritten digits, 8 x 8 pixels, one channel, 10 classes; part of scikit-learn, nothing is downloaded.

    Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI 1998, https://doi.org/10.24432/C50P49 (its
    test part). Pixels 0 to 16 become 0 to 255. The test split is a stratified fifth.

    Args:
        kwargs: See :class:`ImageDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]
        self.targets = digits.target.astype(np.int64)
        super().__init__(**kwargs)

    def index(self) -> Index:
        """What there is."""
        return Index(
            labels=self.targets,
            class_names=[str(digit) for digit in range(10)],
            channels=1,
            image_size=(8, 8),
            names=[f"digits[{row}]" for row in range(len(self.targets))],
        )

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images ``(rows, 1, 8, 8)``."""
        return np.asarray(self.pixels[rows])
