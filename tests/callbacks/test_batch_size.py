import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from scripted_search import ScriptedSpace, ScriptedTask, search
from torch import nn

from lightning_automl.callbacks import BatchSizeProbe
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import TunableCNN
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask


class Greedy(nn.Module):
    """A network on a device with room for ``room`` images."""

    def __init__(self, room):
        super().__init__()
        self.room = room
        self.inner = TunableCNN(10, in_channels=1, image_size=8, filters=[8], units=[16])
        self.sizes = []

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        self.sizes.append(len(images))
        return self.inner(images)


class CountSteps(Callback):
    steps = 0

    def on_before_optimizer_step(self, *_):
        self.steps += 1


def fit(room, probe, callbacks=(), **arguments):
    seed_everything(0, verbose=False)
    task = ClassificationTask(Greedy(room), 10)
    data = DigitsDataModule(batch_size="auto")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[probe, *callbacks], **quiet)
    trainer.fit(task, data, **arguments)
    return trainer, task, data


def test_the_batch_is_halved_until_it_fits_and_a_step_sees_as_many_images(caplog):
    probe, count = BatchSizeProbe(), CountSteps()
    with caplog.at_level("INFO"):
        trainer, task, data = fit(40, probe, [count])
    assert (data.device_batch_size, trainer.accumulate_grad_batches) == (32, 4)
    assert max(task.model.sizes[1:]) <= 32
    images = len(data.dataset("train"))
    assert count.steps == pytest.approx(images / 128, abs=1)
    assert "a batch of 128 does not fit in memory: batches of 32 with gradients accumulated over 4" in caplog.text


def test_a_batch_that_fits_is_left_alone():
    trainer, _task, data = fit(128, BatchSizeProbe())
    assert (data.device_batch_size, trainer.accumulate_grad_batches) == (128, 1)


def test_probing_leaves_no_trace():
    outcomes = []
    for probe in (BatchSizeProbe(), Callback()):
        _trainer, task, _data = fit(128, probe)
        outcomes.append(task.state_dict())
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[1])


def test_a_continued_run_keeps_its_batches(tmp_path):
    trainer, _, _ = fit(40, BatchSizeProbe())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    probe = BatchSizeProbe()
    trainer, _, data = fit(128, probe, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert (data.device_batch_size, trainer.accumulate_grad_batches) == (32, 4)


def test_no_room_for_one_image_is_told():
    with pytest.raises(UserError, match="not even one image fits in memory"):
        fit(0, BatchSizeProbe())


def test_another_error_is_not_taken_for_a_lack_of_memory():
    class Broken(Greedy):
        def forward(self, images):
            raise RuntimeError("shapes cannot be multiplied")

    task = ClassificationTask(Broken(1), 10)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Trainer(max_epochs=1, accelerator="cpu", callbacks=[BatchSizeProbe()], **quiet).fit(
            task, DigitsDataModule(batch_size="auto")
        )


def test_a_search_is_told_how_many_batches_a_step_takes():
    class Limited(ScriptedSpace):
        def forward(self, images):
            if len(images) > 40:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
            return super().forward(images)

    task, probe = ScriptedTask(model=Limited(), accumulate=2), BatchSizeProbe()
    data = DigitsDataModule(batch_size="auto", arch_fraction=0.5)
    trainer = search(task, [probe], data=data, max_epochs=1, limit_train_batches=1.0)
    assert (data.device_batch_size, task.accumulate, trainer.accumulate_grad_batches) == (32, 2 * 4, 1)
    batches = trainer.num_training_batches
    assert batches == -(-len(data.stream_rows["train"]) // 32)
    assert trainer.global_step == -(-batches // 8)


def test_a_network_with_further_outputs_in_training_is_probed_too():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Greedy(40)

        def forward(self, images):
            logits = self.inner(images)
            return (logits, logits) if self.training else logits

    task, probe, data = ClassificationTask(Several(), 10), BatchSizeProbe(), DigitsDataModule(batch_size="auto")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[probe], **quiet).fit(task, data)
    assert probe.device_batch_size == 32
