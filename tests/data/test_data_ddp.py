"""The two ranks of these tests run this file as a script."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from two_ranks import part, run_twice

from lightning_automl.augment import TrivialAugment
from lightning_automl.data import DigitsDataModule


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        # BatchNorm has buffers, which DDP sends around before the first validation batch
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))
        self.train_sizes, self.seen, self.correct = [], [], []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.train_sizes.append(len(labels))
        return F.cross_entropy(self.model(images), labels)

    def on_validation_epoch_start(self):
        self.seen.clear()

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append(images.flatten(1))
        self.correct.append(self.model(images).argmax(1) == labels)

    def on_validation_epoch_end(self):
        total = torch.tensor(sum(map(len, self.seen)))
        self.total = int(self.trainer.strategy.reduce(total, reduce_op="sum"))  # every rank must come here

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Stop(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def fit(folder, images_of_val, stop=None, ckpt_path=None):
    seed_everything(1, verbose=False)
    data = DigitsDataModule(batch_size=100, base_augment="crop", train_policy=TrivialAugment())
    data.split_rows["val"] = data.split_rows["val"][:images_of_val]
    task = Task()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if stop is None else [Stop(folder / "stop.ckpt", stop)],
    )
    try:
        trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    except InterruptedError:
        return None
    return {
        "seen": torch.cat(task.seen),
        "total": task.total,
        "train_sizes": task.train_sizes,
        "weights": torch.cat([parameter.detach().flatten() for parameter in task.parameters()]),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks under gloo, started as torchrun starts them, saw."""
    folder = tmp_path_factory.mktemp("ranks")
    run_twice(__file__, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_ranks_validate_every_image_once(ranks):
    data = DigitsDataModule()
    expected = torch.from_numpy(data.pixels[data.split_rows["val"][:215]]).flatten(1).float() / 255
    seen = torch.cat([rank["whole"]["seen"] for rank in ranks])
    assert sorted(map(bytes, seen.numpy())) == sorted(map(bytes, expected.numpy()))
    assert [len(rank["whole"]["seen"]) for rank in ranks] == [108, 107]
    assert [rank["whole"]["total"] for rank in ranks] == [len(expected)] * 2


def test_a_rank_without_images_takes_part_in_validation(ranks):
    assert [len(rank["one image"]["seen"]) for rank in ranks] == [1, 0]
    assert [rank["one image"]["total"] for rank in ranks] == [1, 1]


def test_two_ranks_train_on_equal_shares(ranks):
    images = len(DigitsDataModule().split_rows["train"])
    sizes = [rank["whole"]["train_sizes"] for rank in ranks]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 2 * 7
    assert sum(sizes[0]) == 2 * (images // 2)


def test_two_ranks_resume_bit_for_bit(ranks):
    for rank in ranks:
        assert len(rank["resumed"]["train_sizes"]) == 14 - 9
        assert torch.equal(rank["resumed"]["weights"], rank["whole"]["weights"])
    assert torch.equal(ranks[0]["whole"]["weights"], ranks[1]["whole"]["weights"])


if __name__ == "__main__":
    folder = Path.cwd()
    results = {"whole": fit(folder, images_of_val=215), "one image": fit(folder, images_of_val=1)}
    fit(folder, images_of_val=215, stop=9)
    results["resumed"] = fit(folder, images_of_val=215, ckpt_path=folder / "stop.ckpt")
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    part()
