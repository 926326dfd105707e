"""Fine-tuning as a run: its directory alone is enough to go on, test, export and report."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import onnx
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_automl.adapters import load_adapter
from lightning_automl.models import ResNet
from lightning_automl.results.network import trained_task
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
#: What of the task is set for every way to fine-tune that leaves something frozen.
WAYS = {
    "head": {},
    "block": {"unfreeze": 1, "batch_norm": "reestimated"},
    "lora": {"adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "scale": "learnable"}}, "scale_lr": 0.1},
    "norms": {
        "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "scale": "learnable"}},
        "batch_norm": "trained",
    },
    "conv": {"adapter": {"class_path": "ConvAdapterConfig", "init_args": {"scheme": "residual_parallel"}}},
    "low rank": {"adapter": {"class_path": "LowRankConfig", "init_args": {"rank": 3}}},
}


def write_config(folder, way, **trainer):
    """A config with pretrained weights that lie beside it."""
    torch.manual_seed(3)
    torch.save(ResNet(10, 1, depth=8, width=8).state_dict(), folder / "first.pth")
    network = {"class_path": "ResNet", "init_args": {"depth": 8, "width": 8, "weights": str(folder / "first.pth")}}
    config = {
        "model": {"class_path": "FinetuneTask", "init_args": {"model": network, "optimizer": SGD, **WAYS[way]}},
        "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 64}},
        "trainer": {"max_epochs": 2, "limit_train_batches": 6, "precision": "32-true", **trainer},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return folder / "c.yaml"


def checkpoint(directory, name="last"):
    return torch.load(directory / f"checkpoints/{name}.ckpt", weights_only=True)


def metrics(directory):
    return json.loads((directory / "summary.json").read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_directory_is_enough_when_the_first_weights_are_gone(command, tmp_path, way):
    config = write_config(tmp_path, way)
    answer = command("fit", "--config", config, "--dir=run")
    assert answer.status == 0, answer.err
    (tmp_path / "first.pth").unlink()
    run = tmp_path / "run"
    tested = metrics(run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["network"]["class"] == "ResNet"
    assert 0 < environment["network"]["trained_share"] < 1
    for each in ("test", "predict"):
        answer = command(each, "--dir=run")
        assert answer.status == 0, answer.err
    assert metrics(run) == pytest.approx(tested, rel=1e-5)
    answer = command("export", "run", "--format=safetensors")
    if way == "conv":
        assert answer.status == 2
        assert "the adapter of run stays beside the layers" in answer.err
        answer = command("export", "run", "--format=torch")
    assert answer.status == 0, answer.err
    assert command("report", "run").status == 0
    grown = command("fit", "--dir=run", "--trainer.max_epochs=3")
    assert grown.status == 0, grown.err
    assert "going on from" in grown.err
    assert (run / "adapter").exists() == ("adapter" in WAYS[way] and way != "low rank")


def test_an_export_of_lora_has_the_layers_of_the_base_network(command, tmp_path):
    command("fit", "--config", write_config(tmp_path, "lora"), "--dir=run")
    answer = command("export", "run")
    assert answer.status == 0, answer.err
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "run/model.onnx").graph.node)
    assert (counts["Conv"], counts["Gemm"]) == (7, 1)
    answer = command("export", "run", "--format=safetensors")
    tensors = load_file(tmp_path / "run/model.safetensors")
    network = ResNet(10, 1, depth=8, width=8)
    assert {name.removeprefix("model.") for name in tensors} - {"mean", "std"} == network.state_dict().keys()
    assert not torch.equal(tensors["model.layer1.0.conv1.weight"], torch.load("first.pth")["layer1.0.conv1.weight"])


def test_the_adapter_of_a_run_belongs_to_its_first_weights_also_when_it_was_continued(command, tmp_path):
    config = write_config(tmp_path, "norms")
    command("fit", "--config", config, "--dir=run", "--trainer.max_epochs=1")
    command("fit", "--dir=run", "--trainer.max_epochs=2")
    model = load_adapter(ResNet(10, 1, depth=8, width=8, weights="first.pth"), tmp_path / "run/adapter").eval()
    task = trained_task(Run.read(tmp_path / "run"))
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(task.normalized(images)), task(images), atol=1e-5, rtol=1e-5)


def test_the_adapter_of_a_run_in_half_precision_belongs_to_its_first_weights(command, tmp_path):
    answer = command("fit", "--config", write_config(tmp_path, "norms"), "--dir=run", "--trainer.precision=bf16-true")
    assert answer.status == 0, answer.err
    load_adapter(ResNet(10, 1, depth=8, width=8, weights="first.pth"), tmp_path / "run/adapter")
    assert command("test", "--dir=run").status == 0


def test_what_an_adapter_cannot_be_put_on_is_told_in_one_sentence(command, tmp_path):
    config = write_config(tmp_path, "lora")
    answer = command("fit", "--config", config, "--dir=run", "--model.adapter.target_modules=[bn1]")
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith("lightning-automl: bn1 ")
    assert "Traceback" not in answer.err


def test_a_value_that_an_adapter_refuses_is_told_by_the_adapter(command, tmp_path):
    keys = ("fit", "--config", write_config(tmp_path, "head"), "--dir=run", "--model.adapter=LowRankConfig")
    for given, sentence in (
        ("energy=1.5", "energy is 1.5; it is a share in (0, 1]"),
        ("rank=many", "model.adapter.rank: 'many' is not a whole number"),
        ("ranks_=1", "unknown argument of LowRankConfig: 'ranks_'; did you mean 'ranks'"),
    ):
        answer = command(*keys, f"--model.adapter.{given}")
        assert answer.status == 2
        assert answer.err.splitlines()[-1].startswith(f"lightning-automl: {sentence}")


def test_the_network_of_a_run_can_be_the_first_weights_of_another(command, tmp_path):
    command("fit", "--config", write_config(tmp_path, "head"), "--dir=run")
    task = trained_task(Run.read(tmp_path / "run"))
    network = ResNet(10, 1, depth=8, width=8, weights="run")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in task.model.state_dict().items())
    command("fit", "--config", write_config(tmp_path, "lora"), "--dir=adapted")
    with pytest.raises(UserError, match="holds an adapter and not a network; give the file of lightning-automl export"):
        ResNet(10, 1, depth=8, width=8, weights="adapted")


def test_a_run_without_its_frozen_rest_says_so(command, tmp_path):
    command("fit", "--config", write_config(tmp_path, "head"), "--dir=run")
    (tmp_path / "run/checkpoints/base.safetensors").unlink()
    answer = command("test", "--dir=run")
    assert answer.status == 2
    assert "base.safetensors is missing, which holds the frozen rest of the network; restore it" in answer.err
    assert answer.err.count("\n") == 1


def test_frozen_weights_are_not_those_of_a_command_that_was_corrected(command, tmp_path):
    config = write_config(tmp_path, "head")
    assert command("fit", "--config", config, "--dir=run", "--monitor=nothing").status == 2
    (tmp_path / "run/checkpoints/last.ckpt").unlink(missing_ok=True)
    torch.save(ResNet(10, 1, depth=8, width=8).state_dict(), tmp_path / "first.pth")
    assert command("fit", "--config", config, "--dir=run").status == 0
    base = load_file(tmp_path / "run/checkpoints/base.safetensors")
    assert torch.equal(base["model.conv1.weight"], torch.load("first.pth")["conv1.weight"])


@pytest.fixture
def one_thread():
    """As many as the other processes of a test have, so that sums are the same bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["block", "norms", "conv", "low rank"])
