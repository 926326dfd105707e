"""One rank of test_data_ddp.py: trains and validates on digits, and writes what it saw."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F

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


def fit(folder, images_of_val=None, stop=None, ckpt_path=None):
    seed_everything(1, verbose=False)
    data = DigitsDataModule(batch_size=100, base_augment="crop")
    if images_of_val is not None:
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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    import os

    results = {"whole": fit(folder), "one image": fit(folder, images_of_val=1)}
    fit(folder, stop=9)
    results["resumed"] = fit(folder, ckpt_path=folder / "stop.ckpt")
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
