"""A data module that writes down which split is asked for, and which files are there by then."""

import json
from pathlib import Path

from lightning_automl.data import ArraysDataModule


class SpiedDataModule(ArraysDataModule):
    """Arrays.

    Args:
        path: Of the arrays.
        notes: File that a line ``[split, whether each of watched is there, …]`` is added to.
        watched: Paths of other files.
        kwargs: See the base class.
    """

    def __init__(self, path: str, notes: str, watched: list[str], **kwargs):
        self._notes, self._watched = notes, watched
        super().__init__(path, **kwargs)

    def dataset(self, split):
        with open(self._notes, "a") as file:
            file.write(json.dumps([split, *(Path(each).exists() for each in self._watched)]) + "\n")
        return super().dataset(split)
