"""One way to train the network of the benchmark, in a process that trains one epoch whenever a line on stdin says so.

``python -m benchmarks.training_overhead.variants VARIANT FILE STEPS DIRECTORY``; ``run`` starts these processes. Each
answers with one line of JSON when it is ready for an epoch, and after ``go`` or ``profile`` with one about that epoch.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 128
CLASSES = 100
EPOCHS = 100_000  # as in fit.yaml: no epoch is the last
MOST_OPERATIONS = 20


def main() -> None:
    variant, path, steps, directory = sys.argv[1:]
    VARIANTS[variant](Path(path), int(steps), Path(directory))


class Epochs:
    """Waits for a word on stdin before each epoch, and answers on stdout with what it took.

    Args:
        facts: What to say of this process in its first answer.
    """

    def __init__(self, **facts: Any) -> None:
        self.answer: dict[str, Any] = facts | {"torch_threads": torch.get_num_threads()}
        self.profiler: Any = None
        self.batches = 0
        self.started = self.last_batch = 0.0

    def wait(self) -> None:
        """Answer about the epoch that is over, and wait for the word to begin the next."""
        if self.started:
            now = time.perf_counter()
            self.answer["loop_seconds"] = self.last_batch - self.started
            self.answer["epoch_seconds"] = now - self.started
            self.answer["steps"] = self.batches
            self.answer["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(json.dumps(self.answer), flush=True)
        word = sys.stdin.readline().strip()
        if not word:
            raise SystemExit  # lets Lightning end its worker processes
        self.answer, self.batches = {}, 0
        self.profiler = None
        if word == "profile":
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()
        self.started = time.perf_counter()

    def batch_is_done(self, last: bool) -> None:
        """Take the time after each batch, and end the profile after the last one of an epoch."""
        self.last_batch = time.perf_counter()
        self.batches += 1
        if last and self.profiler is not None:
            self.profiler.stop()
            self.answer["profile"] = operations(self.profiler, self.batches)


class Pace(pl.Callback):
    """:class:`Epochs` for a trainer: one epoch a word."""

    def __init__(self) -> None:
        self.epochs: Epochs | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer and wait; hence a whole epoch is the time from one of these hooks to the next."""
        if self.epochs is None:
            self.epochs = Epochs(precision=str(trainer.precision))
        self.epochs.wait()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Take the time."""
        assert self.epochs is not None
        self.epochs.batch_is_done(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def operations(profiler: Any, steps: int) -> list[dict[str, Any]]:
    """The operations with the most self CPU time, in milliseconds a step."""
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operation": event.key,
            "self_ms_per_step": round(event.self_cpu_time_total / 1000 / steps, 4),
            "share": round(event.self_cpu_time_total / total, 4),
            "calls_per_step": event.count / steps,
        }
        for event in events[:MOST_OPERATIONS]
    ]


def fit(path: Path, steps: int, directory: Path, *arguments: str, keep_memory: bool = True) -> None:
    """The command itself, with a callback that waits between the epochs; the file decides about the steps."""
    from lightning_automl import cli
    from lightning_automl.__main__ import main

    if not keep_memory:
        cli.keep_freed_memory = lambda: None
    command = ["fit", "--config", str(Path(__file__).with_name("fit.yaml")), "--dir", str(directory)]
    pace = "benchmarks.training_overhead.variants.Pace"
    sys.exit(main([*command, f"--data.init_args.path={path}", f"--trainer.callbacks={pace}", *arguments]))


def hand_written(path: Path, steps: int, directory: Path, keep_memory: bool = False) -> None:
    """What one writes without a framework, for the same training: nothing but what a step needs."""
    from lightning_automl.augment import normalize, random_crop_flip
    from lightning_automl.models import ResNet
    from lightning_automl.process import keep_freed_memory
    from lightning_automl.tasks.precision import fast_precision

    if keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["train_images"]), torch.from_numpy(file["train_labels"]).long()
    pixels = images.flatten(0, 2).float() / 255
    mean, std = pixels.mean(0), pixels.std(0)
    network = ResNet(CLASSES).to(memory_format=torch.channels_last)
    precision = fast_precision(network, "cpu")
    optimizer, scheduler = optimizer_and_scheduler(network, EPOCHS * steps)
    epochs = Epochs(precision=precision)
    while True:
        epochs.wait()
        loss_of_epoch = torch.zeros(())
        order = torch.randperm(len(labels)).split(BATCH)
        for step, chosen in enumerate(order):
            batch = random_crop_flip(images.index_select(0, chosen).permute(0, 3, 1, 2), padding=4)
            batch = normalize(batch.float().div_(255), mean, std)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = F.cross_entropy(network(batch).float(), labels[chosen])
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_of_epoch += loss.detach()
            epochs.batch_is_done(step + 1 == len(order))
        (loss_of_epoch / steps).item()


def lightning_defaults(path: Path, steps: int, directory: Path, workers: int) -> None:
    """What one writes after the documentation of Lightning and torchvision."""
    from torchvision.transforms import v2

    from benchmarks.data_throughput.run import PILImages

    with np.load(path) as file:
        images, labels = file["train_images"], file["train_labels"].astype(np.int64)
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((images.mean((0, 1, 2)) / 255).tolist(), (images.std((0, 1, 2)) / 255).tolist()),
        ]
    )
    dataset: Any = PILImages(images, labels, transform)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=Pace(),
    )
    trainer.fit(PlainTask(EPOCHS * steps), loader)


class PlainTask(pl.LightningModule):
    """The same network as a first LightningModule.

    Args:
        total_steps: Length of the schedule.
    """

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        from torchmetrics.classification import MulticlassAccuracy

        from lightning_automl.models import ResNet

        self.total_steps = total_steps
        self.model = ResNet(CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, and log it and the accuracy once an epoch."""
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer of the other variants."""
        optimizer, scheduler = optimizer_and_scheduler(self.model, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def optimizer_and_scheduler(network: torch.nn.Module, total_steps: int) -> tuple[Any, Any]:
    """Those of fit.yaml."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, pct_start=0.2, total_steps=total_steps)
    return optimizer, schedule


#: The first is the one that all others are compared with.
VARIANTS: dict[str, Callable[[Path, int, Path], None]] = {
    "fit": fit,
    "hand_written": hand_written,
    "hand_written_keep_memory": partial(hand_written, keep_memory=True),
    "lightning_0_workers": partial(lightning_defaults, workers=0),
    "lightning_2_workers": partial(lightning_defaults, workers=2),
    "fit_without_keep_memory": partial(fit, keep_memory=False),
    "fit_float32": lambda *given: fit(*given, "--trainer.precision=32-true"),
    "fit_without_channels_last": lambda *given: fit(*given, "--model.init_args.channels_last=false"),
}


if __name__ == "__main__":
    main()
