"""The command `search` with a method: searches for augmentation policies, with real processes."""

import contextlib
import itertools
import json
import shutil

import numpy as np
import pytest
import yaml
from searches import processes_of, rows_of, run_of, start, wait_until

from lightning_automl.__main__ import main
from lightning_automl.augment import Policy, load_policy
from lightning_automl.results.run import Run, open_data
from lightning_automl.search.fast_autoaugment import read_round

FOLDS, ROUNDS, TRIALS, KEEP = 2, 2, 3, 1
METHOD = {"class_path": "FastAutoAugmentSearch", "init_args": {"rounds": ROUNDS, "keep": KEEP}}


def config_of(**keys):
    """A search config of seconds; keys that are None are left out, but for the acceptance."""
    config = {
        "run": run_of("TunableCNN", epochs=2),
        "method": METHOD,
        "folds": FOLDS,
        "trials": TRIALS,
        "acceptance": {"folds": 1, "seeds": 2},
        "workers": 2,
        **keys,
    }
    return {key: value for key, value in config.items() if value is not None or key == "acceptance"}


@pytest.fixture(scope="session")
def finished_search(tmp_path_factory, _server):
    """Fast AutoAugment with the smallest numbers there are."""
    home = tmp_path_factory.mktemp("policies")
    (home / "search.yaml").write_text(yaml.safe_dump(config_of()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_automl.searching.TrialServer", lambda call: contextlib.nullcontext(_server))
        assert main(["search", "--config", str(home / "search.yaml"), "--dir", str(home / "faa")]) == 0
    return home / "faa"


@pytest.fixture
def faa(finished_search, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished_search, tmp_path / "faa")


@pytest.fixture
def searched(command, warm_server, tmp_path):
    def search(*arguments, directory="faa", **keys):
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump(config_of(**keys)))
        return command("search", "--config", path, "--dir", tmp_path / directory, *arguments)

    return search


def read(path):
    return json.loads(path.read_text())


def found(directory):
    """What a search comes to, without what differs from run to run."""
    record = read(directory / "policy_search.json")
    rounds = [[each.to_dict() | {"seconds": 0} for each in read_round(path)] for path in records(directory)]
    policies = [(directory / name).read_text() for name in ("policy.json", "searched_policy.json")]
    return record["kept"], record["identity_values"], record["acceptance"], record["epochs"], rounds, policies


def records(directory):
    return sorted((directory / "density").glob("*.jsonl"))


def runs(directory, pattern):
    return {path.name: Run.read(path) for path in sorted(directory.glob(pattern))}


@pytest.mark.slow
def test_a_search_leaves_policies_tables_pictures_and_a_config_that_trains(finished_search, command, tmp_path):
    directory = finished_search
    summary, record = read(directory / "summary.json"), read(directory / "policy_search.json")
    assert summary["status"] == "finished"
    assert summary["test_opened"] == 0
    assert set(summary["artefacts"].values()) == {
        *("policy.json", "searched_policy.json", "policy_search.json", "trials.csv", "best.yaml"),
        *("policy.png", "space.png", "report.html"),
    }
    assert all((directory / name).exists() for name in summary["artefacts"].values())
    # exactly K·T·B evaluations, each a row
    rows = rows_of(directory)
    assert [int(row["number"]) for row in rows] == list(range(FOLDS * ROUNDS * TRIALS))
    assert record["evaluations"] == len(rows) == sum(len(read_round(path)) for path in records(directory))
    # the best of each fold and round are kept, and are found in the table under their numbers
    for (fold, turn), own in itertools.groupby(record["kept"], lambda each: (each["fold"], each["round"])):
        values = [row for row in rows if (int(row["fold"]), int(row["round"])) == (fold, turn)]
        best = min(values, key=lambda row: float(row["value"]))
        assert [(str(each["number"]), each["value"]) for each in own] == [(best["number"], float(best["value"]))]
    searched = load_policy(directory / "searched_policy.json")
    assert isinstance(searched, Policy)
    assert record["sub_policies"] == len(searched) <= FOLDS * ROUNDS * KEEP * 5
    adopted = {"searched": "Policy", "none": "Identity", "trivial_augment": "TrivialAugment"}
    assert type(load_policy(directory / "policy.json")).__name__ == adopted[record["acceptance"]["adopted"]]
    assert len(record["identity_values"]) == FOLDS
    assert record["epochs"] == {"folds": 2 * FOLDS, "acceptance": 2 * 6}
    values = record["acceptance"]["arms"]["searched"]["values"]
    assert summary["metrics"]["val_accuracy_searched"] == pytest.approx(np.mean([each["value"] for each in values]))
    answer = command("fit", "--config", directory / "best.yaml", "--dir", tmp_path / "best", "--trainer.max_epochs=1")
    assert answer.status == 0, answer.err
    assert load_policy(tmp_path / "best/policy.json") == load_policy(directory / "policy.json")


@pytest.mark.slow
def test_no_image_is_used_for_two_ends(finished_search):
    folds, compared = runs(finished_search, "folds/[0-9]*"), runs(finished_search, "acceptance/*/fold-*")
    assert (len(folds), len(list(finished_search.glob("acceptance/*/fold-*")))) == (FOLDS, 6)
    rows = {name: open_data(run).split_rows for name, run in {**folds, **compared}.items()}
    apart = rows["fold-2-seed-0"]["val"]
    for name, own in rows.items():
        train, val, test = (set(own[split].tolist()) for split in ("train", "val", "test"))
        assert not train & val
        assert not (train | val) & test
        assert set(rows["0"]["test"].tolist()) == test
        if name in folds:
            assert not (train | val) & set(apart.tolist())  # the search never sees what it is judged by
    assert not set(rows["0"]["val"].tolist()) & set(rows["1"]["val"].tolist())
    for run in folds.values():
        assert run.config["trainer"]["limit_val_batches"] == 0
        assert not any(key.startswith("val_") for row in run.epochs for key in row)
    for run in {**folds, **compared}.values():
        assert run.summary["test_opened"] == 0
    # every arm of a fold and seed differs in its policy alone
    for name in compared:
        arms = [yaml.safe_load(path.read_text()) for path in finished_search.glob(f"acceptance/*/{name}/config.yaml")]
        assert len({str(arm["data"]["init_args"].pop("train_policy")) for arm in arms}) == 3
        assert all(arm == arms[0] for arm in arms)


@pytest.mark.slow
def test_the_same_command_goes_on_with_more_trials_and_repeats_nothing(faa, finished_search, searched):
    before = found(faa)
    stamps = {path: path.stat().st_mtime_ns for path in faa.glob("*/**/*.ckpt")}
    answer = searched()
    assert answer.status == 0, answer.err
    assert found(faa) == before
    assert {path: path.stat().st_mtime_ns for path in faa.glob("*/**/*.ckpt")} == stamps
    for keys, words in (
        ({"trials": 2}, "trials=3, now it is 2; limits can only grow"),
        ({"folds": 3}, "folds=2, now it is 3"),
        ({"acceptance": {"folds": 1, "seeds": 3}}, "acceptance.seeds=2, now it is 3"),
        ({"run": run_of("TunableCNN", epochs=3)}, "run.trainer.max_epochs=2, now it is 3"),
        ({"method": {**METHOD, "init_args": {"rounds": 3, "keep": KEEP}}}, "method.init_args.rounds=2, now it is 3"),
    ):
        answer = searched(**keys)
        assert answer.status == 2
        assert words in answer.err
    answer = searched("--trials", str(TRIALS + 2))
    assert answer.status == 0, answer.err
    for path in records(faa):
        new, old = (read_round(place) for place in (path, finished_search / "density" / path.name))
        assert len(new) == TRIALS + 2
        assert [each.values for each in new[:TRIALS]] == [each.values for each in old[:TRIALS]]
    record = read(faa / "policy_search.json")
    assert record["evaluations"] == FOLDS * ROUNDS * (TRIALS + 2)
    changed = record["kept"] != before[0]
    assert (faa / "superseded/searched-1").exists() == changed
    assert load_policy(faa / "acceptance/searched/policy.json") == load_policy(faa / "searched_policy.json")


@pytest.mark.slow
def test_after_kills_the_same_command_comes_to_the_same(finished_search, tmp_path):
    directory = tmp_path / "faa"
    stages = (
        lambda: (directory / "folds/0/checkpoints/last.ckpt").exists(),
        lambda: any(len(read_round(path)) > 1 for path in records(directory)),
        lambda: (directory / "acceptance/none/fold-2-seed-0/checkpoints/last.ckpt").exists(),
    )
    for reached in stages:
        process = start(directory, config_of())
        wait_until(lambda: process.poll() is not None or reached())  # noqa: B023
        process.kill()
        process.wait()
        wait_until(lambda: not processes_of(directory))
    finished = {path: path.stat().st_mtime_ns for path in directory.glob("folds/*/summary.json")}
    assert start(directory, config_of()).wait(timeout=300) == 0, (tmp_path / "faa.err").read_text()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert found(directory) == found(finished_search)


@pytest.mark.slow
def test_autoaugment_trains_a_child_with_each_policy(searched, tmp_path):
    method = {"class_path": "AutoAugmentSearch", "init_args": {"keep": 2, "space": "radiograph"}}
    answer = searched(method=method, trials=3, acceptance=None, storage=f"sqlite:///{tmp_path}/own.db")
    assert answer.status == 0, answer.err
    directory = tmp_path / "faa"
    record, rows = read(directory / "policy_search.json"), rows_of(directory)
    assert [row["state"] for row in rows] == ["COMPLETE"] * 3
    best = sorted(rows, key=lambda row: -float(row["value"]))[:2]
    assert {each["number"] for each in record["kept"]} == {int(row["number"]) for row in best}
    for row in rows:
        child = yaml.safe_load((directory / row["directory"] / "config.yaml").read_text())
        arguments = child["data"]["init_args"]
        assert (arguments["fold"], arguments["folds"]) == (0, FOLDS)
        policy = load_policy(directory / row["directory"] / "policy.json")
        assert policy.operations() <= {*load_policy(directory / "policy.json").space.caps}
        assert policy.sub_policies[0][0].operation == row["0.0.operation"]
    assert load_policy(directory / "policy.json") == load_policy(directory / "searched_policy.json")
    assert record["acceptance"] is None
    assert read(directory / "summary.json")["test_opened"] == 0


def test_a_dry_run_tells_what_would_be_trained(searched, tmp_path):
    answer = searched("--dry-run")
    assert answer.status == 0, answer.err
    assert "12 policies scored" in answer.out
    assert "8 runs of at most 2 epochs: 16 epochs" in answer.out
    assert "nothing was trained" in answer.out
    assert not (tmp_path / "faa").exists()


def test_a_time_limit_ends_the_search_and_says_that_it_goes_on(searched, tmp_path):
    answer = searched("--timeout", "0.1")
    assert answer.status == 1
    assert "stopped at the limit of 0.1 s" in answer.err
    assert "Traceback" not in answer.err
    assert read(tmp_path / "faa/summary.json")["status"] == "failed"


def test_a_search_keeps_its_metric_and_what_its_space_was(searched, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("{name: own, operations: {crop: true, rotate: 15}}")
    keys = {"monitor": "val_loss", **method_of(space=str(own), keep=1)}
    assert searched("--timeout", "0.1", **keys).status == 1
    config = yaml.safe_load((tmp_path / "faa/config.yaml").read_text())
    assert (config["run"]["monitor"], config["run"]["mode"]) == ("val_loss", "min")
    own.write_text("{name: own, operations: {crop: true, rotate: 20}}")
    answer = searched("--timeout", "0.1", **keys)
    assert answer.status == 2
    assert "method.init_args.space.operations.rotate=15.0, now it is 20.0" in answer.err


def test_a_comparison_of_policies_needs_a_method(searched):
    answer = searched(method=None, folds=None, space={"model.init_args.channels_last": {"choice": [True, False]}})
    assert answer.status == 2
    assert "no policy is searched" in answer.err


def method_of(name="FastAutoAugmentSearch", **arguments):
    return {"method": {"class_path": name, "init_args": arguments}}


def data_of(**arguments):
    run = run_of("TunableCNN")
    return {"run": run | {"data": {"class_path": "DigitsDataModule", "init_args": arguments}}}


BAD = {
    "unknown operation": (method_of(operations=["rotat"]), "rotate"),
    "no operation": (method_of(operations=[]), "no operation"),
    "unknown space": (method_of(space="naturl"), "did you mean natural?"),
    "operation outside of the space": (method_of(space="radiograph", operations=["invert"]), "invert is forbidden"),
    "base_augment outside of the space": (
        method_of(space="radiograph", keep=1) | data_of(base_augment="crop_flip"),
        "horizontal_flip",
    ),
    "one fold": ({"folds": 1}, "folds is 1"),
    "more kept than tried": (method_of(keep=4), "keep is 4"),
    "no round": (method_of(rounds=0), "rounds is 0"),
    "more folds than images of a class": ({"folds": 150}, "150 folds to search on and 1 fold to compare on are 151"),
    "a policy of the run": (data_of(train_policy={"class_path": "TrivialAugment"}), "train_policy of its own"),
    "a fold of the run": (data_of(fold=1), "data.init_args.fold"),
    "its first fold": (data_of(fold=0), "data.init_args.fold"),
    "the test split": ({"monitor": "test_accuracy"}, "must not see the test split"),
    "the test split in the run": ({"run": run_of("TunableCNN") | {"monitor": "test_loss"}}, "must not see the test"),
    "what was trained on": ({"monitor": "train_accuracy"}, "images that were not trained on"),
    "several monitors": ({"monitor": ["val_accuracy", "val_loss"]}, "one metric"),
    "a space beside": ({"space": {"x": {"float": [0, 1]}}}, "space says nothing to it"),
    "values to try first": ({"enqueue": [{}]}, "enqueue"),
    "storage": ({"storage": "sqlite:///x.db"}, "storage"),
    "unknown method": (method_of("FastAutoAugmentSaerch"), "did you mean 'FastAutoAugmentSearch'"),
    "unknown argument": (method_of(round=2), "did you mean 'rounds'"),
    "a sampler that remembers": ({"sampler": {"class_path": "CmaEsSampler"}}, "CmaEsSampler"),
    "a sampler that tries each": ({"sampler": {"class_path": "GridSampler"}}, "too many policies"),
    "a comparison of one run": ({"acceptance": {"folds": 1, "seeds": 1}}, "no interval"),
    "unknown key of the comparison": ({"acceptance": {"fold": 1}}, "did you mean 'folds'"),
    "no seed": ({"acceptance": {"seeds": 0}}, "acceptance.seeds is 0"),
    "trials": ({"trials": 0}, "trials is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_before_anything_is_trained(case, searched, tmp_path):
    keys, words = BAD[case]
    answer = searched(**keys)
    assert answer.status == 2
    assert words in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert "Traceback" not in answer.err
    assert not (tmp_path / "faa/folds").exists()
