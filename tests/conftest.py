"""What tests of the command line share."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lightning_automl.__main__ import main

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs/baseline/digits_cnn.yaml")
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2")


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """Run a command line in this process, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Answer(status, *capfd.readouterr())

    return run


@pytest.fixture
def fit(command):
    """`fit` the digits for two batches; further keys follow."""
    return lambda *arguments: command("fit", "--config", DIGITS, *SHORT, *arguments)


@pytest.fixture
def make_npz():
    """Write random images in the MedMNIST layout; labels go round, so that every class is in every split."""

    def write(path, classes=3, channels=3, side=8, counts=(30, 12, 12)):
        generator = np.random.default_rng(0)
        arrays = {}
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            labels = np.arange(count) % classes
            images = generator.integers(0, 100, (count, side, side, channels)) + labels[:, None, None, None] * 40
            arrays |= {f"{split}_images": np.clip(images, 0, 255).astype(np.uint8), f"{split}_labels": labels}
        np.savez(path, **arrays)
        return path

    return write
