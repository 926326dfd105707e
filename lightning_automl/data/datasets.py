"""Data sets of uint8 images in memory or in a mapped file, that give a whole batch by one index operation."""

from collections.abc import Mapping

from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]


class LabelledImages(Dataset[Batch]):
    """Images and labels; ``dataset[indices]`` is a whole batch by one index operation.

    Args:
        images: uint8 ``(images, height, width, channels)``, in memory or mapped from a file: batches then are in the
            channels-last layout that convolutions on CPUs want, which saves them a conversion that costs as much as
            all the rest.
        labels: int64 ``(images,)``.
        rows: Where the images of this data set are in ``images``, int64 ``(images,)``; all of them when left out.
    """

    def __init__(self, images: Tensor, labels: Tensor, rows: Tensor | None = None) -> None:
        self.images = images
        self.labels = labels
        self.rows = rows

    def __getitem__(self, indices: Tensor | int) -> Batch:
        if isinstance(indices, int):
            place = indices if self.rows is None else int(self.rows[indices])
            # a copy, as a batch is: a mapped file cannot be written to
            return self.images[place].clone().permute(2, 0, 1), self.labels[indices]
        places = indices if self.rows is None else self.rows[indices]
        return self.images.index_select(0, places).permute(0, 3, 1, 2), self.labels[indices]

    def __len__(self) -> int:
        return len(self.labels)


class Streams(Dataset[dict[str, Batch]]):
    """Parts of one data set, of each of which a step takes a batch: ``streams[{"train": indices, …}]``.

    Args:
        dataset: All images.
        parts: Where the images of each part are in ``dataset``, int64 ``(images of the part,)``, by name.
    """

    def __init__(self, dataset: LabelledImages, parts: Mapping[str, Tensor]) -> None:
        self.dataset = dataset
        self.parts = dict(parts)

    def labels(self, name: str) -> Tensor:
        """Labels of a part, int64 ``(images of the part,)``."""
        return self.dataset.labels[self.parts[name]]

    def __getitem__(self, indices: Mapping[str, Tensor]) -> dict[str, Batch]:
        return {name: self.dataset[self.parts[name][own]] for name, own in indices.items()}

    def __len__(self) -> int:
        return len(self.dataset)
