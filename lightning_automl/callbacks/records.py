"""What a run directory keeps of its data and of its predictions, so that both can be had without the data later."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_automl.augment.policy import ImagePolicy, load_policy, policy_to_dict
from lightning_automl.rundir import UserError, index_digest, replacing, write_json

_MOST_LEAKS = 20


def write_data_record(path: Path, data: Any) -> None:
    """Write ``data.json``: what a network's user has to know of the images that it was trained on.

    Holds ``class_names``, ``channels``, ``image_size`` (height, width), ``window`` (what became 0 and 255 of each
    channel, left out for 8-bit images), ``counts`` (images by split and class), ``groups`` (number of groups by split,
    or null), ``index`` and ``splits`` (digests of the names and labels of all images, and of those of each split), of
    an architecture search ``streams`` (images by class of the two parts of the train split), ``leaks`` (the first
    twenty pairs of names of identical images in two splits) and ``leak_count``. Of a data module that is not this
    package's, only what it has.

    Args:
        path: The file.
        data: The data module, set up.
    """
    record: dict[str, Any] = {}
    if hasattr(data, "class_names"):
        record["class_names"] = [str(name) for name in data.class_names]
    if hasattr(data, "channels"):
        record["channels"] = int(data.channels)
    if hasattr(data, "image_size"):
        size = data.image_size
        record["image_size"] = [int(side) for side in ((size, size) if isinstance(size, int) else size)]
    if isinstance(getattr(data, "window", None), Tensor):
        record["window"] = data.window.tolist()
    if hasattr(data, "split_rows") and hasattr(data, "contents"):
        names, labels, groups = data.contents.names, data.contents.labels, data.contents.groups
        record["index"] = index_digest(names, labels.tolist())
        record["groups"] = None if groups is None else {}
        record["counts"], record["splits"] = {}, {}
        for split, rows in data.split_rows.items():
            record["counts"][split] = np.bincount(labels[rows], minlength=data.num_classes).tolist()
            record["splits"][split] = split_digest(data, split)
            if groups is not None:
                record["groups"][split] = len(np.unique(groups[rows]))
        streams = getattr(data, "stream_rows", {})
        if streams:
            counts = {name: np.bincount(labels[rows], minlength=data.num_classes) for name, rows in streams.items()}
            record["streams"] = {name: count.tolist() for name, count in counts.items()}
    if hasattr(data, "leaks"):
        record |= {"leaks": [list(pair) for pair in data.leaks[:_MOST_LEAKS]], "leak_count": len(data.leaks)}
    write_json(path, record)


def policy_record(data: Any) -> dict[str, Any] | None:
    """What ``policy.json`` keeps of the policy that a data module trains with; None if no file can hold it."""
    policy = getattr(data, "train_policy", None)
    if not isinstance(policy, ImagePolicy):
        return None
    try:
        return policy_to_dict(policy)
    except UserError:  # a class of the user's own, which the config names
        return None


def policy_changed(path: Path, data: Any) -> bool:
    """Whether a data module trains with another policy than the one that a run's ``policy.json`` keeps."""
    return path.exists() and policy_record(data) is not None and load_policy(path) != data.train_policy


def split_digest(data: Any, split: str) -> str:
    """32 hexadecimal digits that change with the names and labels of the images of a split."""
    rows = data.split_rows[split]
    return index_digest((data.contents.names[row] for row in rows), data.contents.labels[rows].tolist())


def write_predictions(
    path: Path, trainer: Trainer, split: str, predictions: tuple[Tensor, Tensor], weights: Mapping[str, str]
) -> None:
    """Write ``predictions_<split>.safetensors``, in the order of the split.

    Tensors: ``probabilities`` float32 ``(images, classes)``, ``labels`` int64 ``(images,)``; where the data module says
    which image is which also ``rows``, the rows of its index, and where it has groups ``groups``, a number a group.

    Args:
        path: The file.
        trainer: The trainer, for the number of ranks and the data module.
        split: ``val`` or ``test``.
        predictions: Probabilities ``(images, classes)`` and labels ``(images,)`` of all ranks, one after the other.
        weights: Of which ``epoch`` and ``step`` the weights were, kept as metadata beside the digest of the split.
    """
    from safetensors.torch import save

    probabilities, labels = predictions
    # Rank r has the images r, r + ranks, r + 2 ranks, … of the split (data/samplers.py).
    images, ranks = len(labels), trainer.world_size
    position = torch.cat([torch.arange(rank, images, ranks) for rank in range(ranks)])
    tensors = {"probabilities": probabilities.float().cpu(), "labels": labels.cpu()}
    tensors = {name: torch.empty_like(value).index_copy_(0, position, value) for name, value in tensors.items()}
    metadata = dict(weights)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
    rows = getattr(data, "split_rows", {}).get(split)
    if rows is not None and hasattr(data, "contents"):
        metadata["split"] = split_digest(data, split)
        # Of a split that was not gone through as a whole (limit_val_batches) one process has the first images, several
        # ranks something else; a loader of somebody's own may go through it in any order.
        rows = rows[:images] if ranks == 1 else rows
        if np.array_equal(data.contents.labels[rows], tensors["labels"].numpy()):
            tensors["rows"] = torch.from_numpy(rows.astype(np.int64))
            if data.contents.groups is not None:
                codes = np.unique(data.contents.groups[rows], return_inverse=True)[1]
                tensors["groups"] = torch.from_numpy(codes.reshape(-1).astype(np.int64))
    with replacing(path) as partial:
        partial.write_bytes(save(tensors, metadata))  # save_file would make it readable for its owner alone
