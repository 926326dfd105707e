"""Networks of genotypes on the command line: every way to name one, and runs that outlive what they were given."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lightning_automl.models import load_genotype
from lightning_automl.models.genotype import random_genotype
from lightning_automl.parser import adapt_jsonargparse
from lightning_automl.results.network import trained_task
from lightning_automl.results.run import Run
from lightning_automl.trial import _Reader

SPACE = "--model.init_args.model.init_args"
GENOTYPE = f"{SPACE}.genotype"
NETWORK = {"class_path": "GenotypeNetwork", "init_args": {"channels": 4, "cells": 3}}
EDGES = [[["sep_conv_3x3", 0], ["max_pool_3x3", 1]], [["skip_connect", 0], ["dil_conv_5x5", 2]]]
CELL = {"normal": EDGES, "normal_concat": [2, 3], "reduce": EDGES, "reduce_concat": [2, 3]}
RESIDUAL = "|nor_conv_3x3~0|+|skip_connect~0|none~1|+|none~0|avg_pool_3x3~1|nor_conv_1x1~2|"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a config of a small network of a genotype for two batches of the digits; its path."""
    monkeypatch.chdir(tmp_path)

    def write(**network):
        network = NETWORK | {"init_args": NETWORK["init_args"] | network}
        config = {
            "model": {"class_path": "ClassificationTask", "init_args": {"model": network}},
            "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 32}},
            "trainer": {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2},
            "test_after_fit": False,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return "--config=config.yaml"

    return write


@pytest.fixture
def run(command, written):
    """`fit` it into the directory `run`."""
    return lambda *arguments, **network: command("fit", written(**network), "--dir=run", *arguments)


@pytest.fixture
def resolved(written):
    """The genotype in the config that `fit` would write into the run's directory."""

    def read(*arguments, **network):
        adapt_jsonargparse()
        config = _Reader.resolved([written(**network), *map(str, arguments)])
        return config["model"]["init_args"]["model"]["init_args"]["genotype"]

    return read


def kept():
    with open("run/config.yaml") as file:
        return yaml.safe_load(file)["model"]["init_args"]["model"]["init_args"]["genotype"]


def save(path, content=CELL):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


WAYS = {
    "default": ((), "darts_v2"),
    "name": ((GENOTYPE, "darts_v1"), "darts_v1"),
    "file": ((GENOTYPE, "found/genotype.json"), CELL),
    "directory": ((GENOTYPE, "found"), CELL),
    "json": ((f"{GENOTYPE}={json.dumps(CELL)}",), CELL),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_config_of_a_run_holds_its_genotype_however_it_was_given(resolved, tmp_path, way):
    arguments, expected = WAYS[way]
    save(tmp_path / "found/genotype.json")
    given = resolved(*arguments)
    assert "found" not in str(given)
    assert load_genotype(given) == load_genotype(expected)


@pytest.mark.parametrize("given", [CELL, "darts_v1", "found/genotype.json", "found"], ids=str)
def test_a_config_names_its_genotype_in_the_same_ways_and_the_command_line_replaces_it(resolved, tmp_path, given):
    save(tmp_path / "found/genotype.json")
    first = resolved(genotype=given)
    assert "found" not in str(first)
    assert load_genotype(first) == load_genotype("darts_v1" if given == "darts_v1" else CELL)
    assert resolved(GENOTYPE, "darts_v2", genotype=given) == "darts_v2"
    assert resolved(genotype=first) == first  # as the run's own config is read again


def test_architectures_of_nas_bench_201_are_named_in_its_notation(run):
    answer = run(f"{SPACE[:-10]}=NasBench201Network", f"{SPACE}.cells_per_stage=1", f"{GENOTYPE}={RESIDUAL}")
    assert answer.status == 0, answer.err
    assert kept() == RESIDUAL
    assert trained_task(Run.read(Path("run"))).model.genotype == load_genotype(RESIDUAL)


def test_a_random_genotype_is_that_of_its_seed(run):
    assert run(f"{SPACE}.random=3").status == 0
    built = trained_task(Run.read(Path("run"))).model.genotype
    assert built == random_genotype(load_genotype(kept()), 3) != load_genotype(kept())


@pytest.mark.slow
def test_a_run_outlives_the_file_of_its_genotype(run, command, tmp_path):
    """With auxiliary head, drop path and averaged weights."""
    path = save(tmp_path / "found/genotype.json")
    arguments = (
        *(GENOTYPE, path),
        *(
            f"{SPACE}.auxiliary=true",
            "--trainer.callbacks+=DropPathSchedule",
            "--trainer.callbacks+=EMAWeightAveraging",
        ),
        "--trainer.callbacks.init_args.decay=0.5",
    )
    assert run(*arguments).status == 0
    shutil.rmtree(tmp_path / "found")
    answer = run(*arguments, "--trainer.max_epochs=2")  # the same command, with a larger limit
    assert answer.status == 0, answer.err
    assert "found" in answer.err
    assert load_genotype(kept()) == load_genotype(CELL)
    assert command("fit", "--dir=run", "--trainer.max_epochs=3").status == 0
    assert command("test", "--dir=run").status == 0
    assert command("report", "run").status == 0
    answer = command("export", "run", "--format=safetensors")
    assert answer.status == 0, answer.err
    task = trained_task(Run.read(Path("run")))
    assert task.model.auxiliary
    assert task.model.genotype == load_genotype(CELL)


def test_a_genotype_that_has_changed_since_is_noticed(run, tmp_path):
    path = save(tmp_path / "found/genotype.json")
    assert run(GENOTYPE, path).status == 0
    save(path, CELL | {"normal_concat": [3]})
    answer = run(GENOTYPE, path, "--trainer.max_epochs=2")
    assert answer.status == 2
    assert "genotype" in answer.err
    assert "another --dir to start anew" in answer.err


@pytest.mark.slow
def test_a_search_outlives_the_file_of_its_genotype(command, written, warm_server, tmp_path):
    path = save(tmp_path / "found/genotype.json")
    search = {
        "run": written()[len("--config=") :],
        "trials": 1,
        "space": {"model.init_args.model.init_args.random": {"choice": [0, 1]}},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    keys = ("search", "--config=search.yaml", "--dir=study", f"--run.{GENOTYPE[2:]}={path}")
    assert command(*keys).status == 0
    path.unlink()
    answer = command(*keys, "--trials=2")
    assert answer.status == 0, answer.err
    for number in range(2):
        config = yaml.safe_load((tmp_path / f"study/trials/000{number}/config.yaml").read_text())
        assert load_genotype(config["model"]["init_args"]["model"]["init_args"]["genotype"]) == load_genotype(CELL)


def test_images_are_classified_by_a_network_with_auxiliary_head(run, command, tmp_path):
    from PIL import Image

    assert run(f"{SPACE}.auxiliary=true", f"{SPACE}.drop_path=0.5").status == 0
    for number in range(3):
        Image.new("L", (8, 8), 80 * number).save(tmp_path / f"{number}.png")
    answer = command("classify", "run", "0.png", "1.png", "2.png", "--out=a.csv")
    assert answer.status == 0, answer.err
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4
    first = (tmp_path / "a.csv").read_text()
    assert command("classify", "run", "0.png", "1.png", "2.png", "--out=a.csv").status == 0
    assert (tmp_path / "a.csv").read_text() == first


def test_the_weights_of_a_run_start_another(run, command):
    assert run(f"{SPACE}.auxiliary=true").status == 0
    answer = run(f"{SPACE}.auxiliary=true", f"{SPACE}.weights=run", "--dir=third", "--model.init_args.optimizer.lr=0.0")
    assert answer.status == 0, answer.err
    states = [dict(trained_task(Run.read(Path(name))).model.named_parameters()) for name in ("run", "third")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


MISTAKES = {
    "unknown name": ("darts_v3", "no genotype is called 'darts_v3'"),
    "no file": ("nowhere.json", "'nowhere.json'"),
    "no JSON": ("broken.json", "broken.json cannot be read as JSON"),
    "a list": ("list.json", "list.json is no genotype"),
    "unknown operation": ("operation.json", "unknown operation 'sep_conv_9x9'"),
    "source": ("source.json", "source 4"),
    "misspelt key": ("key.json", "unknown key 'norml'; did you mean normal"),
    "other space": (RESIDUAL, "one input and those of the network two inputs; use NasBench201Network"),
    "no search": ("empty", "empty has no genotype.json"),
    "number": ("5", "'5'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(run, tmp_path, mistake):
    given, message = MISTAKES[mistake]
    (tmp_path / "broken.json").write_text('{"normal": ')
    save(tmp_path / "list.json", [1])
    save(tmp_path / "operation.json", CELL | {"normal": [[["sep_conv_9x9", 0], ["max_pool_3x3", 1]]]})
    save(tmp_path / "source.json", CELL | {"normal": [[["sep_conv_3x3", 4], ["max_pool_3x3", 1]]]})
    save(tmp_path / "key.json", {"norml" if key == "normal" else key: value for key, value in CELL.items()})
    (tmp_path / "empty").mkdir()
    answer = run(f"{GENOTYPE}={given}")
    assert answer.status == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("argument", ["random", "weights", "mean"])
def test_null_takes_the_place_of_what_a_config_says_of_a_network(written, argument):
    given = {"random": 3, "weights": "weights.ckpt", "mean": [0.5]}[argument]
    adapt_jsonargparse()
    config = _Reader.resolved([written(**{argument: given}), f"{SPACE}.{argument}=null"])
    network = config["model"]["init_args"]["model"]["init_args"]
    assert (network[argument], network["channels"]) == (None, 4)
