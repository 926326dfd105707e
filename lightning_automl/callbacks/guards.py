"""Guards against the collapse of an architecture search: they end it, and say which epoch's architecture to take."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_automl.metrics.eigenvalue import Vector, largest_eigenvalue
from lightning_automl.models.genotype import Genotype
from lightning_automl.rundir import UserError

#: Along a vector of norm 1, from both ends of which gradients of 64 bits are taken.
_STEP = 1e-9


class Verdict(NamedTuple):
    """That a search is to end.

    Args:
        epoch: The epoch, from 0, whose architecture is the result.
        reason: A sentence without a full stop.
    """

    epoch: int
    reason: str


class SearchGuard(Callback, ABC):
    """Watches an architecture search (``DartsTask``) and ends it; a subclass says when, in :meth:`judge`.

    It is asked after each epoch in which the architecture has moved, on all ranks, and rank 0 decides. What it has seen
    and decided is a part of the checkpoint: a continued run decides as an uninterrupted one, and one that a guard has
    ended stays ended, with larger limits too.

    Attributes:
        verdict: Why the search was ended by this guard, if it was.
        seen: ``[epoch, value]`` of what the guard watches.

    Raises:
        UserError: When training starts, if the task is no architecture search.
    """

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        self.seen: list[list[float]] = []

    @abstractmethod
    def judge(self, trainer: Trainer, pl_module: LightningModule) -> Verdict | None:
        """Look at the search after an epoch, and say whether it is to end."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments, as plain numbers and texts."""

    @abstractmethod
    def state(self) -> str:
        """What has been seen in a search that was not ended by this guard: a sentence without a full stop."""

    def record(self) -> dict[str, Any]:
        """Name, settings, whether it has ended the search, and a sentence, for ``architecture.json``."""
        return {
            "name": type(self).__name__,
            "settings": self.settings(),
            "fired": self.verdict is not None,
            "sentence": self.state() if self.verdict is None else self.verdict.reason,
        }

    def state_dict(self) -> dict[str, Any]:
        """What was seen and decided."""
        return {"seen": self.seen, "verdict": None if self.verdict is None else list(self.verdict)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the run that is continued has seen and decided."""
        self.seen = state_dict["seen"]
        self.verdict = None if state_dict["verdict"] is None else Verdict(*state_dict["verdict"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a task that searches nothing, and forget a former training."""
        if stage != "fit":
            return
        if not callable(getattr(pl_module, "stop_search", None)):
            raise UserError(
                f"{type(self).__name__} watches an architecture search, and {type(pl_module).__name__} is none; use "
                "DartsTask, or leave the callback out"
            )
        self.verdict, self.seen = None, []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train no further when the run that is continued was ended."""
        if self.verdict is not None:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for a verdict, unless the architecture has not moved yet or the search is ended."""
        task: Any = pl_module
        if trainer.current_epoch < getattr(task, "warmup_epochs", 0):
            return
        verdict = trainer.strategy.broadcast(self.judge(trainer, pl_module))
        if verdict is not None and getattr(task, "chosen", None) is None:
            self.verdict = verdict
            task.stop_search(verdict.reason, verdict.epoch)

    def see(self, epoch: int, value: float) -> None:
        """Note a value; that of an epoch which was cut short and continued is replaced."""
        self.seen = [each for each in self.seen if each[0] < epoch]
        self.seen.append([epoch, value])


def checked_genotype(task: Any, genotype: object) -> Genotype:
    """The genotype that a task or its network has given, if it is one.

    Raises:
        UserError: If not.
    """
    if not isinstance(genotype, Genotype):
        raise UserError(
            f"genotype() of {type(task.model).__name__} gives {type(genotype).__name__}, where it has to give a "
            "lightning_automl.models.Genotype"
        )
    return genotype


class SkipStop(SearchGuard):
    """Ends an architecture search when a cell has too many skip connections.

    Liang et al., *DARTS+: Improved Differentiable Architecture Search with Early Stopping*, 2019,
    https://arxiv.org/abs/1909.06035 (criterion 1: two or more in the normal cell). The result is the genotype of that
    epoch, as there; when it has even more skip connections than ``skips``, it is the newest earlier one that has no
    more, if there is one. Unlike there the first epochs are not judged: the architecture of alphas that have hardly
    moved is drawn by lot, and every third lot has two skip connections.

    Args:
        skips: Number at which to stop, 1 or more.
        kind: Of which cell.
        patience: In so many epochs in a row, 1 or more.
        not_before: First epoch, counted from 0, whose genotype is judged.

    Raises:
        UserError: If an argument is out of range, and when training starts if the task is no architecture search, the
            space's genotypes are no :class:`~lightning_automl.models.Genotype`, or its own ``max_skips`` is less than
            ``skips``.
    """

    def __init__(
        self, skips: int = 2, kind: Literal["normal", "reduce"] = "normal", patience: int = 1, not_before: int = 10
    ) -> None:
        super().__init__()
        _check_least("skips", skips, 1, "skip connections")
        _check_least("patience", patience, 1, "epochs")
        _check_least("not_before", not_before, 0, "epochs")
        if kind not in ("normal", "reduce"):
            raise UserError(f"unknown kind {kind!r}; known: normal, reduce")
        self.skips = skips
        self.kind = kind
        self.patience = patience
        self.not_before = not_before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could never stop."""
        super().setup(trainer, pl_module, stage)
        task: Any = pl_module
        most = getattr(task.model, "max_skips", None)
        if stage == "fit" and most is not None and most < self.skips:
            raise UserError(
                f"SkipStop waits for {self.skips} skip connections, and max_skips={most} of the space derives fewer; "
                "raise max_skips or leave one of them out"
            )
        if stage == "fit":
            checked_genotype(task, task.model.genotype())

    def settings(self) -> dict[str, Any]:
        """The arguments."""
        return {"skips": self.skips, "kind": self.kind, "patience": self.patience, "not_before": self.not_before}

    def judge(self, trainer: Trainer, pl_module: LightningModule) -> Verdict | None:
        """Count the skip connections of the newest genotype."""
        task: Any = pl_module
        epoch = trainer.current_epoch
        self.see(epoch, task.genotype().skips(self.kind))
        newest = [count for seen, count in self.seen if seen >= self.not_before][-self.patience :]
        if len(newest) < self.patience or min(newest) < self.skips:
            return None
        within = [int(seen) for seen, count in self.seen if count <= self.skips]
        taken = within[-1] if within else epoch
        row = f" ({self.skips} or more in {self.patience} epochs in a row)" if self.patience > 1 else ""
        return Verdict(
            taken,
            f"SkipStop ended the search after epoch {epoch + 1}: {newest[-1]:.0f} skip connection"
            f"{'' if newest[-1] == 1 else 's'} in the {self.kind} cell{row}; the genotype of epoch "
            f"{taken + 1} was taken",
        )

    def state(self) -> str:
        """The most skip connections so far."""
        if not self.seen:
            return "SkipStop has judged no epoch"
        most = max(count for _, count in self.seen)
        return (
            f"SkipStop did not end the search: at most {most:.0f} skip connection{'' if most == 1 else 's'} in the "
            f"{self.kind} cell; {self.skips} from epoch {self.not_before + 1} on would have done it"
        )


class EigenvalueStop(SearchGuard):
    """Ends an architecture search when the loss becomes sharp in the architecture.

    Zela et al., *Understanding and Robustifying Differentiable Architecture Search*, ICLR 2020,
    https://arxiv.org/abs/1909.09656 (section 4.3, DARTS-ES): a network of a genotype is worse than the supernet by more
    the larger the largest eigenvalue of the Hessian of the validation loss by the alphas is, and it grows when a search
    collapses. The eigenvalue is that of the newest batch of the architecture's stream. A check is the end of each
    ``every``-th epoch; when the mean of the newest ``window`` checks exceeds ``factor`` times that of ``lag`` checks
    before, the search ends and the result is the genotype of the older check. The means look back, where the paper's
    are around a check; nothing is decided while the older one is not above 0.

    A check is some ten to thirty products of the Hessian with a vector, each by two gradients of the architecture in 64
    bits (:func:`architecture_eigenvalue`): it costs about as much as fifty steps of the search, several times that on a
    GPU that is slow in 64 bits. The value is logged as ``eigenvalue``.

    Args:
        every: Epochs from check to check, 1 or more.
        window: Checks of a mean, 1 or more.
        factor: Growth at which to stop, above 1.
        lag: Checks between the two means, 1 or more.
        not_before: First epoch, counted from 0, after which the search may end.

    Raises:
        UserError: If an argument is out of range, and when training starts if the task is no architecture search that
            has gradients of its architecture, or the device has no 64-bit numbers.
    """

    def __init__(
        self, every: int = 1, window: int = 5, factor: float = 1.3, lag: int = 4, not_before: int = 10
    ) -> None:
        super().__init__()
        for name, value in (("every", every), ("window", window), ("lag", lag)):
            _check_least(name, value, 1, "epochs" if name == "every" else "checks")
        _check_least("not_before", not_before, 0, "epochs")
        if not 1 < factor < math.inf:
            raise UserError(f"factor is {factor}; it is a growth, above 1, for example 1.3")
        self.every = every
        self.window = window
        self.factor = factor
        self.lag = lag
        self.not_before = not_before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a task whose gradients cannot be had."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not callable(getattr(pl_module, "architecture_gradient", None)):
            raise UserError(
                f"EigenvalueStop needs gradients of the architecture, and {type(pl_module).__name__} has no method "
                "architecture_gradient; use DartsTask, or leave the callback out"
            )
        if stage == "fit" and trainer.strategy.root_device.type == "mps":
            raise UserError(
                "EigenvalueStop needs numbers of 64 bits, which mps has not; train on the CPU, or leave it out"
            )

    def settings(self) -> dict[str, Any]:
        """The arguments."""
        return {
            "every": self.every,
            "window": self.window,
            "factor": self.factor,
            "lag": self.lag,
            "not_before": self.not_before,
        }

    def judge(self, trainer: Trainer, pl_module: LightningModule) -> Verdict | None:
        """Compute the eigenvalue of this epoch, if it is one to check, and look at its growth."""
        task: Any = pl_module
        epoch = trainer.current_epoch
        # of a run that was continued behind the last batch of an epoch there is no batch, and none was trained on
        if task.newest_arch_batch is None or (epoch + 1) % self.every:
            return None
        value = architecture_eigenvalue(
            task, task.newest_arch_batch, agreed=lambda ends: bool(trainer.strategy.broadcast(ends))
        )
        value = trainer.strategy.broadcast(value)
        self.see(epoch, value)
        pl_module.log("eigenvalue", value, sync_dist=True)  # equal on all ranks, of which Lightning does not know
        values = [seen for _, seen in self.seen]
        if epoch < self.not_before or not has_grown(values, self.window, self.factor, self.lag):
            return None
        now, before = _means(values, self.window, self.lag)
        taken = int(self.seen[-1 - self.lag][0])
        of = f"mean of the newest {self.window} eigenvalues" if self.window > 1 else "newest eigenvalue"
        return Verdict(
            taken,
            f"EigenvalueStop ended the search after epoch {epoch + 1}: the {of} is {now:.3g}, {now / before:.2f} times "
            f"that of {_checks(self.lag)} before; the genotype of epoch {taken + 1} was taken",
        )

    def state(self) -> str:
        """The largest growth so far."""
        values = [value for _, value in self.seen]
        ends = range(self.window + self.lag, len(values) + 1)
        means = [_means(values[:end], self.window, self.lag) for end in ends]
        growths = [now / before for now, before in means if before > 0]
        if not growths:
            needed = self.window + self.lag
            return f"EigenvalueStop did not end the search: {_checks(len(values))}, and its means need {needed}"
        return (
            f"EigenvalueStop did not end the search: the mean eigenvalue grew to at most {max(growths):.2f} times that "
            f"of {_checks(self.lag)} before; {self.factor:g} from epoch {self.not_before + 1} on would have done it"
        )


def _checks(number: int) -> str:
    return "1 check" if number == 1 else f"{number} checks"


def has_grown(values: Sequence[float], window: int = 5, factor: float = 1.3, lag: int = 4) -> bool:
    """Whether the mean of the newest ``window`` values exceeds ``factor`` times the positive one ``lag`` values before.

    Zela et al., ICLR 2020 (section 4.3), where 1 / factor is 0.75. Fewer than ``window + lag`` values have not grown.
    """
    if len(values) < window + lag:
        return False
    now, before = _means(values, window, lag)
    return before > 0 and now > factor * before


def _means(values: Sequence[float], window: int, lag: int) -> tuple[float, float]:
    end = len(values) - lag
    return fmean(values[-window:]), fmean(values[end - window : end])


def architecture_eigenvalue(task: Any, batch: Any, agreed: Any = bool, tolerance: float = 1e-2) -> float:
    """The largest eigenvalue of the Hessian of the architecture's loss of a batch by all alphas together.

    A product with the vector ``v`` of norm 1 is ``(g(alpha + h v) - g(alpha - h v)) / 2 h`` by a copy of the network in
    64 bits with so small an ``h`` that no ReLU turns on or off in between, which would count as curvature. In 32 bits
    there is no such ``h``: with the smallest that rounding allows, the eigenvalue comes out up to ten times too large.

    Args:
        task: Has ``architecture_gradient(batch)``, of the network that is its ``model`` then.
        batch: Images and labels.
        agreed: See :func:`~lightning_automl.metrics.eigenvalue.largest_eigenvalue`.
        tolerance: Likewise.
    """
    images, labels = batch
    batch = images.double(), labels
    kept = task.model, task.loss
    task.model = deepcopy(task.model).double()
    if isinstance(task.loss, nn.Module):  # it may have weights
        task.loss = deepcopy(task.loss).double()
    alphas: list[Tensor] = task.model.alphas()
    middle = [alpha.detach().clone() for alpha in alphas]
    sizes = [alpha.numel() for alpha in alphas]

    def gradient(vector: Vector, shift: float) -> Tensor:
        parts = torch.split(torch.from_numpy(vector * shift), sizes)
        with torch.no_grad():
            for alpha, own, part in zip(alphas, middle, parts, strict=True):
                alpha.copy_(own + part.view_as(own).to(own))
        found: list[Tensor] = task.architecture_gradient(batch)
        return torch.cat([part.detach().flatten() for part in found])

    def product(vector: Vector) -> Vector:
        difference = (gradient(vector, _STEP) - gradient(vector, -_STEP)) / (2 * _STEP)
        return np.asarray(difference.cpu().numpy())

    try:
        return largest_eigenvalue(product, sum(sizes), tolerance=tolerance, agreed=agreed)
    finally:
        task.model, task.loss = kept


def _check_least(name: str, value: int, least: int, of: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it is a number of {of}, {least} or more")
