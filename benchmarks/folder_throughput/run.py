"""Images a second of training batches from JPEG files: ours from the cache, torchvision's decoded every epoch."""

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
BATCH = 64
REPEATS = 5
SIDE = 224
CLASSES = 10
COUNTS = {"train": 2000, "val": 100, "test": 100}
COLUMNS = [
    "threads",
    "cache",
    "memory",
    "torchvision_pil",
    "torchvision_decode_image",
    "ratio_to_faster",
    "decoding_seconds",
    "starting_again_seconds",
    "torchvision_first_epoch_seconds",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=os.environ.get("LIGHTNING_AUTOML_DATA"), help="has cifar10_small.npz")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds for each number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of all results and run nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in a process of its own: measure this folder
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.budget)))
        return
    from benchmarks.results import table, write

    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            given = Path(arguments.data_root or folder) / "cifar10_small.npz"
            draw(Path(folder), given)
            rows = [in_fresh_process(Path(folder), threads, arguments.budget) for threads in arguments.threads]
        data = "cifar10_small.npz, enlarged" if given.exists() else "smooth noise, since there was no cifar10_small.npz"
        facts = {"batch_size": BATCH, "side": SIDE, "budget_seconds": arguments.budget, "data": data}
        print(write(FOLDER, "jpeg_224_crop_flip_normalize", rows, **facts))
    print(table(FOLDER, COLUMNS))


def draw(folder: Path, arrays: Path) -> None:
    """Write JPEG files of 224 x 224 pixels, quality 90, one folder a class; small images are enlarged bicubically."""
    import numpy as np
    from PIL import Image

    total = sum(COUNTS.values())
    random = np.random.default_rng(0)
    if arrays.exists():
        with np.load(arrays) as file:
            drawn = random.permutation(len(file["train_labels"]))[:total]
            small, labels = file["train_images"][drawn], file["train_labels"].reshape(-1)[drawn]
    else:
        small, labels = random.integers(0, 256, (total, 32, 32, 3), dtype=np.uint8), np.arange(total) % CLASSES
    splits = [split for split, count in COUNTS.items() for _ in range(count)]
    for number, (pixels, label, split) in enumerate(zip(small, labels, splits, strict=True)):
        path = folder / "images" / split / str(label) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)


def in_fresh_process(folder: Path, threads: int, budget: float) -> dict[str, Any]:
    # The number of OpenMP threads is fixed when torch is imported.
    module = "benchmarks.folder_throughput.run"
    command = [sys.executable, "-m", module, "--measure", str(folder), "--budget", str(budget)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return {"threads": threads} | measured


def measure(folder: Path, budget: float) -> dict[str, Any]:
    """Run epochs of all pipelines in turn, at least ``REPEATS`` of each, until the budget is used."""
    import torch

    from benchmarks.data_throughput.run import ours
    from lightning_automl.data import FolderDataModule
    from lightning_automl.process import keep_freed_memory

    keep_freed_memory()  # as our commands do; torchvision's workers are forked from here and have it, too
    path = str(folder / "images")
    for file in Path(path).rglob("*.jpg"):
        file.read_bytes()  # what decoding costs is asked, not what the disk costs
    with tempfile.TemporaryDirectory(dir=folder) as place:
        modules: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for name, cache in (("decoding", place), ("starting_again", place), ("decoding_into_memory", None)):
            begin = time.perf_counter()
            modules[name] = FolderDataModule(path, batch_size=BATCH, base_augment="crop_flip", cache=cache)
            modules[name].setup("fit")
            seconds[f"{name}_seconds"] = time.perf_counter() - begin
        data = modules["starting_again"]
        images = len(data.dataset("train"))
        pipelines: dict[str, Callable[[], None]] = {
            "cache": ours(data),
            "memory": ours(modules["decoding_into_memory"]),
            "torchvision_pil": torchvision(data, from_file=False),
            "torchvision_decode_image": torchvision(data, from_file=True),
        }
        speeds: dict[str, list[float]] = {name: [] for name in pipelines}
        for name, epoch in pipelines.items():  # memory is claimed, workers are started
            begin = time.perf_counter()
            epoch()
            seconds[f"{name}_first_epoch_seconds"] = time.perf_counter() - begin
        start = time.perf_counter()
        while len(speeds["cache"]) < REPEATS or time.perf_counter() - start < budget:
            for name, epoch in pipelines.items():
                epochs = 1 if name.startswith("torchvision") else 10  # about as long
                begin = time.perf_counter()
                for _ in range(epochs):
                    epoch()
                speeds[name].append(epochs * images / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    names = ("torchvision_pil", "torchvision_decode_image")
    faster = max(names, key=medians.__getitem__)
    return {
        **medians,
        **{f"ratio_to_{name}": medians["cache"] / medians[name] for name in names},
        "ratio_to_faster": medians["cache"] / medians[faster],
        **seconds,
        "torchvision_first_epoch_seconds": seconds[f"{faster}_first_epoch_seconds"],
        "torch_threads": torch.get_num_threads(),
        "images": images,
        "decoded_images": sum(COUNTS.values()),
        "repeats": len(speeds["cache"]),
        "images_per_second": {name: [round(value) for value in values] for name, values in speeds.items()},
    }


def torchvision(data: Any, from_file: bool) -> Callable[[], None]:
    """The usual recipe of torchvision's documentation with two workers, on PIL images or on decoded tensors."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(SIDE, padding=SIDE // 8),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean.tolist(), data.std.tolist()),
        ]
    )
    options = {"loader": lambda path: decode_image(path, ImageReadMode.RGB)} if from_file else {}
    loader = torch.utils.data.DataLoader(
        ImageFolder(f"{data.path}/train", transform, **options),
        batch_size=BATCH,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


if __name__ == "__main__":
    main()
