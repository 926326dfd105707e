"""Training steps a second: the command ``fit``, a hand-written loop, Lightning's defaults, fit without its parts."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import results
from benchmarks.training_overhead.variants import BATCH, CLASSES, VARIANTS

FOLDER = Path(__file__).parent
REPEATS = 5
PROFILED_STEPS = 20
COLUMNS = [
    "threads",
    "variant",
    "precision",
    "steps_per_second",
    "epochs_steps_per_second",
    "epoch_end_ms",
    "peak_memory_mb",
    "fit_ratio",
    "fit_ratio_epochs",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default=os.environ.get("LIGHTNING_AUTOML_DATA"), help="has cifar10_small.npz")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; every variant has its repeats in any case")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, help="of a repeat; 5 to 39 by the budget when left out")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", help="variants to run beside fit")
    parser.add_argument("--profile", action="store_true", help=f"also profile {PROFILED_STEPS} steps of fit")
    parser.add_argument("--table", action="store_true", help="print the table of all results and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        steps = arguments.steps or min(39, max(5, int(arguments.budget / 20)))
        names = [name for name in VARIANTS if not arguments.only or name in {"fit", *arguments.only}]
        rows: list[dict[str, Any]] = []
        facts: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            source = Path(arguments.data_root or folder) / "cifar10_small.npz"
            facts["data"] = "images of cifar10_small.npz" if source.exists() else "random images"
            path = write_images(Path(folder) / "train.npz", source, steps)
            for threads in arguments.threads:
                rows += measure(names, path, steps, threads, arguments.budget / len(arguments.threads))
            if arguments.profile:
                path = write_images(Path(folder) / "profile.npz", source, PROFILED_STEPS)
                threads = max(arguments.threads)
                facts["profile_of_fit"] = {"threads": threads, "operations": profile(path, threads)}
        config = "resnet20" if len(names) == len(VARIANTS) else "-".join(["resnet20", *names[1:]])
        facts |= {"batch_size": BATCH, "steps_of_a_repeat": steps, "budget_seconds": arguments.budget}
        print(results.write(FOLDER, config, rows, **facts))
    print(results.table(FOLDER, COLUMNS))


def write_images(path: Path, source: Path, steps: int) -> Path:
    """Write as many images as ``steps`` full batches need, so that no loader has read ahead when an epoch ends."""
    random = np.random.default_rng(0)
    if source.exists():
        with np.load(source) as file:
            images = file["train_images"]
    else:
        images = random.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8)
    arrays: dict[str, Any] = {}
    for split, count in (("train", steps * BATCH), ("val", CLASSES), ("test", CLASSES)):
        arrays[f"{split}_images"] = images[np.arange(count) % len(images)]
        arrays[f"{split}_labels"] = random.permutation(count) % CLASSES
    np.savez(path, **arrays)
    return path


def measure(names: Sequence[str], path: Path, steps: int, threads: int, budget: float) -> list[dict[str, Any]]:
    """Let a process of each variant train an epoch in turn, until the budget is used; return a row a variant."""
    start = time.perf_counter()
    epochs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Process(name, path, steps, threads)) for name in names}
        facts = {name: process.answer() for name, process in processes.items()}
        for process in processes.values():  # memory is claimed, kernels are chosen, workers are started
            process.ask("go")
        seconds = 0.0  # of a round
        while len(epochs["fit"]) < REPEATS or time.perf_counter() - start + seconds < budget:
            begin = time.perf_counter()
            for name, process in processes.items():
                epochs[name].append(process.ask("go"))
            seconds = time.perf_counter() - begin
    return [{"threads": threads, "variant": name} | row(facts[name], epochs[name], epochs["fit"]) for name in names]


def row(facts: dict[str, Any], own: list[dict[str, Any]], fit: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats; the ratios are those of ``fit`` to this variant in the same round."""
    loop, whole = speeds(own, "loop_seconds"), speeds(own, "epoch_seconds")
    ratios = [ours / this for ours, this in zip(speeds(fit, "loop_seconds"), loop, strict=True)]
    ratios_whole = [ours / this for ours, this in zip(speeds(fit, "epoch_seconds"), whole, strict=True)]
    return {
        **facts,
        "steps_per_second": statistics.median(loop),
        "epochs_steps_per_second": statistics.median(whole),
        "epoch_end_ms": 1000 * statistics.median(each["epoch_seconds"] - each["loop_seconds"] for each in own),
        "peak_memory_mb": own[-1]["peak_memory_mb"],
        "fit_ratio": statistics.median(ratios),
        "fit_ratio_lowest": min(ratios),
        "fit_ratio_highest": max(ratios),
        "fit_ratio_epochs": statistics.median(ratios_whole),
        "repeats": len(own),
        "steps_per_second_of_repeats": [round(value, 3) for value in loop],
        "epochs_steps_per_second_of_repeats": [round(value, 3) for value in whole],
    }


def speeds(epochs: list[dict[str, Any]], key: str) -> list[float]:
    return [each["steps"] / each[key] for each in epochs]


def profile(path: Path, threads: int) -> list[dict[str, Any]]:
    with Process("fit", path, PROFILED_STEPS, threads) as process:
        process.answer()
        process.ask("go")
        found: list[dict[str, Any]] = process.ask("profile")["profile"]
    return found


class Process:
    """A process that trains a variant, see :mod:`benchmarks.training_overhead.variants`; it ends with the block.

    Args:
        name: Key of ``VARIANTS``.
        path: File of the images.
        steps: Batches that the file has.
        threads: For torch's operations.
    """

    def __init__(self, name: str, path: Path, steps: int, threads: int) -> None:
        self.name = name
        self.directory = tempfile.TemporaryDirectory()
        self.errors = Path(self.directory.name) / "stderr"
        # The number of OpenMP threads is fixed when torch is imported. All variants are for the CPU.
        fixed = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        arguments = [name, str(path), str(steps), f"{self.directory.name}/run"]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.training_overhead.variants", *arguments],
                env=os.environ | fixed,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()  # closes stdin, which ends the process
        self.directory.cleanup()

    def ask(self, word: str) -> dict[str, Any]:
        """Say ``go`` or ``profile``, and return what the process answers when the epoch is over."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(word, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            RuntimeError: If the process has ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"{self.name} ended early:\n{self.errors.read_text()[-3000:]}")


if __name__ == "__main__":
    main()
