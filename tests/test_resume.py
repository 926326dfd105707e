"""Run as a script, this file is the server that starts runs by forking, so that each costs a second and not ten."""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

CONFIG = {
    "model": {
        "class_path": "ClassificationTask",
        "init_args": {
            "model": {
                "class_path": "TunableCNN",
                "init_args": {"filters": [8], "units": [32], "conv_dropout": 0.1, "fc_dropout": 0.3},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
            "scheduler": {"class_path": "WarmupCosineLR"},
            "mix": {"class_path": "torchvision.transforms.v2.MixUp", "init_args": {"alpha": 0.2}},
        },
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 32, "base_augment": "crop_flip"}},
    "trainer": {"max_epochs": 60, "callbacks": [{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.99}}]},
    "checkpoint_every_n_steps": 7,
}
KILLS = 10


def start(folder, run):
    """Fork a process that gives the command; it is a process group of its own."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    log = os.open(folder / f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from lightning_automl.__main__ import main

    os._exit(main(["fit", "--config", str(folder / "c.yaml"), "--dir", str(folder / run)]))


def written(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def serve(folder):
    import sklearn.datasets  # noqa: F401
    import torch

    import lightning_automl.cli  # noqa: F401

    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1
    moments = random.Random(0)
    last = folder / "killed/checkpoints/last.ckpt"
    for kill in range(KILLS):
        child = start(folder, "killed")
        if kill < 3:  # at any moment from the start on
            time.sleep(moments.uniform(0, 0.8))
        else:  # at any moment after it has gone on by some checkpoints: also while it writes one
            for _ in range(moments.randint(1, 6)):
                before = written(last)
                while written(last) == before:
                    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
                    time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.05))
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    children = [start(folder, run) for run in ("killed", "whole")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_with_the_same_weights_and_predictions(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert (tmp_path / "killed.log").read_text().count("going on from") >= KILLS - 3
    for name in ("last", "best"):
        killed, whole = (
            torch.load(tmp_path / run / f"checkpoints/{name}.ckpt", weights_only=True) for run in ("killed", "whole")
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_same(killed[part], whole[part])
        assert (killed["epoch"], killed["global_step"]) == (whole["epoch"], whole["global_step"])
    tables = []
    for run in ("killed", "whole"):
        with (tmp_path / run / "metrics.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    for row, expected in zip(*tables, strict=True):
        # Training metrics of an epoch that was cut in two are those of its second part.
        assert {key: row[key] for key in row if key.startswith("val_")} == {
            key: expected[key] for key in expected if key.startswith("val_")
        }
    from lightning_automl.results import Run

    one, other = (Run.read(tmp_path / run) for run in ("killed", "whole"))
    assert one.data == other.data
    assert_same(*(torch.from_numpy(run.predictions("val").probabilities) for run in (one, other)))
    assert one.predictions("val").origin == other.predictions("val").origin
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(Path(sys.argv[1]))
