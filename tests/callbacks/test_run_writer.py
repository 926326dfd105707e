import csv
import os

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from scripted_search import ScriptedTask, search

from lightning_automl.callbacks import AtomicCheckpointIO, RunWriter, mode_of
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import TunableCNN
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask


class Scripted(ClassificationTask):
    """Validates with given numbers."""

    def __init__(self, numbers):
        super().__init__(TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[8]), 10)
        self.numbers = numbers

    def log_stage(self, stage):
        if stage == "val":
            self.log("val_accuracy", torch.tensor(self.numbers[self.current_epoch]))


def fit(directory, numbers, writer=None, others=(), **arguments):
    writer = writer or RunWriter(directory)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=len(numbers),
        limit_train_batches=2,
        limit_val_batches=1,
        accelerator="cpu",
        callbacks=[writer, *others],
        plugins=[AtomicCheckpointIO()],
        **quiet,
        **arguments,
    )
    last = writer.last_checkpoint
    trainer.fit(Scripted(numbers), DigitsDataModule(), ckpt_path=last if last.exists() else None, weights_only=True)
    return writer


def epoch_of(path):
    return torch.load(path, weights_only=True)["epoch"]


@pytest.mark.parametrize(
    ("numbers", "mode", "best"),
    [
        ([0.1, 0.9, 0.5], None, 1),
        ([0.1, 0.9, 0.5], "min", 0),
        ([0.5, 0.9, 0.9], None, 2),
        ([float("nan"), 0.3, float("nan")], None, 1),
        ([0.4, float("nan"), 0.2], None, 0),
    ],
)
def test_the_best_checkpoint_is_that_of_the_best_epoch(numbers, mode, best, tmp_path):
    writer = fit(tmp_path, numbers, RunWriter(tmp_path, mode=mode))
    assert epoch_of(writer.best_checkpoint) == best
    assert epoch_of(writer.last_checkpoint) == len(numbers) - 1
    assert writer.best["epoch"] == best


def test_the_best_checkpoint_costs_nothing_and_survives_the_next_epoch(tmp_path):
    writer = fit(tmp_path, [0.1, 0.9])
    assert writer.best_checkpoint.samefile(writer.last_checkpoint)
    fit(tmp_path, [0.1, 0.9, 0.2])
    assert not writer.best_checkpoint.samefile(writer.last_checkpoint)
    assert epoch_of(writer.best_checkpoint) == 1


def test_a_kill_between_last_and_best_is_mended(tmp_path):
    writer = fit(tmp_path, [0.1, 0.9])
    os.unlink(writer.best_checkpoint)
    fit(tmp_path, [0.1, 0.9, 0.2])
    assert epoch_of(writer.best_checkpoint) == 1


class StopWithin(Callback):
    """Fails within the second epoch, after a checkpoint was written there."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise InterruptedError


def test_a_kill_within_an_epoch_leaves_the_best_checkpoint_alone(tmp_path):
    with pytest.raises(InterruptedError):
        fit(tmp_path, [0.9, 0.1], RunWriter(tmp_path, every_n_steps=1), others=[StopWithin()])
    best = (tmp_path / "checkpoints/best.ckpt").read_bytes()
    assert epoch_of(tmp_path / "checkpoints/last.ckpt") == 1
    writer = fit(tmp_path, [0.9, 0.1], RunWriter(tmp_path, every_n_steps=1))
    assert writer.best_checkpoint.read_bytes() == best
    assert [row["epoch"] for row in writer.rows] == [0, 1]


def test_a_continued_table_has_each_epoch_once(tmp_path):
    fit(tmp_path, [0.1, 0.9])
    fit(tmp_path, [0.1, 0.9, 0.2, 0.3])
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row["val_accuracy"]) for row in rows] == pytest.approx([0.1, 0.9, 0.2, 0.3])
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]


def test_epochs_without_validation_are_not_judged(tmp_path):
    writer = fit(tmp_path, [0.0, 0.9, 0.0, 0.2], check_val_every_n_epoch=2)
    assert [row.get("val_accuracy") for row in writer.rows] == [None, pytest.approx(0.9), None, pytest.approx(0.2)]
    assert epoch_of(writer.best_checkpoint) == 1


def test_validation_within_an_epoch_is_judged_at_once(tmp_path):
    writer = fit(tmp_path, [0.3, 0.9], val_check_interval=1)
    assert epoch_of(writer.best_checkpoint) == 1
    assert len(writer.rows) == 2


def test_a_metric_that_nobody_logs_is_named_with_those_that_are(tmp_path):
    with pytest.raises(UserError, match="monitor 'val_auroc' is not logged by Scripted; logged are: val_accuracy"):
        fit(tmp_path, [0.1], RunWriter(tmp_path, monitor="val_auroc"))
    assert (tmp_path / "checkpoints/last.ckpt").exists()


@pytest.mark.parametrize(
    ("monitor", "mode"), [("val_loss", "min"), ("val_calibration_error", "min"), ("val_accuracy", "max")]
)
def test_the_name_of_a_metric_says_what_is_better(monitor, mode):
    assert mode_of(monitor) == mode


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"a": torch.ones(3)}, path)

    class Unwritable:
        def __reduce__(self):
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        plugin.save_checkpoint({"b": torch.ones(10000), "c": Unwritable()}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_checkpoint_within_an_epoch_waits_for_the_batches_that_a_task_accumulates(tmp_path):
    class Look(Callback):
        seen = ()

        def on_train_batch_start(self, *_):
            self.seen += ((tmp_path / "checkpoints/last.ckpt").exists(),)

    look = Look()
    search(
        ScriptedTask(accumulate=2), [look, RunWriter(tmp_path, every_n_steps=1)], max_epochs=1, limit_train_batches=4
    )
    assert look.seen == (False, False, True, True)
