"""An architecture search as a run: what ends it, what it leaves, and that every command works on its directory."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from searches import rows_of

from lightning_automl.__main__ import main
from lightning_automl.models import load_genotype

#: A space in which every genotype has four skip connections, so that SkipStop ends the search when it may.
CONFIG = {
    "model": {
        "class_path": "DartsTask",
        "init_args": {
            "model": {
                "class_path": "DartsSpace",
                "init_args": {"channels": 2, "cells": 3, "nodes": 2, "operations": ["none", "skip_connect"]},
            },
        },
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 64, "arch_fraction": 0.5}},
    "trainer": {"max_epochs": 4, "limit_train_batches": 3, "limit_val_batches": 1, "accelerator": "cpu"},
    "test_after_fit": False,
}
GUARD = ("--trainer.callbacks+=SkipStop", "--trainer.callbacks.not_before=1")


def read(path):
    return json.loads(path.read_text())


def epochs_of(directory):
    return [each["epoch"] for each in read(directory / "architecture.json")["epochs"]]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "search.yaml"


@pytest.fixture(scope="session")
def ended_search(tmp_path_factory):
    """A search of four epochs that a guard has ended after the second."""
    home = tmp_path_factory.mktemp("ended")
    (home / "search.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["fit", "--config", str(home / "search.yaml"), "--dir", str(home / "run"), *GUARD]) == 0
    return home / "run"


@pytest.fixture
def ended(ended_search, tmp_path):
    """A copy of it."""
    return shutil.copytree(ended_search, tmp_path / "ended")


def test_a_guard_ends_a_run_which_is_finished_then(ended_search):
    record = read(ended_search / "architecture.json")
    assert epochs_of(ended_search) == [0, 1]
    (guard,) = record["guards"]
    assert (guard["name"], guard["fired"]) == ("SkipStop", True)
    assert guard["settings"] == {"skips": 2, "kind": "normal", "patience": 1, "not_before": 1}
    assert record["chosen"]["epoch"] == 1
    assert record["chosen"]["reason"] == guard["sentence"]
    assert load_genotype(ended_search).to_dict() == record["epochs"][1]["genotype"]
    summary = read(ended_search / "summary.json")
    assert (summary["status"], summary["test_opened"]) == ("finished", 0)
    assert summary["artefacts"]["genotype"] == "genotype.json"
    assert summary["artefacts"]["architecture"] == "architecture.json"
    for name in ("genotype.svg", "genotype.png", "metrics.csv", "checkpoints/best.ckpt"):
        assert (ended_search / name).exists()
    streams = read(ended_search / "data.json")["streams"]
    both = [sum(pair) for pair in zip(streams["train"], streams["arch"], strict=True)]
    assert both == read(ended_search / "data.json")["counts"]["train"]


def test_a_search_that_a_guard_has_ended_stays_ended(ended, command):
    before = {name: (ended / name).read_bytes() for name in ("architecture.json", "genotype.json", "metrics.csv")}
    answer = command("fit", "--dir", ended)
    assert answer.status == 0, answer.err
    assert "is finished" in answer.out
    weights = torch.load(ended / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    answer = command("fit", "--dir", ended, "--trainer.max_epochs=9")
    assert answer.status == 0, answer.err
    assert {name: (ended / name).read_bytes() for name in before} == before
    again = torch.load(ended / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert read(ended / "summary.json")["status"] == "finished"


def test_a_search_goes_on_with_more_epochs_until_a_guard_ends_it(command, config, tmp_path):
    keys = ("--config", config, *GUARD[:1], "--trainer.callbacks.not_before=2")
    assert command("fit", *keys, "--dir", "run", "--trainer.max_epochs=1").status == 0
    assert epochs_of(tmp_path / "run") == [0]
    assert read(tmp_path / "run/architecture.json")["chosen"] == {"epoch": 0, "reason": "the last epoch"}
    assert command("fit", "--dir", "run", "--trainer.max_epochs=8").status == 0
    assert epochs_of(tmp_path / "run") == [0, 1, 2]
    assert read(tmp_path / "run/architecture.json")["guards"][0]["fired"]
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_the_supernet_can_be_validated_tested_and_predicted_with(ended, command):
    kept = {name: (ended / name).read_bytes() for name in ("architecture.json", "genotype.json", "genotype.png")}
    for name, key in (("validate", "val_accuracy"), ("test", "test_accuracy")):
        answer = command(name, "--dir", ended)
        assert answer.status == 0, answer.err
        assert key in read(ended / "summary.json")["metrics"]
    answer = command("predict", "--dir", ended)
    assert answer.status == 0, answer.err
    assert (ended / "predictions.csv").exists()
    assert read(ended / "summary.json")["test_opened"] == 2
    assert {name: (ended / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(("asked", "opened"), [("true", 1), ("false", 0)])
def test_the_test_split_is_opened_if_asked(command, config, tmp_path, asked, opened):
    answer = command("fit", "--config", config, "--dir", "run", "--trainer.max_epochs=1", "--test_after_fit", asked)
    assert answer.status == 0, answer.err
    summary = read(tmp_path / "run/summary.json")
    assert summary["test_opened"] == opened
    assert ("test_accuracy" in summary["metrics"]) == bool(opened)
    assert load_genotype(tmp_path / "run").skips("normal") == 4


def test_the_whole_train_split_and_an_automatic_batch_size(command, config, tmp_path):
    keys = ("--data.init_args.batch_size=auto", "--data.init_args.train_on_val=true", "--trainer.limit_val_batches=0")
    keys += ("--data.init_args.arch_augment=false", "--data.init_args.sampling=balanced", "--trainer.max_epochs=1")
    answer = command("fit", "--config", config, "--dir", "run", *keys)
    assert answer.status == 0, answer.err
    assert epochs_of(tmp_path / "run") == [0]


def test_a_search_with_costs_and_averaged_weights_goes_on_is_tested_and_used(command, config, tmp_path):
    keys = ("--model.init_args.cost.weight=0.1", "--trainer.callbacks+=EMAWeightAveraging", "--trainer.max_epochs=1")
    keys += ("--model.init_args.arch_optimizer=torch.optim.Adam", "--model.init_args.arch_optimizer.lr=0.01")
    answer = command("fit", "--config", config, "--dir", "run", *keys)
    assert answer.status == 0, answer.err
    image = tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    for arguments in (
        ("test", "--dir", "run"),
        ("fit", "--dir", "run", "--trainer.max_epochs=2"),
        ("classify", "run", image),
    ):
        answer = command(*arguments)
        assert answer.status == 0, (arguments, answer.err)
    assert all(each["cost"]["expected"] > 0 for each in read(tmp_path / "run/architecture.json")["epochs"])


def test_a_run_that_searches_nothing_leaves_no_architecture(finished_digits):
    assert not [path for path in finished_digits.iterdir() if path.stem in ("genotype", "architecture")]
    assert "streams" not in read(finished_digits / "data.json")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (("--trainer.callbacks+=SkipStop",), "SkipStop watches an architecture search, and ClassificationTask is none"),
        (("--data.init_args.arch_fraction=0.5",), "arch_fraction makes a stream of batches for an architecture search"),
        (("--data.init_args.arch_fraction=2",), "arch_fraction is 2.0; it must lie between 0 and 1"),
    ],
)
def test_what_belongs_to_searches_is_refused_elsewhere(fit, keys, sentence):
    answer = fit("--dir", "run", *keys)
    assert answer.status == 2
    assert sentence in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (("--trainer.overfit_batches=2",), "arch_fraction and trainer.overfit_batches exclude each other"),
        ((*GUARD[:1], "--trainer.callbacks.skips=0"), "skips is 0; it is a number of skip connections, 1 or more"),
        ((*GUARD[:1], "--model.init_args.model.init_args.max_skips=1"), "SkipStop waits for 2 skip connections"),
    ],
)
def test_a_mistake_in_a_search_is_one_sentence(command, config, keys, sentence):
    answer = command("fit", "--config", config, "--dir", "run", *keys)
    assert answer.status == 2
    assert sentence in answer.err
    assert "Traceback" not in answer.err


def test_searches_can_be_the_trials_of_a_search(command, warm_server, tmp_path):
    run = json.loads(json.dumps(CONFIG))
    run["trainer"] |= {"max_epochs": 2, "callbacks": [{"class_path": "SkipStop", "init_args": {"not_before": 0}}]}
    run["model"]["init_args"]["arch_optimizer"] = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-4}}
    path = "model.init_args.arch_optimizer.init_args.lr"
    space = {"lr": {"log_float": [1e-4, 1e-2], "path": path}}
    study = {"run": run, "monitor": "val_accuracy", "trials": 2, "space": space}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    answer = command("search", "--config", "study.yaml", "--dir", "study")
    assert answer.status == 0, answer.err
    assert [row["state"] for row in rows_of(tmp_path / "study")] == ["COMPLETE", "COMPLETE"]
    for trial in sorted((tmp_path / "study/trials").iterdir()):
        assert load_genotype(trial).skips("normal") == 4
        assert epochs_of(trial) == [0]
    best = yaml.safe_load((tmp_path / "study/best.yaml").read_text())
    assert best["model"]["class_path"].endswith("DartsTask")
