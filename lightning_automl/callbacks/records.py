"""What a run directory keeps of its data and of its predictions, so that both can be had without the data later."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_automl.rundir import index_digest, replacing, write_json

_MOST_LEAKS = 20


def write_data_record(path: Path, data: Any) -> None:
    """Write ``data.json``: what a network's user has to know of the images that it was trained on.

    Holds ``class_names``, ``channels``, ``image_size`` (height, width), ``window`` (what became 0 and 255 of each
    channel, left out for 8-bit images), ``counts`` (images by split and class), ``groups`` (number of groups by split,
    or null), ``index`` (a digest of the images' names and labels), ``leaks`` (the first twenty pairs of names of
    identical images in two splits) and ``leak_count``. Of a data module that is not this package's, only what it has.

    Args:
        path: The file.
        data: The data module, set up.
    """
    record: dict[str, Any] = {}
    for name in ("class_names", "channels", "image_size"):
        if hasattr(data, name):
            record[name] = getattr(data, name)
    if getattr(data, "window", None) is not None:
        record["window"] = data.window.tolist()
    if hasattr(data, "split_rows") and hasattr(data, "contents"):
        labels, groups = data.contents.labels, data.contents.groups
        rows = data.split_rows
        counts = {split: np.bincount(labels[own], minlength=data.num_classes).tolist() for split, own in rows.items()}
        record["counts"] = counts
        record["index"] = index_digest(data.contents.names, labels.tolist())
        record["groups"] = (
            None if groups is None else {split: len(np.unique(groups[own])) for split, own in rows.items()}
        )
    if hasattr(data, "leaks"):
        record |= {"leaks": [list(pair) for pair in data.leaks[:_MOST_LEAKS]], "leak_count": len(data.leaks)}
    write_json(path, record)


def write_predictions(path: Path, trainer: Trainer, split: str, probabilities: Tensor, labels: Tensor) -> None:
    """Write ``predictions_<split>.safetensors``, in the order of the split.

    Tensors: ``probabilities`` float32 ``(images, classes)``, ``labels`` int64 ``(images,)``; where the data module says
    which image is which also ``rows``, the rows of its index, and where it has groups ``groups``, a number a group.

    Args:
        path: The file.
        trainer: The trainer, for the number of ranks and the data module.
        split: ``val`` or ``test``.
        probabilities: ``(images, classes)`` of all ranks, one rank after the other.
        labels: ``(images,)`` likewise.
    """
    from safetensors.torch import save

    # Rank r has the images r, r + ranks, r + 2 ranks, … of the split (data/samplers.py).
    images, ranks = len(labels), trainer.world_size
    position = torch.cat([torch.arange(rank, images, ranks) for rank in range(ranks)])
    tensors = {"probabilities": probabilities.float().cpu(), "labels": labels.cpu()}
    tensors = {name: torch.empty_like(value).index_copy_(0, position, value) for name, value in tensors.items()}
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
    rows = getattr(data, "split_rows", {}).get(split)
    # Of a split that was not gone through as a whole (limit_val_batches) one process has the first images, several
    # ranks something else.
    if rows is not None and hasattr(data, "contents") and (len(rows) == images or (ranks == 1 and images < len(rows))):
        rows = rows[:images]
        assert np.array_equal(data.contents.labels[rows], tensors["labels"].numpy())
        tensors["rows"] = torch.from_numpy(rows.astype(np.int64))
        if data.contents.groups is not None:
            codes = np.unique(data.contents.groups[rows], return_inverse=True)[1]
            tensors["groups"] = torch.from_numpy(codes.reshape(-1).astype(np.int64))
    with replacing(path) as partial:
        partial.write_bytes(save(tensors))  # save_file would make it readable for its owner alone
