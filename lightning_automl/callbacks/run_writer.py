"""Keeps a run directory up to date while a trainer fits: checkpoints, metrics, pictures."""

import csv
import io
import logging
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from lightning_automl.callbacks.records import policy_record, write_data_record, write_predictions
from lightning_automl.rundir import UserError, replacing, write_json, write_text

log = logging.getLogger(__name__)

Mode = Literal["min", "max"]


def mode_of(monitor: str) -> Mode:
    """Whether a metric is to be made small or large, from its name: losses and errors small, all else large."""
    return "min" if monitor.endswith(("loss", "error")) else "max"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so that a killed run leaves the old one or the new one.

    Lightning writes to the system's temporary directory first; on another file system the move is a copy, and a kill in
    the middle of it leaves a checkpoint that cannot be read.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path`` atomically.

        Raises:
            DiskFullError: If no space is left; an older file at ``path`` stays.
        """
        with replacing(Path(path)) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)


class RunWriter(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` after each epoch, ``best.ckpt`` by the monitored metric, and ``metrics.csv``.

    ``last.ckpt`` is always the newest whole checkpoint; ``best.ckpt`` is the same file as the ``last.ckpt`` of its
    epoch (a hard link, so that it costs nothing); of equal epochs, which a small validation split has often, it is the
    latest. The rows of ``metrics.csv`` are a part of the checkpoint, so that a continued run has each epoch once.
    ``predictions_val.safetensors`` are those of the best epoch, ``predictions_test.safetensors`` those of a test, and
    ``data.json`` what the run knows of its images and ``policy.json`` the image policy that it is trained with. Of a
    task that trains a part of its network only, the frozen rest is kept once in ``checkpoints/base.safetensors`` (its
    method ``save_base``), and the adapter of the best epoch follows at the end in ``adapter`` (``save_adapter``).
    ``curves.png`` and ``confusion_<split>.png`` follow at the end.

    Args:
        directory: The run directory.
        monitor: Metric that decides about the best epoch; without a validation loop the last epoch is the best.
        mode: Whether it is to be ``min`` or ``max``; by its name when left out (see :func:`mode_of`).
        every_n_steps: Write ``last.ckpt`` also after so many optimizer steps of an epoch.

    Raises:
        UserError: After the first epoch, if nothing logs ``monitor``.
    """

    def __init__(
        self,
        directory: str | Path,
        monitor: str = "val_accuracy",
        mode: Mode | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.monitor = monitor
        self.mode: Mode = mode or mode_of(monitor)
        self.every_n_steps = every_n_steps
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self._is_best = False  # whether the newest checkpoint is that of the best epoch
        self._validated = False
        self._epoch_started = time.monotonic()

    @property
    def last_checkpoint(self) -> Path:
        """The newest whole checkpoint."""
        return self.directory / "checkpoints" / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the epoch with the best monitored metric."""
        return self.directory / "checkpoints" / "best.ckpt"

    @property
    def base(self) -> Path:
        """What a task has frozen of its network; there is no such file if that is nothing."""
        return self.directory / "checkpoints" / "base.safetensors"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the frozen part of the network, before a precision may change it."""
        save = getattr(pl_module, "save_base", None)
        if stage == "fit" and save is not None and trainer.is_global_zero and not self.last_checkpoint.exists():
            self.base.unlink(missing_ok=True)  # of a first command that trained something else
            save(self.base)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, the best of them, and whether it is this checkpoint's."""
        return {"rows": self.rows, "best": self.best, "is_best": self._is_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of the run that is continued."""
        self.rows, self.best, self._is_best = state_dict["rows"], state_dict["best"], state_dict["is_best"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down what the data are, and what a kill after the last checkpoint has kept from being written.

        Here and not when training starts, which it does not when the last epoch was done.
        """
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            write_data_record(self.directory / "data.json", data)
            policy = policy_record(data)
            if policy is not None:
                write_json(self.directory / "policy.json", policy)
            elif not self.last_checkpoint.exists():
                (self.directory / "policy.json").unlink(missing_ok=True)  # of a first command that was corrected
            if self._is_best and self.last_checkpoint.exists():
                _link(self.last_checkpoint, self.best_checkpoint)
            if self.rows:
                self._write_table()
        trainer.strategy.barrier()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time."""
        self._epoch_started = time.monotonic()
        self._validated = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write a checkpoint within the epoch when asked to."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # gradients are not in a checkpoint; a task with optimization of its own may accumulate them itself
        accumulated = max(trainer.accumulate_grad_batches, int(getattr(pl_module, "accumulate", 1)))
        batches = (self.every_n_steps or 0) * accumulated
        if batches and progress.current.ready % batches == 0 and not progress.is_last_batch:
            self._is_best = False
            trainer.save_checkpoint(self.last_checkpoint, weights_only=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the monitored metric is fresh; within an epoch (``val_check_interval``) judge it at once."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = True
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row, the last checkpoint and, if it is the best so far, the best."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = self._row(trainer)
        if self.rows and self.rows[-1]["epoch"] == row["epoch"]:
            self.rows[-1] = self.rows[-1] | row
        else:
            self.rows.append(row)
        judged = self._validated or not trainer.enable_validation
        self._is_best = better = judged and self._is_better(row, trainer.enable_validation)
        self._validated = False
        if better:
            self.best = self.rows[-1]
            # Before the checkpoint: a run killed in between repeats the epoch and writes the same predictions again.
            self._write_predictions(trainer, pl_module, "val")
        trainer.save_checkpoint(self.last_checkpoint, weights_only=False)
        if trainer.is_global_zero:
            if better:
                _link(self.last_checkpoint, self.best_checkpoint)
            self._write_table()
            log.info("%s", self._sentence(trainer))
        if judged and trainer.enable_validation and self.monitor not in row:
            known = ", ".join(sorted(name for name in row if "_" in name))
            task = type(pl_module).__name__
            raise UserError(f"monitor {self.monitor!r} is not logged by {task}; logged are: {known}")

    def _row(self, trainer: Trainer) -> dict[str, float]:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not self._validated:  # callback_metrics still holds those of an earlier epoch
            metrics = {name: value for name, value in metrics.items() if not name.startswith("val_")}
        rates = {
            f"lr_{number}" if number else "lr": group["lr"]
            for number, group in enumerate(
                group for optimizer in trainer.optimizers for group in optimizer.param_groups
            )
        }
        return {
            "epoch": trainer.current_epoch,
            # Lightning's global_step counts the steps of all optimizers, and so does not number batches.
            "step": trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            **{name: float(rate) for name, rate in rates.items()},
            **metrics,
            "seconds": round(time.monotonic() - self._epoch_started, 3),
        }

    def _is_better(self, row: dict[str, float], validated: bool) -> bool:
        if self.best is None or not validated:
            return True
        if self.monitor not in row or row[self.monitor] != row[self.monitor]:
            return False
        best = self.best.get(self.monitor, float("nan"))
        if best != best:
            return True
        return row[self.monitor] <= best if self.mode == "min" else row[self.monitor] >= best

    def _write_table(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.directory / "metrics.csv", text.getvalue())

    def _sentence(self, trainer: Trainer) -> str:
        row = self.rows[-1]
        shown = ("train_loss", "val_loss", "val_accuracy", self.monitor)
        values = " ".join(f"{name} {row[name]:.4f}" for name in dict.fromkeys(shown) if name in row)
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        best = f", best {self.best[self.monitor]:.4f}" if self.best and self.monitor in self.best else ""
        left = ""
        if epochs:
            typical = sorted(each["seconds"] for each in self.rows)[len(self.rows) // 2]
            left = f", about {timedelta(seconds=round(typical * (epochs - row['epoch'] - 1)))} left"
        return f"epoch {row['epoch'] + 1:.0f}/{epochs or '?'}: {values}{best} ({row['seconds']:.1f} s{left})"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves and the confusion matrix of the last validation."""
        trainer.strategy.barrier()  # other ranks may go on to test the best checkpoint: rank 0 has linked it by now
        if trainer.is_global_zero and self.rows:
            from lightning_automl.plots import learning_curves

            with replacing(self.directory / "curves.png") as path:
                learning_curves(self.rows).savefig(path, dpi=150, format="png")
            self._write_adapter(pl_module)
        self._draw_confusion(trainer, pl_module, "val")

    def _write_adapter(self, pl_module: LightningModule) -> None:
        save = getattr(pl_module, "save_adapter", None)
        if save is None or not self.best_checkpoint.exists():
            return
        checkpoint = torch.load(self.best_checkpoint, map_location="cpu", weights_only=True)
        path = save(self.directory / "adapter", checkpoint["state_dict"])
        if path is not None:
            size = sum(file.stat().st_size for file in path.iterdir())
            log.info("%s: the adapter of the best epoch, %.2f MB", path, size / 1e6)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the predictions of the test split and draw its confusion matrix."""
        self._write_predictions(trainer, pl_module, "test")
        self._draw_confusion(trainer, pl_module, "test")

    def _write_predictions(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        found = getattr(pl_module, "predictions", None)
        if isinstance(found, dict) and split in found and trainer.is_global_zero:
            # The weights are those of the newest row: at a test, a part of the checkpoint that was loaded.
            weights = {name: f"{self.rows[-1][name]:.0f}" for name in ("epoch", "step")} if self.rows else {}
            path = self.directory / f"predictions_{split}.safetensors"
            write_predictions(path, trainer, split, found[split], weights)

    def _draw_confusion(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found = getattr(pl_module, "confusion", None)
        if not isinstance(found, dict) or stage not in found or not trainer.is_global_zero:
            return
        counts = found[stage]
        from lightning_automl.plots import confusion_matrix

        names = getattr(trainer.datamodule, "class_names", None) or [str(index) for index in range(len(counts))]  # type: ignore[attr-defined]  # set by Trainer.fit
        with replacing(self.directory / f"confusion_{stage}.png") as path:
            confusion_matrix(counts.cpu().numpy(), names).savefig(path, dpi=150, format="png")


def _link(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return  # renaming one name of a file to another of its names does nothing and leaves both
    with replacing(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, partial)
