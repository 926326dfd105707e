"""What tests of the command `search` share: a fit config of seconds, and searches as processes that can be killed."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


def run_of(network="faulty_network.FaultyNetwork", ranks=1, epochs=3, **trainer):
    """A fit config of seconds."""
    return {
        "model": {
            "class_path": "ClassificationTask",
            "init_args": {
                "model": {"class_path": network},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
                "scheduler": {"class_path": "WarmupCosineLR"},
            },
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 64}},
        "trainer": {
            "max_epochs": epochs,
            "limit_train_batches": 4,
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "ddp" if ranks > 1 else "auto",
            **trainer,
        },
    }


def rows_of(directory):
    with (directory / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def processes_of(directory):
    """Living processes that have the directory among their arguments or their open files."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            links = [os.readlink(each) for each in (entry / "fd").iterdir()]
            text = (entry / "cmdline").read_text()
        except OSError:
            continue
        if any(str(directory) in each for each in [*links, text]):
            found.append(entry.name)
    return found


def wait_until(condition, seconds=120):
    for _ in range(seconds * 10):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it never came to that")


def start(directory, config, *arguments):
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lightning_automl", "search", "--config", str(path), "--dir", str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with (directory.parent / f"{directory.name}.err").open("a") as errors:
        return subprocess.Popen(
            [*command, *arguments], cwd=directory.parent, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
