"""Images a second of training batches: ours, and torchvision's transforms on PIL images in a DataLoader."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BATCH = 128
REPEATS = 5
COLUMNS = [
    "threads",
    "ours",
    "torchvision_0_workers",
    "torchvision_2_workers",
    "ratio_to_0_workers",
    "ratio_to_2_workers",
    "ratio_to_faster",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=os.environ.get("LIGHTNING_AUTOML_DATA"), help="has cifar10_small.npz")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of all results and run nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in a process of its own: measure this file
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.budget)))
        return
    from benchmarks.results import table, write

    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            given = Path(arguments.data_root or folder) / "cifar10_small.npz"
            path = given if given.exists() else random_images(Path(folder) / "random.npz")
            rows = [in_fresh_process(path, threads, arguments.budget) for threads in arguments.threads]
        data = "cifar10_small.npz" if given.exists() else "random images, since there was no cifar10_small.npz"
        print(write(FOLDER, "crop_flip_normalize", rows, batch_size=BATCH, budget_seconds=arguments.budget, data=data))
    print(table(FOLDER, COLUMNS))


def random_images(path: Path) -> Path:
    import numpy as np

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    np.savez(path, train_images=images, train_labels=np.arange(5000) % 10)
    return path


def in_fresh_process(path: Path, threads: int, budget: float) -> dict[str, Any]:
    # The number of OpenMP threads is fixed when torch is imported.
    command = [sys.executable, "-m", "benchmarks.data_throughput.run", "--measure", str(path), "--budget", str(budget)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return {"threads": threads} | measured


def measure(path: Path, budget: float) -> dict[str, Any]:
    """Run epochs of all pipelines in turn, at least ``REPEATS`` of each, until the budget is used."""
    import torch

    from lightning_automl.data import ArraysDataModule

    data = ArraysDataModule(str(path), batch_size=BATCH, base_augment="crop_flip")
    data.setup("fit")
    images = len(data.dataset("train"))
    pipelines: dict[str, Callable[[], None]] = {
        "ours": ours(data),
        "torchvision_0_workers": torchvision(data, workers=0),
        "torchvision_2_workers": torchvision(data, workers=2),
    }
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    for epoch in pipelines.values():
        epoch()  # memory is claimed, workers are started
    start = time.perf_counter()
    while len(speeds["ours"]) < REPEATS or time.perf_counter() - start < budget:
        for name, epoch in pipelines.items():
            epochs = 10 if name == "ours" else 1  # about as long as one of the others
            begin = time.perf_counter()
            for _ in range(epochs):
                epoch()
            speeds[name].append(epochs * images / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    zero, two = (medians["ours"] / medians[f"torchvision_{workers}_workers"] for workers in (0, 2))
    return {
        **medians,
        "ratio_to_0_workers": zero,
        "ratio_to_2_workers": two,
        "ratio_to_faster": min(zero, two),
        "torch_threads": torch.get_num_threads(),
        "images": images,
        "repeats": len(speeds["ours"]),
        "images_per_second": {name: [round(value) for value in values] for name, values in speeds.items()},
    }


def ours(data: Any) -> Callable[[], None]:
    """What a training step costs before the network: the loader, the data module's hooks, the task's normalisation."""
    import torch

    from lightning_automl.tasks.classification import ClassificationTask

    loader = data.train_dataloader()
    task = ClassificationTask(torch.nn.Identity(), num_classes=data.num_classes)
    task.mean, task.std = data.mean.view(-1, 1, 1), data.std.view(-1, 1, 1)  # as its setup does

    def epoch() -> None:
        for step, (images, _) in enumerate(loader):
            torch.default_generator.manual_seed(step)  # as before every step of a run
            task(data.augment(images).float().div_(255))

    return epoch


class PILImages:
    """The same images as PIL has them when files are decoded, kept in memory."""

    def __init__(self, images: Any, labels: Any, transform: Callable[[Any], Any]) -> None:
        from PIL import Image

        self.images = [Image.fromarray(image) for image in images]
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def torchvision(data: Any, workers: int) -> Callable[[], None]:
    """The usual recipe of torchvision's documentation."""
    import torch
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean.tolist(), data.std.tolist()),
        ]
    )
    train = data.dataset("train")
    pixels = torch.stack([train[index][0] for index in range(len(train))]).permute(0, 2, 3, 1).contiguous().numpy()
    dataset: Any = PILImages(pixels, train.labels, transform)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


if __name__ == "__main__":
    main()
