"""A run directory, read back."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from numpy.typing import NDArray

from lightning_automl.rundir import UserError, read_json


@dataclass(frozen=True)
class Predictions:
    """What a network gave for each image of a split.

    Attributes:
        probabilities: float64 ``(images, classes)``.
        labels: int64 ``(images,)``.
        rows: Row ``(images,)`` of each image in the data module's index, or None where it is not known.
        groups: A number ``(images,)`` for each image, equal within a group (a patient), or None without groups.
        origin: ``epoch`` and ``step`` of the weights, and ``split``, a digest of the images, as far as they are known.
    """

    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class ``(images,)``."""
        return np.asarray(self.probabilities.argmax(1))


@dataclass(frozen=True)
class Run:
    """The files of a run directory; of an unfinished run those that are there already.

    Attributes:
        directory: Where it is.
        config: ``config.yaml``, itself a ``fit`` config.
        summary: ``summary.json``, or None.
        environment: ``environment.json``, or empty.
        data: ``data.json``, or empty.
        epochs: The rows of ``metrics.csv``, oldest first; cells without a value are left out.
    """

    directory: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    environment: dict[str, Any]
    data: dict[str, Any]
    epochs: list[dict[str, float]]

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read a directory that ``fit`` has written or is writing.

        Raises:
            UserError: If it is not the directory of a run.
        """
        directory = Path(directory)
        config = _config(directory)
        epochs: list[dict[str, float]] = []
        if (directory / "metrics.csv").exists():
            with (directory / "metrics.csv").open(newline="") as file:
                epochs = [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
        return cls(
            directory,
            config,
            read_json(directory / "summary.json"),
            read_json(directory / "environment.json") or {},
            read_json(directory / "data.json") or {},
            epochs,
        )

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the epoch with the best monitored metric; it may not be there yet."""
        return self.directory / "checkpoints" / "best.ckpt"

    @property
    def finished(self) -> bool:
        """Whether the command that made the run has come to its end."""
        return self.summary is not None and self.summary["status"] == "finished"

    def predictions(self, split: str) -> Predictions | None:
        """Predictions of the best epoch for ``val``, those of the newest test for ``test``; None if there are none."""
        return read_predictions(self.directory / f"predictions_{split}.safetensors")


def read_predictions(path: Path) -> Predictions | None:
    """Read a file of predictions; None if there is none."""
    if not path.exists():
        return None
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        origin = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # it is no dictionary
    probabilities = tensors["probabilities"].astype(np.float64)
    return Predictions(probabilities, tensors["labels"], tensors.get("rows"), tensors.get("groups"), origin)


def _config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}; give the --dir of a fit")
    path = directory / "config.yaml"
    if not path.exists():
        held = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
        what = f"it holds {', '.join(held[:3])}{', …' if len(held) > 3 else ''}" if held else "it is empty"
        raise UserError(f"{directory} is not a run directory: {what} and no config.yaml; give the --dir of a fit")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML; give the --dir of a fit") from error
    if isinstance(config, dict) and ("space" in config or "method" in config) and "model" not in config:
        part = "folds/0" if (directory / "folds").is_dir() else "trials/0000"
        raise UserError(
            f"{directory} is the directory of a search; give that of a run, as {directory}/{part}, or the --dir "
            f"of fit --config {directory}/best.yaml"
        )
    if isinstance(config, dict) and "auto" in config and "model" not in config:
        raise UserError(
            f"{directory} is the directory of auto, which holds many runs; give one of those below {directory}/runs"
        )
    if not isinstance(config, dict) or not {"model", "trainer"} <= config.keys():
        raise UserError(f"{path} is not the config of a run: it has no 'model' and 'trainer'; give the --dir of a fit")
    return config


def open_data(run: Run) -> Any:
    """Build the data module of a run that has one, from its config; its images are not read.

    Raises:
        Exception: Whatever the data module, or jsonargparse, raises where the data are not there.
    """
    import jsonargparse
    from lightning.pytorch import LightningDataModule

    from lightning_automl.data.policies import policy_kept_in

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    with policy_kept_in(run.directory):
        return parser.instantiate(parser.parse_object({"data": run.config["data"]})).data
