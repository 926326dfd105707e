import json
import os
import re
import subprocess
import sys

import pytest
from competitions import LR, SPACE, config_of, planned, write_arms
from seen import BREAST, PNEUMONIA

from lightning_automl.augment import Identity, TrivialAugment, load_policy
from lightning_automl.auto.candidates import (
    Candidate,
    candidate_of,
    policy_file,
    write_simple_policies,
)
from lightning_automl.rundir import UserError
from lightning_automl.search.spaces import Space

PARSED = Space.parse(SPACE)


@pytest.fixture
def directory(tmp_path):
    return filled(tmp_path / "strategy")


def filled(place):
    write_arms(place, "cnn", "resnet")
    write_simple_policies(place, BREAST.space)
    return place


def with_data(candidate, **arguments):
    config = json.loads(json.dumps(dict(candidate.config)))
    config["data"]["init_args"] |= arguments
    return Candidate(candidate.arm, candidate.values, candidate.policy, config, candidate.default)


def test_a_key_is_the_arm_and_eight_digits(directory):
    assert re.fullmatch("cnn-[0-9a-f]{8}", candidate_of(directory, planned("cnn"), "none").key)


def test_a_key_is_the_same_wherever_the_directory_is_and_in_every_process(directory, tmp_path):
    here = candidate_of(directory, planned("cnn"), "trivial_augment", {"lr": 0.01}, PARSED)
    elsewhere = candidate_of(filled(tmp_path / "other"), planned("cnn"), "trivial_augment", {"lr": 0.01}, PARSED)
    assert here.config != elsewhere.config  # the path of the policy
    assert here.key == elsewhere.key
    code = (
        "import sys; sys.path.insert(0, 'tests/auto'); from pathlib import Path; from competitions import *\n"
        "from lightning_automl.auto.candidates import *; from lightning_automl.search.spaces import Space\n"
        f"arguments = Path({str(directory)!r}), planned('cnn'), 'trivial_augment', {{'lr': 0.01}}, Space.parse(SPACE)\n"
        "print(candidate_of(*arguments).key)"
    )
    for number in "12":
        environment = {**os.environ, "PYTHONHASHSEED": number}
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == here.key


def test_fold_seed_and_what_may_change_while_a_run_goes_on_make_no_other_candidate(directory):
    own = candidate_of(directory, planned("cnn"), "none")
    runs = [
        with_data(own, fold=1, folds=5, without_folds=[3, 4], cache="/somewhere"),
        Candidate(own.arm, {}, "none", {**own.config, "seed_everything": 7, "test_after_fit": True}, True),
        Candidate(
            own.arm,
            {},
            "none",
            {**own.config, "trainer": {**own.config["trainer"], "accelerator": "cpu", "enable_progress_bar": False}},
            True,
        ),
    ]
    assert {each.key for each in runs} == {own.key}


def test_values_epochs_policy_arm_and_data_make_another_candidate(directory):
    plain = candidate_of(directory, planned("cnn"), "none")
    others = [
        candidate_of(directory, planned("cnn"), "none", {"lr": 0.01}, PARSED),
        candidate_of(directory, planned("cnn"), "none", {"lr": 0.02}, PARSED),
        candidate_of(directory, planned("cnn", epochs=4), "none"),
        candidate_of(directory, planned("cnn"), "trivial_augment"),
        candidate_of(directory, planned("resnet"), "none"),
        with_data(plain, path="/other"),
    ]
    assert len({each.key for each in [plain, *others]}) == 7


def test_values_that_are_those_of_the_default_make_no_other_candidate(directory):
    plain = candidate_of(directory, planned("cnn"), "none")
    same = candidate_of(directory, planned("cnn"), "none", {"lr": 1e-3, "filters": [8, 8]}, PARSED)
    assert same.key == plain.key
    assert plain.default
    assert not same.default


def test_what_the_policy_file_holds_counts_and_not_its_name(directory):
    before = candidate_of(directory, planned("cnn"), "none")
    text = policy_file(directory, "none").read_text()
    policy_file(directory, "copied").write_text(text)
    assert candidate_of(directory, planned("cnn"), "copied").key == before.key
    write_simple_policies(directory, PNEUMONIA.space)
    assert candidate_of(directory, planned("cnn"), "none").key != before.key


def test_values_and_epochs_are_in_the_config(directory):
    own = candidate_of(directory, planned("cnn"), "none", {"lr": 0.01, "filters": [4]}, PARSED)
    value = own.config
    for key in LR.split("."):
        value = value[key]
    assert value == 0.01
    assert own.config["model"]["init_args"]["model"]["init_args"]["filters"] == [4]
    assert own.config["trainer"]["max_epochs"] == 3
    assert own.config["data"]["init_args"]["train_policy"] == str(policy_file(directory, "none").resolve())


def test_a_search_for_a_policy_starts_without_one(directory):
    own = candidate_of(directory, planned("cnn"), "none")
    assert "train_policy" not in own.without_policy["data"]["init_args"]
    assert "train_policy" in own.config["data"]["init_args"]


@pytest.mark.parametrize(
    ("policy", "values", "title"),
    [
        ("none", None, "Cnn, no policy"),
        ("trivial_augment", None, "Cnn, TrivialAugment"),
        ("trivial_augment", {"lr": 0.01}, "Cnn, TrivialAugment, tuned"),
    ],
)
def test_a_title_says_what_it_is(directory, policy, values, title):
    assert candidate_of(directory, planned("cnn"), policy, values, PARSED).title == title


def test_simple_policies_stay_within_the_space(directory):
    write_simple_policies(directory, PNEUMONIA.space)
    nothing, trivial = (load_policy(policy_file(directory, name)) for name in ("none", "trivial_augment"))
    assert isinstance(nothing, Identity)
    assert isinstance(trivial, TrivialAugment)
    for policy in (nothing, trivial):
        assert policy.space.name == "radiograph"
    assert "horizontal_flip" not in trivial.operations()


@pytest.mark.parametrize(
    ("name", "policy", "values", "words"),
    [
        ("densenet", "none", None, "densenet.yaml"),
        ("cnn", "none", {"lr": 3.0}, "from 0.0001 to 0.1"),
        ("cnn", "none", {"depth": 3}, "unknown parameter 'depth'"),
    ],
)
def test_what_cannot_be_made_is_told(directory, name, policy, values, words):
    with pytest.raises(UserError, match=words):
        candidate_of(directory, planned(name), policy, values, PARSED)


def test_a_missing_policy_file_is_told(directory):
    with pytest.raises(UserError, match=r"lost\.json cannot be read"):
        _ = candidate_of(directory, planned("cnn"), "lost").key


def test_candidates_and_runs_need_no_torch():
    code = (
        "import sys, lightning_automl.auto.selection, lightning_automl.auto.runs\n"
        "print({'torch', 'lightning', 'scipy', 'sklearn'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_the_config_of_an_arm_is_not_changed():
    before = config_of()
    candidate = Candidate("cnn", {}, "none", before, True)
    _ = candidate.key, candidate.without_policy
    assert before == config_of()
