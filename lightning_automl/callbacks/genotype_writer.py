"""Keeps the architectures of a search: ``genotype.json``, its drawing, and ``architecture.json`` of all epochs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_automl.callbacks.guards import EigenvalueStop, SearchGuard, checked_genotype
from lightning_automl.models.genotype import Genotype, Kind
from lightning_automl.rundir import write_json

log = logging.getLogger(__name__)

DRAWINGS = ("genotype.svg", "genotype.png")
#: What is written, the result first.
FILES = ("genotype.json", *DRAWINGS, "architecture.json")

_KINDS: tuple[Kind, ...] = ("normal", "reduce")


class GenotypeWriter(Checkpoint):
    """Writes the architectures of a search into its run directory, for any network that is a ``Supernet``.

    After each epoch ``genotype.json`` is the result so far: that of the newest epoch, or of the epoch which a guard has
    chosen when it ended the search. ``architecture.json`` is the whole search: of each epoch (from 0) the genotype, its
    skip connections and, as far as the network and the task have them, the strengths of all operations and their mean
    entropy (in nats), the expected cost and that of the genotype, the eigenvalue of :class:`EigenvalueStop` and the
    accuracies; beside them the ``operations``, the ``edges`` that the strengths belong to, the ``chosen`` epoch and
    what the ``guards`` say. The drawing follows at the end, as ``genotype.svg`` and ``genotype.png``: a report draws
    that of a run which has not come so far.

    The epochs are a part of the checkpoint, so that a continued run has each once. (It is a ``Checkpoint`` only so that
    Lightning calls it when the task has logged the epoch.) Other networks leave nothing.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.epochs: list[dict[str, Any]] = []
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the epochs of the run that is continued."""
        self.epochs = list(state_dict["epochs"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a former training."""
        if stage == "fit":
            self.epochs, self._validated = [], False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the files to the state of the checkpoint: a kill may have come before or behind them."""
        task: Any = pl_module
        checked_genotype(task, task.model.genotype())  # before an epoch is trained for nothing
        if not trainer.is_global_zero:
            return
        still, last = getattr(pl_module, "warmup_epochs", 0), trainer.max_epochs
        if last is not None and 0 < last <= still:
            log.warning(
                "warmup_epochs is %s, and the search ends after epoch %s: its alphas never move, and the genotype is "
                "drawn by lot; search for more epochs, or set warmup_epochs lower",
                still,
                last,
            )
        # drawings of a search that has grown, everything of a first command that was corrected
        for name in DRAWINGS if self.epochs else FILES:
            (self.directory / name).unlink(missing_ok=True)
        if self.epochs:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the accuracy of validation is fresh."""
        self._validated = not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch and write it; one that was cut short and is continued is replaced."""
        epoch = trainer.current_epoch
        before = self.epochs[-1] if self.epochs and self.epochs[-1]["epoch"] == epoch else {}
        self.epochs = [each for each in self.epochs if each["epoch"] < epoch]
        self.epochs.append(before | self._row(trainer, pl_module))
        self._validated = False
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def _row(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        task: Any = pl_module
        genotype = _genotype(task)
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "genotype": genotype.to_dict(),
            "skips": {kind: genotype.skips(kind) for kind in _KINDS if genotype.nodes(kind)},
        }
        with torch.no_grad():
            if callable(getattr(task.model, "strengths", None)):
                strengths = {kind: each.detach().double().cpu() for kind, each in task.model.strengths().items()}
                row["strengths"] = {kind: _rounded(each) for kind, each in strengths.items()}
                row["entropy"] = {kind: _entropy(each) for kind, each in strengths.items()}
            cost = getattr(task, "cost", None)
            if cost is not None:
                row["cost"] = {
                    "expected": float(cost.expected(task.model)),
                    "genotype": float(cost.of_genotype(task.model, genotype)),
                    "unit": str(cost.unit),
                }
        for guard in _guards(trainer):
            if isinstance(guard, EigenvalueStop):
                row["eigenvalue"] = next((value for epoch, value in guard.seen if epoch == trainer.current_epoch), None)
        for stage in ("train", "arch", *(("val",) if self._validated else ())):
            value = trainer.callback_metrics.get(f"{stage}_accuracy")
            if value is not None:
                row[f"{stage}_accuracy"] = float(value)
        return row

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task: Any = pl_module
        chosen, reason = self.chosen(task)
        record: dict[str, Any] = {"version": 1}
        if hasattr(task.model, "operations"):
            record["operations"] = list(task.model.operations)
        if isinstance(getattr(task.model, "edges", None), Mapping):
            record["edges"] = {
                kind: {"sources": list(each.sources), "targets": list(each.targets), "inputs": each.inputs}
                for kind, each in task.model.edges.items()
            }
        record["epochs"] = self.epochs
        record["chosen"] = {"epoch": chosen["epoch"], "reason": reason}
        record["guards"] = [*_own_guards(task), *(guard.record() for guard in _guards(trainer))]
        write_json(self.directory / "architecture.json", record)
        write_json(self.directory / "genotype.json", chosen["genotype"])

    def chosen(self, task: Any) -> tuple[dict[str, Any], str]:
        """The epoch whose genotype is the result so far, and why."""
        verdict = getattr(task, "chosen", None)
        if verdict is not None:
            for each in self.epochs:
                if each["epoch"] == verdict[0]:
                    return each, verdict[1]
        return self.epochs[-1], "the last epoch"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the result, and say where it is and of which epoch."""
        if not (trainer.is_global_zero and self.epochs):
            return
        from lightning_automl.plots import write_genotype

        chosen, reason = self.chosen(pl_module)
        genotype = Genotype.from_dict(chosen["genotype"])
        for name in DRAWINGS:
            write_genotype(genotype, self.directory / name)
        stopped = getattr(pl_module, "chosen", None) is not None
        what = reason if stopped else f"the genotype of epoch {chosen['epoch'] + 1}, {reason}"
        log.info("%s: %s", self.directory / "genotype.json", what)


def _genotype(task: Any) -> Genotype:
    own = getattr(task, "genotype", None)  # within the limits that the task sets
    return checked_genotype(task, own() if callable(own) else task.model.genotype())


def _guards(trainer: Trainer) -> list[SearchGuard]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Trainer.__init__
    return [each for each in callbacks if isinstance(each, SearchGuard)]


def _own_guards(task: Any) -> list[dict[str, Any]]:
    """The guards that are settings of the task and of the space, not callbacks."""
    found = []
    epochs = getattr(task, "warmup_epochs", 0)
    if epochs:
        sentence = f"the alphas stay as they are in the first {epochs} epoch{'' if epochs == 1 else 's'}"
        found.append({"name": "warm-up", "settings": {"warmup_epochs": epochs}, "fired": False, "sentence": sentence})
    most = getattr(task.model, "max_skips", None)
    if most is not None:
        sentence = f"a derived cell has at most {most} skip connection{'' if most == 1 else 's'}"
        found.append({"name": "max_skips", "settings": {"max_skips": most}, "fired": False, "sentence": sentence})
    return found


def _rounded(strengths: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in strengths.tolist()]


def _entropy(strengths: Tensor) -> float:
    """Mean entropy, in nats, of the operations ``(E, O)`` of an edge, whatever the edges count beside each other."""
    shares = strengths / strengths.sum(-1, keepdim=True).clamp_min(1e-30)
    return float(torch.special.entr(shares).sum(-1).mean())
