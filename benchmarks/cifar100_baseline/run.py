"""CIFAR-100 with a ResNet-20: all training images once, and three seeds of a 10 % stratified subset.

``python -m benchmarks.cifar100_baseline.run --data-root DIR --budget 3600``; killed, it goes on with the same command.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import results

HERE = Path(__file__).parent
CONFIG = "configs/baseline/cifar100_resnet.yaml"

#: Keys beside the config's, by name of the job; the 10 % subset sees each image more often, as it has fewer.
JOBS = {
    **{
        f"subset-seed{seed}": {"seed_everything": seed, "data.init_args.subset": 0.1, "trainer.max_epochs": 50}
        for seed in range(3)
    },
    "full": {"seed_everything": 0, "trainer.max_epochs": 27},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=os.environ.get("LIGHTNING_AUTOML_DATA"), help="folder of cifar100.npz")
    parser.add_argument("--budget", type=float, default=900, help="seconds; a job starts if it is expected to fit")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/cifar100_baseline"))
    parser.add_argument("--only", choices=JOBS, action="append", help="jobs to run; all by default")
    arguments = parser.parse_args()
    if arguments.data_root is None:
        parser.error("give --data-root or set LIGHTNING_AUTOML_DATA to the folder of cifar100.npz")
    path = Path(arguments.data_root) / "cifar100.npz"
    rows: list[dict[str, Any]] = []
    spent = 0.0
    for name in arguments.only or JOBS:
        expected = _expected_seconds(name, rows)
        if rows and spent + expected > arguments.budget:
            print(f"{name} left out: about {expected:.0f} s, of {arguments.budget:.0f} s {spent:.0f} are spent")
            continue
        rows.append(_run(name, path, arguments.work / name))
        spent += rows[-1]["seconds"]
    config = "resnet20" if len(rows) == len(JOBS) else "resnet20-" + "-".join(row["job"] for row in rows)
    print(results.write(HERE, config, rows, budget=arguments.budget, data="cifar100.npz", config_file=CONFIG))


def _expected_seconds(name: str, rows: list[dict[str, Any]]) -> float:
    images = (0.1 if name.startswith("subset") else 1.0) * JOBS[name]["trainer.max_epochs"]
    done = sum((0.1 if row["job"].startswith("subset") else 1.0) * row["epochs"] for row in rows)
    return images * sum(row["seconds"] for row in rows) / done if done else 0.0


def _run(name: str, path: Path, directory: Path) -> dict[str, Any]:
    keys = {"data.init_args.path": path, **JOBS[name]}
    command = [sys.executable, "-m", "lightning_automl", "fit", "--config", CONFIG, "--dir", str(directory)]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in keys.items())], check=True)
    summary = json.loads((directory / "summary.json").read_text())
    environment = json.loads((directory / "environment.json").read_text())
    with (directory / "metrics.csv").open() as file:
        epochs = list(csv.DictReader(file))
    curve = [{key: float(row[key]) for key in ("train_loss", "val_loss", "val_accuracy", "seconds")} for row in epochs]
    return {
        "job": name,
        "epochs": len(epochs),
        "test_accuracy": summary["metrics"]["test_accuracy"],
        "val_accuracy": summary["metrics"]["val_accuracy"],
        "test_opened": summary["test_opened"],
        "seconds": summary["seconds"],
        "seconds_per_epoch": sorted(row["seconds"] for row in curve)[len(curve) // 2],
        "precision": environment["precision"],
        "threads": environment["hardware"]["threads"],
        "curve": curve,
    }


if __name__ == "__main__":
    main()
