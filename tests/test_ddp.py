"""Two real processes with gloo stand for two GPUs."""

import csv
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import DIGITS

from lightning_automl.data import DigitsDataModule
from lightning_automl.results import Run

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments, cwd, check=True):
    command = [sys.executable, "-m", "lightning_automl", *map(str, arguments)]
    ran = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert not check or ran.returncode == 0, ran.stderr
    return ran


def weights(directory):
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def metrics(directory):
    return json.loads((directory / "summary.json").read_text())["metrics"]


@pytest.fixture
def config(tmp_path, make_npz):
    """GroupNorm and no random augmentation: what a batch gives depends on no other rank."""
    make_npz(tmp_path / "data.npz", classes=4, channels=3, counts=(256, 41, 41))
    model = {"class_path": "TunableCNN", "init_args": {"filters": [8, 16], "units": [16], "norm": "group"}}
    task = {"model": model, "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}}
    text = {
        "model": {"class_path": "ClassificationTask", "init_args": task},
        "data": {"class_path": "ArraysDataModule", "init_args": {"path": "data.npz"}},
        "trainer": {"max_epochs": 3, "precision": "32-true"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(text))
    return tmp_path / "c.yaml"


def test_two_ranks_end_with_the_weights_of_one_process(config, tmp_path):
    run("fit", "--config", config, "--dir=one", "--data.batch_size=32", cwd=tmp_path)
    run("fit", "--config", config, "--dir=two", "--data.batch_size=16", "--trainer.devices=2", cwd=tmp_path)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)
    with (tmp_path / "one/metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.99 * losses[0]  # the weights that agree have been trained
    for name, value in metrics(tmp_path / "one").items():
        if not name.startswith("train_"):
            assert metrics(tmp_path / "two")[name] == pytest.approx(value, abs=1e-5), name


def test_one_checkpoint_gives_the_same_test_metrics_and_predictions_on_one_and_two_ranks(tmp_path):
    """With BatchNorm, and 359 images in batches of 50: ranks and batches are uneven."""
    run("fit", "--config", DIGITS, "--dir=run", "--trainer.max_epochs=2", "--test_after_fit=false", cwd=tmp_path)
    found, predictions = [], []
    for devices in (1, 2):
        run("test", "--dir=run", "--data.batch_size=50", f"--trainer.devices={devices}", cwd=tmp_path)
        found.append({name: value for name, value in metrics(tmp_path / "run").items() if name.startswith("test_")})
        predictions.append(Run.read(tmp_path / "run").predictions("test"))
    assert set(found[0]) == {
        f"test_{name}" for name in ("loss", "accuracy", "balanced_accuracy", "auroc", "f1", "calibration_error")
    }
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    one, two = predictions
    assert one.probabilities == pytest.approx(two.probabilities, abs=1e-5)
    assert one.labels.tolist() == two.labels.tolist()
    assert one.rows.tolist() == two.rows.tolist() == DigitsDataModule().split_rows["test"].tolist()


def test_a_killed_run_of_two_ranks_goes_on_with_the_same_command(tmp_path):
    keys = ["fit", "--config", DIGITS, "--trainer.devices=2", "--trainer.max_epochs=16", "--checkpoint_every_n_steps=3"]
    run(*keys, "--dir=whole", cwd=tmp_path)
    command = [sys.executable, "-m", "lightning_automl", *keys, "--dir=killed"]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
        last = tmp_path / "killed/checkpoints/last.ckpt"
        while not last.exists():
            time.sleep(0.01)
            assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.3)
        assert first.poll() is None, "the run ended before it was killed"
        os.killpg(first.pid, 9)
        first.wait()
    run(*keys, "--dir=killed", cwd=tmp_path)
    assert "going on from" in (tmp_path / "killed/log.txt").read_text()
    killed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_a_mistake_is_told_once_by_two_ranks(config, tmp_path):
    ran = run(
        *("fit", "--config", config, "--dir=run", "--trainer.devices=2", "--monitor=val_acc"), cwd=tmp_path, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.count("monitor 'val_acc' is not logged by ClassificationTask") == 1


def test_processes_started_from_outside_need_a_directory_in_common(config, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    keys = ["-m", "lightning_automl", "fit", "--config", config, "--trainer.devices=2", "--trainer.max_epochs=1"]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 300}
    ran = subprocess.run([*command, *keys], **options)
    assert ran.returncode != 0
    assert ran.stderr.count("several processes were started from outside without --dir") == 1
    ran = subprocess.run([*command, *keys, "--dir=run"], **options)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"
