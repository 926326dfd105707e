from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lightning_automl.results import Run
from lightning_automl.results.configuration import constructor_arguments, differing_settings


def test_what_a_config_file_says_is_what_differs(finished_digits):
    """The resolved config spells out every default; found are the values of configs/baseline/digits_cnn.yaml."""
    settings = {each.key: each.value for each in differing_settings(Run.read(finished_digits).config)}
    given = yaml.safe_load((ROOT / "configs/baseline/digits_cnn.yaml").read_text())
    expected = dict(flat("model", given["model"])) | dict(flat("data", given["data"])) | {"trainer.max_epochs": 3}
    # what the file says, but is the default anyway
    assert (expected.pop("model.optimizer.weight_decay"), expected.pop("model.model.units")) == (0.01, [128])
    assert settings == expected


def flat(key, spec):
    yield key, spec["class_path"].rsplit(".", 1)[-1]
    for name, value in spec.get("init_args", {}).items():
        if isinstance(value, dict) and "class_path" in value:
            yield from flat(f"{key}.{name}", value)
        else:
            yield f"{key}.{name}", value


def test_keys_of_the_run_and_lists_of_classes_are_told():
    config = {
        "model": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "bias": True, "device": None}},
        "trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}], "logger": False},
        "monitor": "val_auroc",
        "seed_everything": 0,
    }
    assert [tuple(each) for each in differing_settings(config)] == [
        ("model", "Linear", ""),
        ("model.in_features", 3, ""),
        ("trainer.callbacks.0", "EarlyStopping", ""),
        ("monitor", "val_auroc", "val_accuracy"),
    ]


def test_a_class_that_is_gone_counts_with_all_its_values():
    spec = {"class_path": "nowhere.Net", "init_args": {"depth": 1}}
    found = differing_settings({"model": spec, "trainer": {}})
    assert [tuple(each) for each in found] == [("model", "Net", ""), ("model.depth", 1, "")]


class Parent:
    def __init__(self, a=1, b=2): ...


class Passes(Parent):
    def __init__(self, c=3, **kwargs): ...


class Stops(Parent):
    def __init__(self, a=4): ...


@pytest.mark.parametrize(("cls", "expected"), [(Passes, {"c": 3, "a": 1, "b": 2}), (Stops, {"a": 4})])
def test_arguments_of_parents_count_where_they_are_passed_on(cls, expected):
    assert {name: each.default for name, each in constructor_arguments(cls).items()} == expected


def test_the_run_and_trainer_defaults_are_those_of_the_command_line(command, tmp_path):
    """A run that says nothing differs in nothing but its classes."""
    command("fit", "--model=ClassificationTask", "--model.model=TunableCNN", "--data=DigitsDataModule", "--dir=run",
            "--trainer.fast_dev_run=1")  # fmt: skip
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert {each.key for each in differing_settings(config)} == {
        "model",
        "model.model",
        "model.optimizer",
        "model.optimizer.fused",  # the task's default optimizer, spelt out
        "data",
        "trainer.fast_dev_run",
    }
