"""Images a second of augmentation policies: ours on batches; torchvision's, kornia's and timm's."""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
POLICIES = ("autoaugment_cifar10", "trivial_augment")
BATCHES = {32: 256, 224: 32}
REPEATS = 7
#: At least how many times as fast as which other, by size of images: what the project set out for.
BOUNDS: dict[int, dict[str, float]] = {
    32: {"torchvision_pil": 4, "torchvision_tensor": 6, "kornia": 3, "timm": 3},
    224: {"torchvision_tensor": 1.5},
}
OTHERS = ("torchvision_pil", "torchvision_tensor", "kornia", "kornia_single", "timm")
LAST = ("ours_channels_last", "torchvision_tensor_channels_last")
COLUMNS = ["policy", "size", "threads", "ours", *OTHERS, *(f"ratio_to_{name}" for name in OTHERS), "bounds_kept"]
COLUMNS += [*LAST, "ratio_channels_last"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=os.environ.get("LIGHTNING_AUTOML_DATA"), help="has cifar10_small.npz")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for all rows together")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--table", action="store_true", help="print the tables of all results and run nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # in a process of its own: measure on these images
    arguments = parser.parse_args()
    if arguments.measure:
        (size,) = arguments.sizes
        print(json.dumps([measure(policy, arguments.measure, size, arguments.budget) for policy in POLICIES]))
        return
    from benchmarks.results import table, write

    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            given = Path(arguments.data_root or folder) / "cifar10_small.npz"
            path = given if given.exists() else random_images(Path(folder) / "random.npz")
            budget = arguments.budget / (len(arguments.threads) * len(arguments.sizes) * len(POLICIES))
            rows = [
                row
                for size in arguments.sizes
                for threads in arguments.threads
                for row in in_fresh_process(path, size, threads, budget)
            ]
        data = "cifar10_small.npz" if given.exists() else "random images, since there was no cifar10_small.npz"
        print(
            write(
                FOLDER,
                "policies",
                rows,
                budget_seconds=arguments.budget,
                data=f"{data}; those of 224 pixels are the same ones, enlarged (bilinear)",
                bounds={str(size): bounds for size, bounds in BOUNDS.items()},
            )
        )
    print(table(FOLDER, COLUMNS))
    print()
    print(profiles())


def random_images(path: Path) -> Path:
    import numpy as np

    generator = np.random.default_rng(0)
    np.savez(path, train_images=generator.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8))
    return path


