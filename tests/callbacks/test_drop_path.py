import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_automl.callbacks import DropPathSchedule
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import GenotypeNetwork, ResNet
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def task():
    torch.manual_seed(0)
    return ClassificationTask(GenotypeNetwork(10, in_channels=1, channels=2, cells=3), 10)


class Watch(Callback):
    """Collects the epoch and the probability of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, pl_module.model.drop_path))


def fit(trained, *callbacks, checkpoint=None, **arguments):
    arguments = {"max_epochs": 4, "limit_train_batches": 2, "limit_val_batches": 0, "accelerator": "cpu"} | arguments
    trainer = Trainer(callbacks=list(callbacks), **arguments, **QUIET)
    trainer.fit(trained, DigitsDataModule(batch_size=16), ckpt_path=checkpoint, weights_only=True)
    return trainer


def test_the_probability_grows_linearly_with_the_epochs():
    watch = Watch()
    fit(task(), DropPathSchedule(0.2), watch)
    assert watch.seen == [(epoch, pytest.approx(0.2 * epoch / 4)) for epoch in range(4) for _ in range(2)]


def test_it_grows_over_the_given_epochs_and_stays():
    watch = Watch()
    fit(task(), DropPathSchedule(0.4, epochs=2), watch, max_epochs=-1, max_steps=8)
    assert watch.seen == [(epoch, pytest.approx(min(0.4, 0.2 * epoch))) for epoch in range(4) for _ in range(2)]


class Save(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


@pytest.mark.parametrize("step", [5, 6])
def test_a_continued_run_has_the_probability_of_its_epoch_also_within_one(tmp_path, step):
    fit(task(), DropPathSchedule(0.2), Save(tmp_path / "a.ckpt", step))
    watch = Watch()
    fit(task(), DropPathSchedule(0.2), watch, checkpoint=str(tmp_path / "a.ckpt"))
    whole = [(epoch, pytest.approx(0.2 * epoch / 4)) for epoch in range(4) for _ in range(2)]
    assert watch.seen == whole[step:]


def test_weights_are_averaged_beside_it():
    trained = task()
    average = EMAWeightAveraging(decay=0.5)
    fit(trained, DropPathSchedule(0.2), average)
    assert trained.model.drop_path == pytest.approx(0.15)
    images = torch.rand(2, 1, 8, 8)
    averaged = average._average_model.module.eval()
    assert torch.equal(averaged(images), averaged(images))


def test_a_network_without_drop_path_is_refused():
    with pytest.raises(UserError, match="ResNet has no drop_path to schedule"):
        fit(ClassificationTask(ResNet(10, in_channels=1, depth=8), 10), DropPathSchedule())


def test_a_run_of_unknown_length_needs_epochs():
    with pytest.raises(UserError, match="length of the run; give it epochs"):
        fit(task(), DropPathSchedule(), max_epochs=-1, max_steps=2)


@pytest.mark.parametrize("arguments", [{"maximum": 1.0}, {"maximum": -0.1}, {"epochs": 0}], ids=str)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DropPathSchedule(**arguments)