def test_a_killed_run_goes_on_to_the_same_weights(command, one_thread, tmp_path, way):
    average = [{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}}]
    config = write_config(tmp_path, way, max_epochs=6, callbacks=average)
    keys = ["fit", "--config", config, "--checkpoint_every_n_steps=2"]
    assert command(*keys, "--dir=whole").status == 0
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(
            [sys.executable, "-m", "lightning_automl", *keys, "--dir=killed"],
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env=ENVIRONMENT,
        )
        last = tmp_path / "killed/checkpoints/last.ckpt"
        while not last.exists():
            time.sleep(0.005)
            assert first.poll() is None, (tmp_path / "log").read_text()
        first.send_signal(signal.SIGKILL)
        first.wait()
    (tmp_path / "first.pth").unlink()
    assert command(*keys, "--dir=killed").status == 0
    assert "going on from" in (tmp_path / "killed/log.txt").read_text()
    for name in ("last", "best"):
        killed, whole = (checkpoint(tmp_path / run, name) for run in ("killed", "whole"))
        for part in ("state_dict", "current_model_state"):
            assert killed[part].keys() == whole[part].keys()
            for key in whole[part]:
                assert torch.equal(killed[part][key], whole[part][key]), key
    tables = []
    for run in ("killed", "whole"):
        with (tmp_path / run / "metrics.csv").open() as file:
            tables.append([{k: v for k, v in row.items() if k.startswith("val_")} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "conv", "block"])
def test_two_ranks_end_with_the_weights_of_one_process(command, tmp_path, make_npz, way):
    config = write_config(tmp_path, way)
    # As many images as whole batches, which are then the same joint ones.
    data = make_npz(tmp_path / "data.npz", classes=10, channels=1, counts=(256, 40, 40))
    keys = ["fit", "--config", config, "--data=ArraysDataModule", f"--data.path={data}"]
    if way == "block":  # averages over batches are not those over halves of batches
        keys += ["--model.batch_norm=frozen"]
    assert command(*keys, "--dir=one", "--data.batch_size=64").status == 0
    keys += ["--dir=two", "--data.batch_size=32", "--trainer.devices=2"]
    ran = subprocess.run(
        [sys.executable, "-m", "lightning_automl", *keys],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    one, two = (checkpoint(tmp_path / directory)["state_dict"] for directory in ("one", "two"))
    first = torch.load(tmp_path / "first.pth", weights_only=True)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)
    head = next(name for name in one if name.endswith("weight") and "linear" in name)
    assert (one[head] - first["linear.weight"]).abs().max() > 1e-3  # the weights that agree have been trained
