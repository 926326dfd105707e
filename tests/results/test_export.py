import json
import logging
import sys
from importlib import import_module

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors import safe_open

from lightning_automl.models import load_weights
from lightning_automl.results import export
from lightning_automl.results.export import SUFFIXES
from lightning_automl.results.network import trained_task
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(finished_digits):
    with torch.no_grad():
        return trained_task(Run.read(finished_digits))(IMAGES)


def facts_of(metadata):
    return {key: json.loads(metadata[key]) for key in ("class_names", "channels", "image_size", "window")}


FACTS = {"class_names": [str(digit) for digit in range(10)], "channels": 1, "image_size": [8, 8], "window": None}


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_gives_the_networks_outputs_for_any_batch_and_says_what_it_is(digits, expected, batch):
    path = export(digits, "onnx")
    assert path == digits / "model.onnx"
    session = onnxruntime.InferenceSession(path)
    logits, probabilities = session.run(None, {"images": IMAGES[:batch].numpy()})
    assert logits == pytest.approx(expected[:batch].numpy(), abs=1e-4)
    assert probabilities == pytest.approx(expected[:batch].softmax(1).numpy(), abs=1e-5)
    assert facts_of(session.get_modelmeta().custom_metadata_map) == FACTS


def test_torch_export_gives_the_networks_logits_for_any_batch_and_says_what_it_is(digits, expected):
    path = export(digits, "torch")
    facts = dict.fromkeys(FACTS, "")
    module = torch.export.load(path, extra_files=facts).module()
    for batch in (1, 3):
        torch.testing.assert_close(module(IMAGES[:batch]), expected[:batch], atol=1e-4, rtol=0)
    assert facts_of(facts) == FACTS


def test_safetensors_are_the_weights_of_the_network(digits, expected):
    path = export(digits, "safetensors")
    task = trained_task(Run.read(digits))
    for parameter in task.model.parameters():
        torch.nn.init.zeros_(parameter)
    report = load_weights(task.model, str(path))
    assert (report.missing, report.unused) == ([], ["mean", "std"])
    with torch.no_grad():
        torch.testing.assert_close(task(IMAGES), expected)
    with safe_open(path, "pt") as file:
        assert facts_of(file.metadata()) == FACTS
    assert path.stat().st_mode & 0o044  # others may read it, as any other file


NETWORKS = {
    "ResNet": {"depth": 8},
    "DenseNet": {"depth": 16, "growth": 4},
    "EfficientNet": {"phi": 0.5},
    "Backbone": {"name": "mobilenet_v3_small", "pretrained": False, "resize": 40},
    "lite": {"name": "efficientnet_lite0"},
    "GenotypeNetwork": {"channels": 4, "cells": 3, "auxiliary": True, "drop_path": 0.2},
    "NasBench201Network": {"channels": 4, "cells_per_stage": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_every_kind_of_network_can_be_exported(command, make_npz, name, format):
    make_npz("data.npz", classes=2, channels=1, side=32, counts=(8, 4, 4))
    network = {"class_path": "Backbone" if name == "lite" else name, "init_args": NETWORKS[name]}
    loss = {"class_path": "BinaryCrossEntropy"} if name == "ResNet" else None
    config = {
        "model": {"class_path": "ClassificationTask", "init_args": {"model": network, "loss": loss}},
        "data": {"class_path": "ArraysDataModule", "init_args": {"path": "data.npz", "batch_size": 4}},
        "trainer": {"max_epochs": 1},
    }
    with open("c.yaml", "w") as file:
        yaml.safe_dump(config, file)
    assert command("fit", "--config=c.yaml", "--dir=run").status == 0
    answer = command("export", "run", f"--format={format}")
    assert answer.status == 0, answer.err
    assert f"run/model{SUFFIXES[format]}: outputs differ by at most" in answer.err


def test_the_network_of_a_search_is_not_exported_but_that_of_its_genotype(command, make_npz):
    make_npz("data.npz", classes=2, channels=1, side=8, counts=(16, 4, 4))
    keys = ["--model=DartsTask", "--model.model=NasBench201Space", "--model.model.channels=2", "--trainer.max_epochs=1"]
    keys += ["--model.model.cells_per_stage=1", "--data=ArraysDataModule", "--data.path=data.npz", "--dir=run"]
    assert command("fit", *keys, "--data.batch_size=8", "--data.arch_fraction=0.5").status == 0
    for format in SUFFIXES:
        answer = command("export", "run", f"--format={format}")
        assert answer.status == 2
        assert answer.err.startswith("lightning-automl: run is an architecture search, whose network holds all cand")
        assert answer.err.count("\n") == 1


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_file_that_does_not_agree_is_removed_and_the_old_one_stays(command, digits, monkeypatch, format):
    module = import_module("lightning_automl.results.export")

    path = export(digits, format)
    before = path.read_bytes()
    write, read = module._FORMATS[format]

    def write_wrongly(task, trained, partial):
        with torch.no_grad():
            task.model.linear.bias[0] += 0.5
        write(task, trained, partial)
        with torch.no_grad():
            task.model.linear.bias[0] -= 0.5

    monkeypatch.setitem(module._FORMATS, format, (write_wrongly, read))
    answer = command("export", digits, f"--format={format}")
    assert answer.status == 1
    assert answer.err.startswith(f"lightning-automl: the {format} file does not give what the network gives: outputs")
    assert answer.err.count("\n") == 1
    assert path.read_bytes() == before
    assert not list(digits.glob(".*.tmp"))


def test_outputs_that_are_no_numbers_do_not_agree(digits, monkeypatch):
    module = import_module("lightning_automl.results.export")

    monkeypatch.setitem(
        module._FORMATS, "onnx", (module._write_onnx, lambda *_: lambda images: torch.full((len(images), 10), np.nan))
    )
    with pytest.raises(module.DisagreementError, match="differ by inf"):
        export(digits, "onnx")


def test_the_difference_is_told(digits, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_automl"):
        export(digits, "onnx", digits / "elsewhere" / "net.onnx")
    assert (digits / "elsewhere" / "net.onnx").exists()
    difference = float(caplog.messages[-1].split("at most ")[1].split()[0])
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--format=tflite"], "argument --format: invalid choice: 'tflite' (choose from"),
        (["--format=onnx", "--out=a.pt2"], "a file of the format onnx ends with .onnx, not 'a.pt2'"),
        (["--out=."], "a file of the format onnx ends with .onnx, not ''"),
        (["--out=folder.onnx"], "no file can be written at folder.onnx: it is a folder; give another path"),
        (["--out=/proc/a.onnx"], "no file can be written at /proc/a.onnx: "),
        (["--formt=onnx"], "unrecognized arguments: --formt=onnx"),
    ],
)
def test_mistakes_end_with_one_sentence(command, finished_digits, tmp_path, arguments, sentence):
    (tmp_path / "folder.onnx").mkdir()
    answer = command("export", finished_digits, *arguments)
    assert answer.status == 2
    assert answer.err.startswith(f"lightning-automl: {sentence}")
    assert answer.err.count("\n") == 1


def test_without_onnx_the_extra_is_named(finished_digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'pip install "lightning-automl\[onnx\]"'):
        export(finished_digits, "onnx")