def in_fresh_process(path: Path, size: int, threads: int, budget: float) -> list[dict[str, Any]]:
    # The number of OpenMP threads is fixed when torch is imported.
    command = [sys.executable, "-m", "benchmarks.policy_throughput.run", "--measure", str(path)]
    command += ["--sizes", str(size), "--budget", str(budget)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return [{"threads": threads} | row for row in measured]


def measure(policy: str, path: str, size: int, budget: float) -> dict[str, Any]:
    """Let all pipelines take turns, ``REPEATS`` times, for as long as the budget allows, and profile ours."""
    import torch

    images = load(path, size)
    last = images.contiguous(memory_format=torch.channels_last)
    pipelines = {"ours": ours(policy, images), **torchvision(policy, images), **kornia(policy, images)}
    pipelines["timm"] = timm(policy, images)
    pipelines |= dict(zip(LAST, (ours(policy, last), torchvision(policy, last)["torchvision_tensor"]), strict=True))
    turn = 0.8 * budget / (REPEATS + 1) / len(pipelines)
    # a batch of kornia's has one sub-policy, so that few batches say little
    calls = {name: warmed(batch, turn, 10 if name == "kornia" else 3) for name, batch in pipelines.items()}
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(REPEATS):
        for name, batch in pipelines.items():
            torch.manual_seed(repeat)
            random.seed(repeat)
            begin = time.perf_counter()
            for _ in range(calls[name]):
                batch()
            speeds[name].append(calls[name] * len(images) / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {name: medians["ours"] / medians[name] for name in OTHERS}
    kept = [f"{name} {bound:g}: {'yes' if ratios[name] >= bound else 'no'}" for name, bound in BOUNDS[size].items()]
    return {
        "policy": policy,
        "size": size,
        "batch_size": len(images),
        "torch_threads": torch.get_num_threads(),
        **medians,
        **{f"ratio_to_{name}": ratio for name, ratio in ratios.items()},
        "bounds_kept": ", ".join(kept),
        "ratio_channels_last": medians[LAST[0]] / medians[LAST[1]],
        "batches_a_repeat": calls,
        "images_per_second": {name: [round(value) for value in values] for name, values in speeds.items()},
        "profile": profile(policy, images, 0.1 * budget),
    }


def warmed(batch: Callable[[], None], seconds: float, least: int) -> int:
    """Run a pipeline for a while, and say how many batches fit in a turn."""
    batch()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        batch()
        calls += 1
    return max(least, calls)


def load(path: str, size: int) -> Any:
    """A batch of real images as uint8 ``(batch, 3, size, size)``."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    images = torch.from_numpy(np.load(path)["train_images"][: BATCHES[size]]).permute(0, 3, 1, 2).contiguous()
    if size == images.shape[-1]:
        return images
    enlarged = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)
    return enlarged.round().to(torch.uint8)


def in_pil(images: Any) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


def our_policy(policy: str) -> Any:
    from lightning_automl.augment import AutoAugment, TrivialAugment

    return AutoAugment("cifar10") if policy == "autoaugment_cifar10" else TrivialAugment()


def ours(policy: str, images: Any) -> Callable[[], None]:
    ready = our_policy(policy)

    def batch() -> None:
        ready.apply(images)

    return batch


def torchvision(policy: str, images: Any) -> dict[str, Callable[[], None]]:
    """One image after the other, as a dataset does."""
    from torchvision.transforms import v2

    cifar10 = v2.AutoAugmentPolicy.CIFAR10
    ready = v2.AutoAugment(cifar10) if policy == "autoaugment_cifar10" else v2.TrivialAugmentWide()
    tensors, pils = list(images), in_pil(images)

    def pil_images() -> None:
        for image in pils:
            ready(image)

    def single_tensors() -> None:
        for image in tensors:
            ready(image)

    return {"torchvision_pil": pil_images, "torchvision_tensor": single_tensors}


def kornia(policy: str, images: Any) -> dict[str, Callable[[], None]]:
    """On float images, which it wants; a batch has one sub-policy in common, so also on batches of one image."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from kornia.augmentation import auto
    ready = auto.AutoAugment("cifar10") if policy == "autoaugment_cifar10" else auto.TrivialAugment()
    floats = images / 255
    singles = floats.split(1)

    def batch() -> None:
        ready(floats)

    def single() -> None:
        for image in singles:
            ready(image)

    return {"kornia": batch, "kornia_single": single}


def timm(policy: str, images: Any) -> Callable[[], None]:
    """On PIL images, read by nearest neighbours as the others do."""
    from PIL import Image
    from timm.data.auto_augment import AugmentOp, AutoAugment, rand_augment_transform
    from torchvision.transforms import v2

    hparams: dict[str, Any] = {"interpolation": Image.Resampling.NEAREST, "img_mean": (0, 0, 0)}
    ready: Any
    if policy == "trivial_augment":
        # what comes nearest: one operation, always done, its magnitude uniform (mstd above 100)
        ready = rand_augment_transform("rand-m10-n1-p1-mstd101-inc1", hparams)
    else:
        names = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel", "Posterize": "PosterizeOriginal"}
        for name in ("Color", "Contrast", "Brightness", "Sharpness", "Solarize"):
            names[name] = f"{name}Increasing"
        table = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies  # timm has the tables of ImageNet only
        ready = AutoAugment(
            [[AugmentOp(names.get(name, name), p, m or 0, hparams) for name, p, m in steps] for steps in table]
        )
    pils = in_pil(images)

    def batch() -> None:
        for image in pils:
            ready(image)

    return batch


def profile(policy: str, images: Any, seconds: float) -> dict[str, float]:
    """Shares of our time: for drawing, for the copy of the images, and for each operation.

    The time of an operation is that of plans with all others taken out, less the copy.
    """
    import torch

    from lightning_automl.augment import OPS, apply

    ready = our_policy(policy)
    size = (images.shape[2], images.shape[3])
    torch.manual_seed(0)
    plans = [ready.draw(len(images), images.shape[1], size) for _ in range(8)]
    names = list(OPS)
    identity = names.index("identity")
    found = {int(place) for plan in plans for place in plan.operations.unique()} - {identity}
    original = [plan.operations for plan in plans]

    def only(place: int) -> Callable[[], None]:
        kept = [torch.where(operations == place, operations, identity) for operations in original]

        def act() -> None:
            for plan, operations in zip(plans, kept, strict=True):
                plan.operations = operations
                apply(images, plan)

        return act

    def draw() -> None:
        for _ in plans:
            ready.draw(len(images), images.shape[1], size)

    parts = {"draw": draw, "copy": only(identity)} | {names[place]: only(place) for place in sorted(found)}
    times: dict[str, list[float]] = {name: [] for name in parts}
    begin = time.perf_counter()
    while len(times["draw"]) < 3 or time.perf_counter() - begin < seconds:
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians |= {names[place]: max(0.0, medians[names[place]] - medians["copy"]) for place in found}
    total = sum(medians.values())
    shares = {name: round(value / total, 3) for name, value in medians.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def profiles() -> str:
    """The profiles of the newest result as a Markdown table, in per cent."""
    newest = max((FOLDER / "results").glob("*.json"), key=lambda path: json.loads(path.read_text())["date"])
    rows = json.loads(newest.read_text())["rows"]
    parts = sorted({part for row in rows for part in row["profile"]}, key=lambda part: -rows[0]["profile"].get(part, 0))
    lines = ["| policy | size | threads | " + " | ".join(parts) + " |", "|---" * (3 + len(parts)) + "|"]
    for row in rows:
        shares = (f"{100 * row['profile'][part]:.0f}" if part in row["profile"] else "" for part in parts)
        lines.append(f"| {row['policy']} | {row['size']} | {row['threads']} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
