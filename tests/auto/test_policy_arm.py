import json
import shutil
from dataclasses import replace

import pytest
from optuna.samplers import RandomSampler
from searched import FakeWorkers, Time, leader_of, no_work, real_workers
from seen import DIGITS, seen

from lightning_automl.augment import Policy, TrivialAugment, load_policy, load_space, save_policy
from lightning_automl.auto.policy_arm import challenger, search_policy
from lightning_automl.results.policy_search import PolicySearchRecord
from lightning_automl.results.run import Run, open_data
from lightning_automl.rundir import DiskFullError, UserError
from lightning_automl.search.fast_autoaugment import record_of as file_of_round
from lightning_automl.search.fast_autoaugment import search_round
from lightning_automl.search.policies import PolicySpace
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.configs import with_policy

#: The digits, as if they were radiographs: with operations that are safe there.
FACTS = seen(modality="radiograph")


def plan_of(folds=2, trials=4, rounds=1):
    return {
        "policy_search": {"folds": folds, "trials": trials, "rounds": rounds},
        "stages": [{"name": "policy_search", "seconds": 60}, {"name": "final", "seconds": 100}],
    }


@pytest.fixture(scope="module")
def workers(_server):
    return real_workers(_server)


@pytest.fixture(scope="module")
def finished(workers, tmp_path_factory):
    """The smallest search there is: two of three search folds, four policies on each."""
    directory = tmp_path_factory.mktemp("strategy")
    leader = leader_of(FACTS)
    path = search_policy(workers, directory, FACTS, plan_of(), leader, Time())
    assert path == directory / "policy_search/searched_policy.json"
    return directory


@pytest.fixture
def directory(finished, tmp_path):
    """A copy of its directory."""
    return shutil.copytree(finished, tmp_path / "strategy")


def record_of(directory):
    return json.loads((directory / "policy_search/policy_search.json").read_text())


def test_the_policy_has_nothing_but_safe_operations(finished):
    policy = load_policy(finished / "policy_search/searched_policy.json")
    assert isinstance(policy, Policy)
    steps = [step for steps in policy.sub_policies for step in steps]
    assert {step.operation for step in steps} <= set(FACTS.space["operations"])
    assert not {step.operation for step in steps} & {"horizontal_flip", "invert", "solarize", "posterize"}
    assert policy.space.to_dict() == FACTS.space  # within which strengths are


def test_what_it_leaves_is_a_policy_search_that_a_page_can_show(finished):
    record = PolicySearchRecord.read(finished / "policy_search")
    assert (record.method, record.folds, record.trials, record.rounds) == ("FastAutoAugmentSearch", 2, 4, 1)
    assert {key: len(values) for key, values in record.values.items()} == {(0, 0): 4, (1, 0): 4}
    assert len(record.kept) == 2
    own = record_of(finished)
    assert own["sentence"] == (
        f"Fast AutoAugment has found {own['sub_policies']} sub-policies in the space radiograph."
    )
    assert (own["cut"], own["evaluations"], own["acceptance"]) == (None, 8, None)
    assert min(own["seconds"].values()) > 0
    assert (finished / "policy_search/policy.png").exists()
    assert len((finished / "policy_search/trials.csv").read_text().splitlines()) == 1 + 8


def test_no_image_of_the_comparison_is_in_a_run_of_the_search(finished):
    places = sorted((finished / "policy_search/folds").glob("[0-9]"))
    assert [place.name for place in places] == ["0", "1"]
    apart = set()
    for fold in FACTS.comparison_folds:
        arguments = {"fold": fold, "folds": FACTS.folds, "train_policy": None}
        apart |= set(_rows(Run.read(places[0]), without_folds=None, **arguments)["val"].tolist())
    assert len(apart) == pytest.approx(2 / 5 * 1430, abs=5)
    for fold, place in enumerate(places):
        run = Run.read(place)
        arguments = run.config["data"]["init_args"]
        assert (arguments["fold"], arguments["folds"], arguments["without_folds"]) == (fold, 5, [3, 4])
        rows = {split: set(own.tolist()) for split, own in _rows(run).items()}
        assert not (rows["train"] | rows["val"]) & apart
        assert not rows["train"] & rows["val"]
        # the search fold on which no policy is scored is trained on all the same
        assert len(rows["train"]) > 1.9 * len(rows["val"])
        assert run.config["test_after_fit"] is False
        assert "test_opened" not in run.summary or run.summary["test_opened"] == 0


def _rows(run, **arguments):
    config = {**run.config["data"], "init_args": {**run.config["data"]["init_args"], **arguments}}
    return open_data(replace(run, config={**run.config, "data": config})).split_rows


def test_what_is_done_is_not_done_again(directory):
    before = (directory / "policy_search/searched_policy.json").read_text()
    path = search_policy(no_work(), directory, FACTS, plan_of(), leader_of(FACTS), Time())
    assert path.read_text() == before


