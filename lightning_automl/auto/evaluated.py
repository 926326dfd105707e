"""What a trained network gave for the images of a split, kept in the directory of its run."""

from hashlib import blake2b
from pathlib import Path

import numpy as np

from lightning_automl.results.run import Predictions, Run, read_predictions
from lightning_automl.rundir import replacing


def file_of(place: Path, split: str) -> Path:
    """Where a run keeps what :func:`~lightning_automl.auto.evaluation.evaluate` found of a split."""
    return place / f"evaluated_{split}.safetensors"


def weights_digest(place: Path) -> str:
    """16 hexadecimal digits that change with the checkpoint of a run's best epoch."""
    digest = blake2b(digest_size=8)
    with Run.read(place).best_checkpoint.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def is_evaluated(place: Path, split: str) -> bool:
    """Whether a run's file of a split is there, and is of the weights that the run has."""
    path = file_of(place, split)
    if not path.exists():
        return False
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return bool((file.metadata() or {}).get("weights") == weights_digest(place))


def read_evaluated(place: Path, split: str) -> Predictions:
    """Read a run's file of a split."""
    found = read_predictions(file_of(place, split))
    assert found is not None, f"{place} is to be evaluated first"
    return found


def write_predictions(path: Path, found: Predictions) -> None:
    """Write predictions as a run keeps those of its best epoch: see ``callbacks.records.write_predictions``."""
    from safetensors.numpy import save

    tensors = {"probabilities": found.probabilities.astype(np.float32), "labels": found.labels.astype(np.int64)}
    more = {"rows": found.rows, "groups": found.groups}
    tensors |= {name: value.astype(np.int64) for name, value in more.items() if value is not None}
    with replacing(path) as partial:
        partial.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, found.origin))
