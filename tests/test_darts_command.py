"""Architecture search on the command line: search, retrain, continue, control, report, and one's own classes."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT

from lightning_automl.__main__ import main
from lightning_automl.models import load_genotype
from lightning_automl.models.genotype import random_genotype
from lightning_automl.results.network import trained_task
from lightning_automl.results.run import Run

SEARCH = str(ROOT / "configs/nas/darts_digits.yaml")
RETRAIN = str(ROOT / "configs/nas/retrain_digits.yaml")
CONTROL = str(ROOT / "configs/nas/random_digits.yaml")
SPACE = "--model.init_args.model.init_args"
GENOTYPE = f"{SPACE}.genotype"
SMALL = (f"{SPACE}.channels=4", f"{SPACE}.cells=3", f"{SPACE}.nodes=2", "--model.init_args.warmup_epochs=1")
SHORT = ("--trainer.max_epochs=3", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")
NETWORK = (f"{SPACE}.channels=4", f"{SPACE}.cells=3")


@pytest.fixture(scope="session")
def finished_search(tmp_path_factory):
    """A search of three short epochs, its guards never firing."""
    directory = tmp_path_factory.mktemp("darts") / "darts"
    guards = ("--trainer.callbacks+=SkipStop", "--trainer.callbacks+=EigenvalueStop")
    assert main(["fit", "--config", SEARCH, "--dir", str(directory), *SMALL, *SHORT, *guards]) == 0
    return directory


@pytest.fixture
def darts(finished_search, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished_search, tmp_path / "darts")


def read(path):
    return json.loads(path.read_text())


def test_a_search_leaves_a_genotype_its_drawing_and_its_history(finished_search):
    genotype = load_genotype(finished_search / "genotype.json")
    assert len(genotype.normal) == len(genotype.reduce) == 2
    assert (finished_search / "genotype.svg").read_text().startswith("<?xml")
    assert (finished_search / "genotype.png").read_bytes().startswith(b"\x89PNG")
    record = read(finished_search / "architecture.json")
    assert [each["epoch"] for each in record["epochs"]] == [0, 1, 2]
    assert record["chosen"]["epoch"] == 2
    # in the warm-up nothing moves but the weights
    strengths = [torch.tensor(each["strengths"]["normal"]) for each in record["epochs"]]
    assert not torch.equal(strengths[0], strengths[1])
    summary = read(finished_search / "summary.json")
    assert summary["status"] == "finished"
    assert summary["test_opened"] == 0
    assert summary["artefacts"]["genotype"] == "genotype.json"


def test_the_network_of_a_found_genotype_is_trained_tested_and_used_without_its_file(darts, command, tmp_path):
    directory = tmp_path / "retrained"
    keys = ("--config", RETRAIN, "--dir", directory, *NETWORK, f"{GENOTYPE}={darts / 'genotype.json'}")
    found = load_genotype(darts / "genotype.json")
    answer = command("fit", *keys, *SHORT)
    assert answer.status == 0, answer.err
    (darts / "genotype.json").unlink()
    assert trained_task(Run.read(directory)).model.genotype.digest() == found.digest()
    for arguments in (
        ("test", "--dir", directory),
        ("fit", "--dir", directory, "--trainer.max_epochs=4"),
        ("report", directory),
        ("export", directory, "--format", "torch"),
    ):
        answer = command(*arguments)
        assert answer.status == 0, (arguments, answer.err)
    assert (
        "sep_conv" in (directory / "report.html").read_text() or "genotype" in (directory / "report.html").read_text()
    )


def test_a_search_goes_on_with_more_epochs(darts, command):
    before = read(darts / "architecture.json")["epochs"]
    answer = command("fit", "--dir", darts, "--trainer.max_epochs=5")
    assert answer.status == 0, answer.err
    record = read(darts / "architecture.json")
    assert [each["epoch"] for each in record["epochs"]] == [0, 1, 2, 3, 4]
    assert record["epochs"][:3] == before
    assert record["chosen"]["epoch"] == 4


def test_the_report_of_a_search_shows_its_genotype_and_guards(darts, command):
    answer = command("report", darts)
    assert answer.status == 0, answer.err
    page = (darts / "report.html").read_text()
    for word in ("SkipStop", "EigenvalueStop", "skip connections", "retrain_digits.yaml"):
        assert word in page


def test_random_genotypes_are_trained_as_the_found_one_is(darts, command, warm_server, tmp_path):
    control = tmp_path / "control"
    keys = (f"--run.model.init_args.model.init_args.genotype={darts / 'genotype.json'}",)
    small = [key.replace("--", "--run.", 1) for key in (*NETWORK, *SHORT)]
    answer = command("search", "--config", CONTROL, "--dir", control, "--workers=2", *keys, *small)
    assert answer.status == 0, answer.err
    found = load_genotype(darts / "genotype.json")
    genotypes = {}
    for path in sorted((control / "trials").iterdir()):
        config = yaml.safe_load((path / "config.yaml").read_text())
        network = config["model"]["init_args"]["model"]["init_args"]
        built = trained_task(Run.read(path)).model.genotype
        expected = found if network["random"] is None else random_genotype(found, network["random"])
        assert built.digest() == expected.digest()
        genotypes.setdefault(network["random"], []).append(config["seed_everything"])
    assert set(genotypes) == {None, 0, 1, 2, 3}
    assert all(sorted(seeds) == [1, 2] for seeds in genotypes.values())
    page = (control / "report.html").read_text()
    assert "Architectures" in page


def test_own_spaces_and_rules_come_by_their_names(command, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        """
from lightning_automl.models import DartsSpace
from lightning_automl.tasks import DartsTask