def test_the_policy_of_the_leader_makes_no_difference(directory):
    leader = leader_of(FACTS)
    file = directory / "trivial_augment.json"
    save_policy(TrivialAugment(FACTS.space), file)
    augmented = replace(leader, policy="trivial_augment", config=with_policy(leader.config, file))
    assert augmented.key != leader.key
    assert search_policy(no_work(), directory, FACTS, plan_of(), augmented, Time()) is not None
    assert not (directory / "superseded").exists()


def test_the_search_of_another_leader_is_put_aside(directory):
    workers = FakeWorkers(StudyFailed("out of memory"))
    assert search_policy(workers, directory, FACTS, plan_of(), leader_of(FACTS, max_epochs=2), Time()) is None
    assert (directory / "superseded/policy_search-1/searched_policy.json").exists()
    assert not (directory / "policy_search/searched_policy.json").exists()


def test_more_trials_continue_it(directory):
    workers = FakeWorkers(StudyFailed("out of memory"))
    search_policy(workers, directory, FACTS, plan_of(trials=8), leader_of(FACTS), Time())
    assert workers.jobs == ["the scoring on fold 0"]  # the networks are there
    assert not (directory / "superseded").exists()


@pytest.mark.parametrize("error", [StudyFailed("out of memory"), UserError("no such network")])
def test_a_search_that_fails_is_a_sentence_and_is_not_tried_again(tmp_path, error):
    clock = Time()
    assert search_policy(FakeWorkers(error), tmp_path, FACTS, plan_of(), leader_of(FACTS), clock) is None
    sentence = f"The policy search failed after 0 of 8 policies: {error}."
    assert clock.cuts == {"policy_search": sentence}
    assert record_of(tmp_path)["cut"] == sentence
    assert record_of(tmp_path)["sentence"].startswith("No augmentation policy was found: no policy was scored")
    assert search_policy(no_work(), tmp_path, FACTS, plan_of(), leader_of(FACTS), clock) is None


def test_a_full_disk_ends_it(tmp_path):
    with pytest.raises(DiskFullError):
        search_policy(FakeWorkers(DiskFullError(28, "full")), tmp_path, FACTS, plan_of(), leader_of(FACTS), Time())


def test_without_time_there_is_no_policy_and_later_stages_keep_theirs(workers, tmp_path):
    clock = Time(left=100.0)  # which the final stage needs
    assert search_policy(workers, tmp_path, FACTS, plan_of(), leader_of(FACTS), clock) is None
    assert clock.cuts == {"policy_search": "The policy search was ended by the budget after 0 of 8 policies."}
    clock.seconds = 1000.0
    assert search_policy(no_work(), tmp_path, FACTS, plan_of(), leader_of(FACTS), clock) is None


@pytest.mark.parametrize(("scored", "kept"), [(40, 4), (39, 3), (20, 2), (10, 1), (9, 0)])
def test_of_a_round_that_was_cut_the_same_share_is_kept(tmp_path, monkeypatch, scored, kept):
    monkeypatch.setattr("lightning_automl.auto.policy_arm.draw_pictures", lambda place: None)  # which take long
    policies = _records(tmp_path, scored)
    clock = Time()
    clock.cuts["policy_search"] = "The policy search was ended by the budget."
    path = search_policy(no_work(), tmp_path, DIGITS, plan_of(trials=40), leader_of(DIGITS), clock)
    record = record_of(tmp_path)
    # numbers of two folds take turns
    assert [each["number"] // 2 for each in record["kept"]] == list(range(scored - 1, scored - 1 - kept, -1))
    assert record["evaluations"] == scored
    assert (path is not None) is (kept > 0)
    if kept:
        assert record["sub_policies"] <= kept * policies.sub_policies


def _records(directory, scored):
    """Policies of a round whose values fall, so that the newest are the best."""
    policies = PolicySpace(load_space(DIGITS.space), ["rotate", "contrast", "cutout"])
    search_round(
        policies,
        lambda policy, number: 1.0 - number / 100,
        scored,
        file_of_round(directory / "policy_search/density", 0, 0),
        lambda number: RandomSampler(seed=number),
    )
    return policies


def test_nothing_is_searched_without_a_plan_or_with_a_single_search_fold(tmp_path):
    assert search_policy(no_work(), tmp_path, FACTS, {"policy_search": None}, leader_of(FACTS), Time()) is None
    few = seen(train=(3, 3), val=(1, 1), folds=2)
    assert few.search_folds == [0]
    assert search_policy(no_work(), tmp_path, few, plan_of(), leader_of(few), Time()) is None
    assert not list(tmp_path.iterdir())


def test_a_challenger_is_the_leader_with_the_policy_as_it_was_found(directory):
    path, leader = directory / "policy_search/searched_policy.json", leader_of(FACTS)
    first = challenger(directory, leader, path)
    assert (first.arm, first.values, first.policy, first.default) == (leader.arm, leader.values, "searched", False)
    assert first.key != leader.key
    assert challenger(directory, leader, path) == first
    file = first.config["data"]["init_args"]["train_policy"]
    assert load_policy(file) == load_policy(path)
    before = load_policy(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "sub_policies": []}))
    second = challenger(directory, leader, path)
    assert second.key != first.key
    assert load_policy(file) == before
