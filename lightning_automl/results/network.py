"""The trained network of a run directory, or the model of a directory of ``auto``, built again without its data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.ensemble import Ensemble, is_of_auto
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import Tensor

    from lightning_automl.results.averaged import AveragedTask

#: What the data know, by attribute of the data module, and the argument of the task or its network that it becomes.
FROM_DATA = (
    ("num_classes", "num_classes"),
    ("num_classes", "model.init_args.num_classes"),
    ("channels", "model.init_args.in_channels"),
    ("image_size", "model.init_args.image_size"),
)


@dataclass(frozen=True)
class Trained:
    """What somebody who uses a trained network has to know of it.

    Attributes:
        class_names: One name a class, in the order of the outputs.
        channels: Channels of its images.
        image_size: Height and width of its images, in pixels.
        window: For each channel the values that become 0 and 255, or None for a network trained on 8-bit images.
        threshold: Operating point of a calibrated model of two classes, see :class:`Ensemble`; else None.
        unsure_below: Probability of the most probable class below which the model is unsure, or None.
    """

    class_names: list[str]
    channels: int
    image_size: tuple[int, int]
    window: list[list[float]] | None = None
    threshold: float | None = None
    unsure_below: float | None = None


class _Data:
    """Stands for the data module when only the network is built."""

    def __init__(self, num_classes: int, channels: int, image_size: tuple[int, int]) -> None:
        self.num_classes = num_classes
        self.channels = channels
        self.image_size = image_size


def read_source(directory: str | Path) -> Run | Ensemble:
    """Read what has a trained network: the directory of a run, or one of ``auto`` that has chosen its model.

    Raises:
        UserError: If it is neither, or ``auto`` has not come to its end.
    """
    directory = Path(directory)
    return Ensemble.read(directory) if is_of_auto(directory) else Run.read(directory)


def what_was_trained(source: Run | Ensemble) -> Trained:
    """Read what is known of the images that a run or a model was trained on.

    Raises:
        UserError: If the run's data module says too little, or the run has not begun to train.
    """
    if isinstance(source, Ensemble):
        names = ("class_names", "channels", "image_size", "window", "threshold", "unsure_below")
        return Trained(**{name: getattr(source, name) for name in names})
    run = source
    missing = [name for name in ("class_names", "channels", "image_size") if name not in run.data]
    if missing:
        raise UserError(
            f"{run.directory} does not say the {', '.join(missing)} of its images: it has not begun to train, "
            "or its data module has no such attribute"
        )
    height, width = run.data["image_size"]
    return Trained(run.data["class_names"], run.data["channels"], (height, width), run.data.get("window"))


@overload
def trained_task(source: Run) -> "LightningModule": ...
@overload
def trained_task(source: Ensemble) -> "AveragedTask": ...
@overload
def trained_task(source: Run | Ensemble) -> "LightningModule | AveragedTask": ...
def trained_task(source: Run | Ensemble) -> "LightningModule | AveragedTask":
    """Build the task of a run with the weights of its best epoch, in evaluation mode, on the CPU.

    That of a model of ``auto`` is an :class:`~lightning_automl.results.averaged.AveragedTask` of its members' tasks.
    The data need not be there, nor the weights that the training began with.

    Raises:
        UserError: If no epoch is finished, a class of the config cannot be built, or a member is gone or of other data.
    """
    return _averaged_task(source) if isinstance(source, Ensemble) else _task_of_run(source)


def _averaged_task(ensemble: Ensemble) -> "AveragedTask":
    from lightning_automl.results.averaged import AveragedTask

    whole = what_was_trained(ensemble)
    tasks = []
    for place in ensemble.places:
        if not place.is_dir():
            raise UserError(f"{place}, a part of the model of {ensemble.directory}, is gone; restore it")
        run = Run.read(place)
        own = what_was_trained(run)
        if any(getattr(own, name) != getattr(whole, name) for name in ("class_names", "channels", "image_size")):
            raise UserError(f"{place} is of other images than the model of {ensemble.directory}; restore it")
        tasks.append(_task_of_run(run))
    return AveragedTask(tasks, ensemble.temperature).eval()


def _task_of_run(run: Run) -> "LightningModule":
    import torch

    from lightning_automl.models.weights import without_loading

    trained = what_was_trained(run)
    if not run.best_checkpoint.exists():
        raise UserError(f"{run.best_checkpoint} does not exist: no epoch of this run was finished")
    try:
        with without_loading():
            task = build_task(run.config["model"], trained)
    except Exception as error:
        raise UserError(
            f"the network of {run.directory} cannot be built again: {one_sentence(root_cause(error))}"
        ) from error
    load_base = getattr(task, "load_base", None)
    if load_base is not None:  # of a task whose checkpoints lack what it has frozen
        load_base(run.best_checkpoint.with_name("base.safetensors"))
    try:
        checkpoint = torch.load(run.best_checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that meets foreign bytes raises whatever it stumbles over
        raise UserError(f"{run.best_checkpoint} cannot be read ({type(error).__name__}); it is damaged") from error
    task.on_load_checkpoint(checkpoint)
    task.load_state_dict(checkpoint["state_dict"])
    return task.eval()


def build_task(config: dict[str, Any], trained: Trained) -> "LightningModule":
    """Build the task that the ``model`` of a ``fit`` config describes, for such images, with its first weights.

    Raises:
        Exception: Whatever jsonargparse, or a class of the config, raises where it cannot be built.
    """
    import jsonargparse
    from lightning.pytorch import LightningModule

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_class_arguments(_Data, "data")
    for source, target in FROM_DATA:
        parser.link_arguments(
            "data", f"model.init_args.{target}", compute_fn=_attribute(source), apply_on="instantiate"
        )
    data = {
        "num_classes": len(trained.class_names),
        "channels": trained.channels,
        "image_size": list(trained.image_size),
    }
    task: LightningModule = parser.instantiate(parser.parse_object({"model": config, "data": data})).model
    return task


def _attribute(name: str) -> Callable[[Any], Any]:
    return lambda data: getattr(data, name)


#: What to say of a network whose outputs are not finite.
DIVERGED = "the network of {} gives no numbers (NaN): its training has diverged; train it with a smaller learning rate"


def probabilities(task: Any, logits: "Tensor") -> "Tensor":
    """What the logits ``(batch, classes)`` of a task mean: its own ``probabilities``, or softmax if it has none."""
    own = getattr(task, "probabilities", None)
    scores: Tensor = logits.softmax(1) if own is None else own(logits)
    return scores