class MySpace(DartsSpace):
    pass


class MyDarts(DartsTask):
    pass
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((ROOT / "configs/nas/darts_digits.yaml").read_text())
    config["model"]["class_path"] = "mine.MyDarts"
    config["model"]["init_args"]["model"] |= {"class_path": "mine.MySpace"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    answer = command("fit", "--config", "own.yaml", "--dir", "own", *SMALL, *SHORT)
    assert answer.status == 0, answer.err
    assert (tmp_path / "own/genotype.json").exists()


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (f"{SPACE}.cells=2", "cells"),
        (f"{SPACE}.operations=[skip_connect,sepconv_3x3]", "sep_conv_3x3"),
        (f"{SPACE}.relaxation.class_path=PartialChannels --{SPACE[2:]}.relaxation.init_args.k=3", "k"),
        ("--data.init_args.arch_fraction=1.5", "arch_fraction"),
        ("--data.init_args.arch_fraction=null", "arch_fraction"),
        ("--trainer.accumulate_grad_batches=2", "accumulate"),
        ("--trainer.gradient_clip_val=1", "gradient_clip"),
        ("--model.init_args.warmup_epochs=-1", "warmup_epochs"),
    ],
)
def test_a_mistake_is_one_sentence(key, sentence, command):
    answer = command("fit", "--config", SEARCH, "--dir", "run", *SHORT, *key.split(" "))
    assert answer.status == 2
    assert sentence in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("genotype", "sentence"),
    [
        ("nowhere.json", "nowhere.json"),
        ("darts_v3", "darts_v2"),
        ("broken.json", "broken.json"),
        ("wrong.json", "source 7"),
    ],
)
def test_a_mistake_about_a_genotype_is_one_sentence(genotype, sentence, command, tmp_path):
    (tmp_path / "broken.json").write_text('{"normal": [[["sep_conv_3x3", 0]')
    (tmp_path / "wrong.json").write_text('{"normal": [[["sep_conv_3x3", 7]]], "normal_concat": [2]}')
    answer = command("fit", "--config", RETRAIN, "--dir", "run", *SHORT, f"{GENOTYPE}={genotype}")
    assert answer.status == 2
    assert sentence in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err
