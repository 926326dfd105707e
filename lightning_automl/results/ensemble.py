"""The model of a directory of ``auto``: one or several runs whose probabilities are averaged and calibrated.

What the members say is put together in one way everywhere, in numpy here and in torch by
:class:`~lightning_automl.results.averaged.AveragedTask`: with ``p`` the mean of the members' probabilities and ``T``
the temperature, the logits are ``log(max(p, 1e-12)) / T`` and the probabilities their softmax.

Averages of probabilities: Lakshminarayanan, Pritzel and Blundell, *Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles*, NIPS 2017, https://arxiv.org/abs/1612.01474. The temperature after the average:
Rahaman and Thiery, *Uncertainty Quantification and Deep Ensembles*, NeurIPS 2021, https://arxiv.org/abs/2007.08792
("pool-then-calibrate").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import yaml
from numpy.typing import NDArray

from lightning_automl.results.run import Predictions
from lightning_automl.rundir import UserError, read_json, write_json

Average = Literal["predictions", "weights", "single"]

#: Probabilities below are taken for this, so that every logit is a number.
SMALLEST = 1e-12

_VERSION = 1


def combine(members: Sequence[NDArray[Any]] | NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Calibrated probabilities ``(images, classes)`` of the average of members.

    Args:
        members: Probabilities ``(images, classes)`` of each member.
        temperature: What the logits are divided by, above 0; above 1 the model becomes less sure.
    """
    mean = np.mean(np.asarray(members, dtype=np.float64), axis=0)
    logits = np.log(np.maximum(mean, SMALLEST)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def combine_predictions(members: Sequence[Predictions], temperature: float = 1.0) -> Predictions:
    """The average of what several runs give, for each image of those that give something for it.

    Args:
        members: Of each run. Of two runs all images are the same, or none is, and likewise the groups; without rows
            they are taken for the same.
        temperature: See :func:`combine`.

    Returns:
        The images in the order of the first member if all have the same, else by their rows.
    """
    of_images: dict[bytes, list[Predictions]] = {}
    for each in members:
        of_images.setdefault(b"" if each.rows is None else each.rows.tobytes(), []).append(each)
    parts = [(own[0], combine([each.probabilities for each in own], temperature)) for own in of_images.values()]
    origin = {key: value for key, value in members[0].origin.items() if key != "weights"}
    first, scores = parts[0]
    if len(parts) == 1:
        return Predictions(scores, first.labels, first.rows, first.groups, origin)
    rows = np.concatenate([each.rows for each, _ in parts if each.rows is not None])
    order = np.argsort(rows)
    groups = None
    if first.groups is not None:  # numbered anew in each part
        own = [each.groups for each, _ in parts if each.groups is not None]
        starts = np.cumsum([0, *(each.max() + 1 for each in own[:-1])])
        groups = np.concatenate([each + start for each, start in zip(own, starts, strict=True)])[order]
    labels = np.concatenate([each.labels for each, _ in parts])[order]
    origin.pop("split", None)  # of the first part
    return Predictions(np.concatenate([each for _, each in parts])[order], labels, rows[order], groups, origin)


@dataclass(frozen=True)
class Ensemble:
    """What ``model.json`` in a directory of ``auto`` says.

    Attributes:
        directory: The directory of ``auto``.
        members: Run directories, relative to it.
        average: ``predictions`` when members' probabilities are averaged, ``weights`` when the one member holds the
            average of several runs' weights, ``single`` for the run of one seed.
        temperature: See :func:`combine`.
        class_names: One name a class, in the order of the outputs.
        channels: Channels of its images.
        image_size: Height and width of its images, in pixels.
        window: For each channel the values that become 0 and 255, or None for a model trained on 8-bit images.
        threshold: Of two classes, the calibrated probability of the second one from which on an image is said to be of
            it at the operating point chosen on validation images; None for more classes. Labels do not depend on it.
        unsure_below: Calibrated probability of the most probable class below which the model is unsure, or None.
    """

    directory: Path
    members: list[str]
    average: Average
    temperature: float
    class_names: list[str]
    channels: int
    image_size: tuple[int, int]
    window: list[list[float]] | None = None
    threshold: float | None = None
    unsure_below: float | None = None

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read the model of a directory of ``auto``.

        Raises:
            UserError: If no model has been chosen yet, or ``model.json`` is damaged or of another version.
        """
        directory = Path(directory)
        path = directory / "model.json"
        record = read_json(path)
        if record is None:
            raise UserError(
                f"{directory} has no model yet: auto has not come to its end there; give the same "
                "`lightning-automl auto` command again, it goes on where it stopped"
            )
        if not isinstance(record, dict) or record.get("version") != _VERSION:
            raise UserError(f"{path} is not of version {_VERSION} of such files; run `lightning-automl auto` again")
        try:
            height, width = record["image_size"]
            given = {name: record[name] for name in ("members", "average", "temperature", "class_names", "channels")}
            given |= {name: record.get(name) for name in ("window", "threshold", "unsure_below")}
            made = cls(directory, image_size=(height, width), **given)
            made.check()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error!r}); restore it, or run `lightning-automl auto` again"
            ) from error
        return made

    def check(self) -> None:
        """Raise a ValueError unless there are members, the average is known and the temperature is above 0."""
        if not self.members or self.average not in get_args(Average) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"members {self.members}, average {self.average!r}, temperature {self.temperature}")

    def write(self) -> None:
        """Write ``model.json`` into the directory."""
        self.check()
        write_json(
            self.directory / "model.json",
            {
                "version": _VERSION,
                "members": self.members,
                "average": self.average,
                "temperature": self.temperature,
                "threshold": self.threshold,
                "unsure_below": self.unsure_below,
                "class_names": self.class_names,
                "channels": self.channels,
                "image_size": list(self.image_size),
                "window": self.window,
            },
        )

    @property
    def places(self) -> list[Path]:
        """The run directories of the members."""
        return [self.directory / member for member in self.members]


def is_of_auto(directory: Path) -> bool:
    """Whether a directory is one of ``auto``, finished or not."""
    path = directory / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text()) if path.is_file() else None
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(config, dict) and "auto" in config and "model" not in config
