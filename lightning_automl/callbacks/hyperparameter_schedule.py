"""Change an optimizer's hyper-parameters at the start of given epochs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lightning_automl.rundir import UserError


class Segment(TypedDict):
    """Values that hold from the start of an epoch (from 0) on."""

    from_epoch: int
    values: dict[str, Any]


class HyperparameterSchedule(Callback):
    """Sets hyper-parameters of the optimizer at the start of epochs, as population based training found them.

    Jaderberg et al., *Population Based Training of Neural Networks*, 2017, https://arxiv.org/abs/1711.09846: the result
    is a schedule, and a run with this callback repeats it. Before the first step of the epoch that a segment begins
    with, its values are written into every parameter group of every optimizer, and at no other time. ``lr`` is the
    learning rate that the run's own schedule starts from: what that has made of it so far is kept as a factor, which
    repeats every schedule that is a multiple of its start (``WarmupCosineLR``, ``LambdaLR``, ``StepLR``,
    ``CosineAnnealingLR`` with ``eta_min=0`` and those of them in a ``SequentialLR``). Groups without weight decay
    (``decay_norms_and_biases: false``) stay so, and groups with a learning rate of their own (``FinetuneTask``) keep
    its ratio to that of the optimizer.

    What was set is a part of the checkpoint. A run that is continued with further segments equals, bit for bit, one
    that had them from the start.

    Args:
        segments: Each with ``from_epoch``, the first 0 and ascending, and ``values`` by name: those of the optimizer's
            arguments that it keeps in its parameter groups (``lr``, ``weight_decay``, ``momentum``, ``betas``, …).

    Raises:
        UserError: If the segments are not as said, when training starts if a value is none of the optimizer's, and at
            the start of an epoch if the checkpoint was trained with other segments so far.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = [_checked(segment) for segment in segments]
        starts = [segment["from_epoch"] for segment in self.segments]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise UserError(f"the segments begin in epochs {starts}; the first is 0, and each of the next is larger")
        self._done: list[Segment] | None = None
        self._without_decay: set[tuple[int, int]] = set()  # numbers of optimizer and group
        self._ratios: dict[tuple[int, int], float] = {}  # of a group's learning rate to its optimizer's

    def state_dict(self) -> dict[str, Any]:
        """The segments that have begun."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which segments the run that is continued was trained with."""
        self._done = state_dict["done"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a former training with this callback."""
        if stage == "fit":
            self._done = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the optimizers as the config makes them: a checkpoint is loaded into them after this."""
        self._without_decay = {
            (number, index)
            for number, optimizer in enumerate(trainer.optimizers)
            for index, group in enumerate(optimizer.param_groups)
            if _is_without_decay(optimizer, group)
        }
        self._ratios = {
            (number, index): _ratio(optimizer, group)
            for number, optimizer in enumerate(trainer.optimizers)
            for index, group in enumerate(optimizer.param_groups)
        }
        for segment in self.segments:
            for optimizer in trainer.optimizers:
                for name, value in segment["values"].items():
                    _check_value(optimizer, name, value)
            scheduler = next((each for each in _schedulers(trainer) if isinstance(each, OneCycleLR | CyclicLR)), None)
            if "lr" in segment["values"] and scheduler is not None:
                raise UserError(
                    f"{type(scheduler).__name__} has learning rates of its own and lr cannot be changed under it; "
                    "use WarmupCosineLR"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the values of the segment that begins with this epoch.

        Lightning does not call this again for an epoch that a checkpoint was written in: its values are in there.
        """
        epoch = trainer.current_epoch
        before = [segment for segment in self.segments if segment["from_epoch"] < epoch]
        done = before if self._done is None else [each for each in self._done if each["from_epoch"] < epoch]
        if done != before:
            raise UserError(
                f"the checkpoint was trained with the segments {done} up to epoch {epoch}, and now they are {before}; "
                "give the former ones and add to them"
            )
        new = [segment for segment in self.segments if segment["from_epoch"] == epoch]
        for segment in new:
            self._set(trainer, segment["values"])
        self._done = before + new

    def _set(self, trainer: Trainer, values: Mapping[str, Any]) -> None:
        for number, optimizer in enumerate(trainer.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                # Schedulers write down where they start; without one, or with ReduceLROnPlateau, nobody has.
                group.setdefault("initial_lr", float(group["lr"]))
                for name, value in values.items():
                    if name == "lr":
                        _rescale(group, value * self._ratios[number, index])
                    elif name != "weight_decay" or (number, index) not in self._without_decay:
                        group[name] = tuple(value) if isinstance(value, list) else value
        if "lr" in values:
            for scheduler in _schedulers(trainer):
                if hasattr(scheduler, "base_lrs"):
                    number = [optimizer is scheduler.optimizer for optimizer in trainer.optimizers].index(True)
                    scheduler.base_lrs = [
                        values["lr"] * self._ratios[number, index] for index in range(len(scheduler.base_lrs))
                    ]


def _ratio(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    own, common = group.get("initial_lr", group.get("lr")), optimizer.defaults.get("lr")
    return 1.0 if own is None or not common else float(own) / float(common)


def _rescale(group: dict[str, Any], lr: float) -> None:
    base = float(group["initial_lr"])
    if base == lr:  # a product with 1 ± 1e-16 would not be the run without this callback
        return
    now = lr * (float(group["lr"]) / base) if base else lr
    for name, value in (("initial_lr", lr), ("lr", now)):
        if isinstance(group[name], Tensor):  # compiled and captured steps keep hold of it
            group[name].fill_(value)
        else:
            group[name] = value


def _schedulers(trainer: Trainer) -> Iterator[Any]:
    """All schedulers, also those within a SequentialLR or ChainedScheduler."""
    waiting: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    while waiting:
        scheduler = waiting.pop()
        yield scheduler
        waiting += getattr(scheduler, "_schedulers", [])


def _is_without_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group was made to have no weight decay, whatever that of the optimizer is."""
    if group.get("weight_decay") != 0 or len(optimizer.param_groups) == 1:
        return False
    # With an optimizer of weight decay 0 that cannot be told from the number.
    small = all(parameter.ndim <= 1 for parameter in group["params"])
    return optimizer.defaults.get("weight_decay") != 0 or small


def _checked(segment: Any) -> Segment:
    """A copy made of plain numbers, which a checkpoint without pickle can hold."""
    keys = sorted(segment) if isinstance(segment, Mapping) else []
    if keys != ["from_epoch", "values"] or not isinstance(segment["values"], Mapping):
        raise UserError(f"a segment is {segment!r}; it has from_epoch, a number, and values, by name, and nothing else")
    start = segment["from_epoch"]
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise UserError(f"from_epoch is {start!r}; it is a whole number, 0 or more")
    return {"from_epoch": start, "values": {str(name): _plain(name, v) for name, v in segment["values"].items()}}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    for kind in (int, float):  # numpy's float64 is one, and no checkpoint without pickle holds it
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    raise UserError(f"{name} is {value!r}; a segment sets numbers and lists of numbers")


def _check_value(optimizer: Optimizer, name: str, value: Any) -> None:
    for group in optimizer.param_groups:
        known = sorted(key for key in group if key not in ("params", "initial_lr") and _is_number(group[key]))
        if name not in known:
            raise UserError(f"{type(optimizer).__name__} has no {name!r} to set; known: {', '.join(known)}")
        pair = isinstance(group[name], tuple | list)
        if pair != isinstance(value, list) or (pair and len(value) != len(group[name])):
            raise UserError(f"{name} is {value!r}, but {type(optimizer).__name__} has {group[name]!r}; give the like")


def _is_number(value: Any) -> bool:
    # Switches (amsgrad, fused, …) decide what state an optimizer keeps and cannot be turned in the middle of a run.
    return isinstance(value, int | float | tuple | list | Tensor) and not isinstance(value, bool)
