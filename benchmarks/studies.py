"""What benchmarks share: small CIFAR-100 images, commands `search` and `fit` that go on when killed, and intervals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_automl.rundir import read_json, replacing, write_json


def small_cifar100(data_root: Path, work: Path) -> dict[str, Any]:
    """Keys of a short run on a tenth of CIFAR-100, averaged to 16 x 16 pixels in a file in ``work`` made once."""
    path = work / "cifar100_16.npz"
    if not path.exists():
        with np.load(data_root / "cifar100.npz") as file:
            arrays = {name: file[name] for name in file.files}
        for name, values in arrays.items():
            if values.ndim == 4:
                images, height, width, channels = values.shape
                blocks = values.reshape(images, height // 2, 2, width // 2, 2, channels)
                arrays[name] = blocks.mean((2, 4)).round().astype(np.uint8)
        with replacing(path) as partial, partial.open("wb") as out:
            np.savez(out, **arrays)
    return {
        "data": "ArraysDataModule",
        "data.path": path,
        "data.batch_size": 64,
        "data.base_augment": "crop_flip",
        "data.subset": 0.1,
        "data.val_fraction": 0.05,
        "trainer.max_epochs": 9,
        "trainer.accelerator": "cpu",
    }


def search(config: dict[str, Any], directory: Path, *arguments: str, record_name: str = "study.json") -> dict[str, Any]:
    """Run a search to its end, or go on with it, and return its ``study.json`` or another record that it leaves."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "lightning_automl", "search", "--config", str(file), "--dir", str(directory)]
    subprocess.run([*command, *arguments], check=True)
    record: dict[str, Any] = json.loads((directory / record_name).read_text())
    return record


def fit(config: dict[str, Any], directory: Path, threads: int = 1) -> dict[str, Any]:
    """Run a fit config to its end, or go on with it, unless that was done before.

    Returns:
        The run's ``summary.json``, and of its process ``memory``, the most that it had in MB, and ``cpu_seconds``,
        which a busy machine changes less than the time on the clock; of a run that was killed, those of the last.
    """
    usage_file = directory.with_suffix(".json")
    if (read_json(directory / "summary.json") or {}).get("status") != "finished":
        directory.parent.mkdir(parents=True, exist_ok=True)
        file, log = directory.with_suffix(".yaml"), directory.with_suffix(".txt")
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, "-m", "lightning_automl", "fit", "--config", str(file), "--dir", str(directory)]
        with log.open("a") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
            _, status, usage = os.wait4(process.pid, 0)  # Popen.wait does not tell the memory
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed; see {log}")
        write_json(usage_file, {"memory": usage.ru_maxrss / 1000, "cpu_seconds": usage.ru_utime + usage.ru_stime})
    summary: dict[str, Any] = read_json(directory / "summary.json")
    return summary | (read_json(usage_file) or {})


def best_so_far(record: dict[str, Any]) -> list[list[float]]:
    """Best value of the complete trials against the epochs trained so far, in the order in which trials ended."""
    curve: list[list[float]] = []
    spent, best = 0, float("-inf")
    for trial in sorted((each for each in record["trials"] if each["ended"]), key=lambda each: each["ended"]):
        spent += trial["epochs"]
        if trial["state"] == "COMPLETE" and trial["values"][0] > best:
            best = trial["values"][0]
            curve.append([spent, best])
    return curve
