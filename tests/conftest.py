"""What tests share: the command line, drawn data, and finished runs, which are made once and never changed."""

import contextlib
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from servers import postgres, proxy  # noqa: F401  # fixtures
from torch import nn

from lightning_automl.__main__ import main

# A shell without job control lets what it starts in the background ignore Ctrl-C, and so all processes below.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session")
def _server():
    from lightning_automl.search.trials import TrialServer
    from lightning_automl.studies.runs import RANK

    with TrialServer(RANK) as server:
        yield server


@pytest.fixture
def warm_server(_server, monkeypatch):
    """Let the command `search` in this process use one trial server, whose start costs more than most tests."""
    monkeypatch.setattr("lightning_automl.searching.TrialServer", lambda call: contextlib.nullcontext(_server))


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


MODES = {"RGB": "png", "L": "jpg", "RGBA": "png", "P": "gif", "1": "bmp", "CMYK": "tif", "LA": "png", "YCbCr": "jpg"}


@pytest.fixture(scope="session")
def finished_digits(tmp_path_factory):
    """Three epochs of the digits, the test split opened."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["fit", "--config", DIGITS, f"--dir={directory}", "--trainer.max_epochs=3"]) == 0
    return directory


@pytest.fixture
def digits(finished_digits, tmp_path):
    """A copy of the digits' run."""
    return shutil.copytree(finished_digits, tmp_path / "digits")


def draw_images(folder, number=12):
    """Two classes, light and dark, in all sizes and modes, and three broken files."""
    generator = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 190)):
        (folder / label).mkdir(parents=True)
        for index in range(number):
            mode, suffix = list(MODES.items())[index % len(MODES)]
            size = tuple(generator.integers(9, 60, 2))
            pixels = generator.integers(level - 50, level + 50, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert("RGB").convert(mode).save(folder / label / f"{index}.{suffix}")
    whole = (folder / "dark" / "0.png").read_bytes()
    for name, content in (("text.png", b"no image"), ("empty.jpg", b""), ("cut.png", whole[: len(whole) // 2])):
        (folder / "light" / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory):
    """A small network on a folder of mixed sizes and modes with broken files; the folder is `images` beside the run."""
    home = tmp_path_factory.mktemp("folder")
    draw_images(home / "images")
    config = home / "config.yaml"
    config.write_text(
        """
model:
  class_path: ClassificationTask
  init_args:
    model: {class_path: TunableCNN, init_args: {filters: [8], units: []}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  class_path: FolderDataModule
  init_args: {path: PATH, image_size: [12, 16], channels: 3, skip_broken: true, batch_size: 8}
trainer: {max_epochs: 4}
""".replace("PATH", str(home / "images"))
    )
    assert main(["fit", "--config", str(config), f"--dir={home / 'run'}"]) == 0
    return home / "run"


@pytest.fixture
def folder_run(finished_folder, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished_folder, tmp_path / "run")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def warmed():
    """Take the norms' statistics of a network from random images, so that its logits differ from image to image.

    A deep network at its start gives about the same logits, or zeros, for everything: to compare them shows nothing.
    """

    def warm(network, channels=3, size=64):
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.train()
        images = torch.rand(4, channels, size, size, dtype=next(network.parameters()).dtype)
        with torch.no_grad():
            network(images)
            logits = network.eval()(images)
        assert (logits[0] - logits[1]).abs().max() > 0.01
        return network

    return warm
