import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F

from lightning_automl.augment import TrivialAugment
from lightning_automl.data import DigitsDataModule
from lightning_automl.rundir import UserError

# Lightning 2.6.6 with torch 2.14: Lightning's own code, https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


class TinyTask(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Killed(Exception):
    pass


class SaveAndKill(Callback):
    """Writes last.ckpt at some events and fails before the given train batch, counted over the run."""

    def __init__(self, path, event, every=3, kill=None):
        self.path, self.event, self.every, self.kill, self.batches = path, event, every, kill, 0

    def save(self, trainer):
        trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer, *_):
        if self.batches == self.kill:
            raise Killed
        self.batches += 1

    def on_train_batch_end(self, trainer, *_):
        if self.event == "batch" and self.batches % self.every == 0:
            self.save(trainer)

    def on_validation_end(self, trainer, *_):
        if self.event == "validation" and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_epoch_end(self, trainer, *_):
        if self.event == "epoch":
            self.save(trainer)

    def on_exception(self, trainer, *_):
        if self.event == "exception":
            self.save(trainer)


def run(tmp_path, event="none", kill=None, ckpt_path=None, epochs=3, every=3, **settings):
    seed_everything(7, verbose=False)
    # 1222 train images, 7 batches an epoch
    data = DigitsDataModule(batch_size=200, base_augment="crop_flip", train_policy=TrivialAugment())
    task = TinyTask()
    saver = SaveAndKill(tmp_path / "last.ckpt", event, every, kill)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver],
        **settings,
    )
    try:
        trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    except Killed:
        return None
    weights = torch.cat([parameter.detach().flatten() for parameter in task.parameters()])
    return weights, trainer.optimizers[0].param_groups[0]["lr"], saver.batches


@pytest.mark.parametrize("kill", [4, 8, 17])
def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one_bit_for_bit(tmp_path, kill):
    assert_resumes_exactly(tmp_path, "batch", kill)


@pytest.mark.parametrize("event", ["epoch", "validation"])
@pytest.mark.parametrize("kill", [9, 14])
def test_a_run_resumed_from_the_end_of_an_epoch_equals_an_uninterrupted_one(tmp_path, event, kill):
    assert_resumes_exactly(tmp_path, event, kill)


def test_a_run_resumed_from_the_last_batch_of_an_epoch_equals_an_uninterrupted_one(tmp_path):
    assert_resumes_exactly(tmp_path, "batch", kill=9, every=7)


def test_a_run_resumed_from_a_validation_in_mid_epoch_equals_an_uninterrupted_one(tmp_path):
    assert_resumes_exactly(tmp_path, "validation", kill=12, val_check_interval=3)


def test_a_checkpoint_written_because_a_step_failed_repeats_that_step(tmp_path):
    assert_resumes_exactly(tmp_path, "exception", kill=11)


def assert_resumes_exactly(tmp_path, event, kill, **settings):
    expected, rate, batches = run(tmp_path, **settings)
    assert batches == 3 * 7
    assert run(tmp_path, event, kill, **settings) is None
    position = torch.load(tmp_path / "last.ckpt", weights_only=True)["DigitsDataModule"]
    weights, resumed_rate, resumed_batches = run(tmp_path, ckpt_path=tmp_path / "last.ckpt", **settings)
    assert resumed_batches == batches - 7 * position["epoch"] - position["done"]
    assert resumed_rate == rate
    assert torch.equal(weights, expected)


def test_a_finished_run_goes_on_with_more_epochs_as_if_it_had_never_ended(tmp_path):
    expected, _, _ = run(tmp_path)
    run(tmp_path, "epoch", epochs=2)
    weights, _, batches = run(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert batches == 7
    assert torch.equal(weights, expected)


def test_a_second_fit_without_a_checkpoint_starts_at_the_beginning():
    data = DigitsDataModule(batch_size=200)
    data.load_state_dict({"epoch": 2, "done": 3})
    assert len(list(data.train_dataloader())) == 4
    data.setup("fit")
    assert data.state_dict() == {"epoch": 0, "done": 0}
    assert len(list(data.train_dataloader())) == 7


def test_a_position_behind_the_end_of_the_epoch_is_refused():
    data = DigitsDataModule(batch_size=600)
    data.setup("fit")
    data.load_state_dict({"epoch": 0, "done": 5})
    with pytest.raises(UserError, match="written after 5 batches of an epoch that has 3 now; resume with the batch"):
        data.train_dataloader()
