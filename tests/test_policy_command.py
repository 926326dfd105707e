"""Policies on the command line: `train_policy` of a run."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_automl.augment import Policy, TrivialAugment, load_policy, save_policy

POLICY = Policy([[{"operation": "rotate", "magnitude": 0.5}, {"operation": "brightness", "probability": 0.5}]])
KEY = "--data.init_args.train_policy"


def test_a_run_keeps_its_policy_file_and_refuses_another_one_when_it_goes_on(fit, command, tmp_path):
    search = tmp_path / "search" / "policy.json"
    save_policy(POLICY, search)
    assert fit("--dir=run", f"{KEY}={search}").status == 0
    assert load_policy("run/policy.json") == POLICY
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"]["init_args"]["train_policy"] == str(search)
    assert json.loads(Path("run/summary.json").read_text())["artefacts"]["policy"] == "policy.json"

    save_policy(TrivialAugment(), search)
    answer = command("fit", "--dir=run", "--trainer.max_epochs=2")
    assert answer.status == 2
    assert "train_policy is not the policy that run was started with" in answer.err
    assert load_policy("run/policy.json") == POLICY

    shutil.rmtree(search.parent)
    assert command("test", "--dir=run").status == 0
    assert command("fit", "--dir=run", "--trainer.max_epochs=2").status == 0
    assert load_policy("run/policy.json") == POLICY


def test_a_policy_is_named_by_its_short_class_and_has_arguments(fit):
    assert fit("--dir=run", f"{KEY}.class_path=TrivialAugment", f"{KEY}.init_args.space=radiograph").status == 0
    assert load_policy("run/policy.json") == TrivialAugment("radiograph")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((f"{KEY}=gone/policy.json",), "there is no policy file gone/policy.json"),
        ((f"{KEY}=other.json",), "version 7"),
        ((f"{KEY}=TrivialAugmen",), "did you mean TrivialAugment?"),
        ((f"{KEY}.class_path=TrivialAugmen",), "did you mean 'TrivialAugment'"),
        ((f"{KEY}=TrivialAugment", f"{KEY}.spaec=natural"), "'spaec'"),
        ((f"{KEY}=TrivialAugment", f"{KEY}.space=radiogram"), "did you mean radiograph?"),
        ((f"{KEY}=Policy", f'{KEY}.sub_policies=[[{{"operation": "shearx"}}]]'), "did you mean shear_x?"),
        ((f"{KEY}=Policy", f'{KEY}.sub_policies=[[{{"operation": "rotate", "probability": 2}}]]'), "[0, 1]"),
        (
            (f"{KEY}=Policy", f'{KEY}.sub_policies=[[{{"operation": "invert"}}]]', f"{KEY}.space=radiograph"),
            "invert is forbidden in the space 'radiograph'",
        ),
        (
            (f"{KEY}=TrivialAugment", f"{KEY}.space=radiograph", "--data.init_args.base_augment=crop_flip"),
            "base_augment=crop_flip does horizontal_flip, which the space 'radiograph' of the train_policy forbids",
        ),
    ],
)
def test_a_wrong_policy_ends_with_one_sentence(fit, tmp_path, arguments, message):
    (tmp_path / "other.json").write_text('{"version": 7, "policy": "Identity", "arguments": {}}')
    answer = fit("--dir=run", *arguments)
    assert answer.status == 2
    assert message in answer.err
    assert answer.err.strip().count("\n") == 0
    assert not Path("run/checkpoints").exists()


def test_a_run_does_not_take_the_place_of_the_search_that_found_its_policy(fit, tmp_path):
    save_policy(POLICY, tmp_path / "search" / "policy.json")
    (tmp_path / "search" / "config.yaml").write_text("run: digits.yaml\nmethod: FastAutoAugmentSearch\n")
    answer = fit("--dir=search", f"{KEY}=search/policy.json")
    assert answer.status == 2
    assert "search is the directory of a search, not of a run; give another --dir" in answer.err
    assert load_policy("search/policy.json") == POLICY
    assert "FastAutoAugmentSearch" in Path("search/config.yaml").read_text()
