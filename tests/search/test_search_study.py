"""The loop of a search: limits, how trials end, and what becomes of those whose worker dies."""

import errno
import itertools
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import (
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from lightning_automl.rundir import DiskFullError, UserError
from lightning_automl.search import workers
from lightning_automl.search.samplers import PopulationSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import (
    Infeasible,
    StudyFailed,
    TrialFailed,
    derived_seed,
    open_study,
    search,
)
from lightning_automl.search.workers import Pulse, Watch, counts, is_lost, lives, recover, working

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING
QUICK = {"beat": 0.3, "silence": 0.6, "patience": 5.0}


@pytest.fixture
def space():
    return Space.parse({"x": {"float": [0, 1]}})


@pytest.fixture
def study(space):
    return open_study("x", InMemoryStorage(), ["minimize"], RandomSampler(seed=0), None, space=space)[0]


@pytest.fixture
def pair(space):
    """A study of two objectives."""
    directions = ["minimize", "maximize"]
    return open_study("pair", InMemoryStorage(), directions, RandomSampler(seed=0), None, space=space)[0]


@pytest.fixture
def joined(study):
    """The same study as another process has it."""
    return optuna.load_study(study_name="x", storage=study._storage, sampler=RandomSampler(seed=9))


def value(candidate):
    return candidate.values["x"]


def epochs(number, at=lambda step: None):
    """A score of so many epochs."""

    def score(candidate):
        for step in range(1, number + 1):
            at(step)
            if candidate.report(step, candidate.values["x"] + step, last=step == number):
                raise optuna.TrialPruned
        return candidate.values["x"]

    return score


def states(study):
    return [trial.state for trial in study.get_trials()]


def dead_worker():
    """The worker of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with working() as worker:
        return {**worker, "pid": process.pid}


def leave_running(study, space, worker, **attributes):
    """A running trial as another worker left it."""
    trial = study.ask()
    trial.set_user_attr("worker", worker)
    trial.set_user_attr("beat", 1.0)
    space.suggest(trial)
    trial.set_user_attr("directory", f"trials/{trial.number:04d}")
    for name, each in attributes.items():
        trial.set_user_attr(name, each)
    return trial


# ---- opening


def test_the_first_makes_the_study_and_the_others_join_it(space):
    storage = InMemoryStorage()
    arguments = ("name", storage, ["maximize"], RandomSampler(seed=0), None)
    study, created = open_study(*arguments, space=space, identity={"digest": "1", "run": {"lr": 0.1}})
    again, created_again = open_study(*arguments, space=space, identity={"digest": "1", "run": {"lr": 0.1}})
    assert (created, created_again) == (True, False)
    search(study, space, value, trials=2)
    assert len(again.get_trials()) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"space": Space.parse({"x": {"float": [0, 2]}})}, r"the study was started with .* for x, now it is "),
        ({"space": Space.parse({"y": {"float": [0, 1]}})}, r"the study was started with "),
        ({"directions": ["minimize"]}, r"'name' was started with directions=\['maximize'\], now it is \['minimize'\]"),
        ({"directions": ["maximize", "minimize"]}, r"was started with directions=\['maximize'\]"),
        ({"identity": {"run": {"lr": 0.2}}}, r"'name' was started with run\.lr=0\.1, now it is 0\.2; give the former"),
        ({"identity": {}}, r"'name' was started with run\.lr=0\.1, now it is None"),
    ],
)
def test_another_search_cannot_join_and_hears_why(change, sentence, space):
    storage = InMemoryStorage()
    given = {"directions": ["maximize"], "space": space, "identity": {"run": {"lr": 0.1}}}
    open_study("name", storage, sampler=RandomSampler(), pruner=None, **given)
    with pytest.raises(UserError, match=sentence):
        open_study("name", storage, sampler=RandomSampler(), pruner=None, **{**given, **change})


def test_a_study_that_is_not_ours_is_left_alone(space):
    storage = InMemoryStorage()
    other = optuna.create_study(study_name="x", storage=storage)
    other.ask()
    with pytest.raises(UserError, match="the study name 'x' is in use by another study in this storage; give another"):
        open_study("x", storage, ["minimize"], RandomSampler(), None, space=space)
    assert other.user_attrs == {}


def test_a_study_whose_maker_was_killed_before_it_could_describe_it_is_taken(space):
    storage = InMemoryStorage()
    optuna.create_study(study_name="x", storage=storage)
    arguments = ("x", storage, ["minimize"], RandomSampler(), None)
    assert not open_study(*arguments, space=space, patience=0.0)[1]
    with pytest.raises(UserError, match="the study was started with"):
        open_study(*arguments, space=Space.parse({"y": {"float": [0, 1]}}), patience=0.0)


def test_who_joins_waits_for_the_description(space):
    storage = InMemoryStorage()
    made, _ = open_study("other", storage, ["minimize"], RandomSampler(), None, space=space)
    late = optuna.create_study(study_name="x", storage=storage)
    timer = threading.Timer(0.3, lambda: late.set_user_attr("lightning_automl", made.user_attrs["lightning_automl"]))
    timer.start()
    with pytest.raises(UserError, match="the study was started with"):
        open_study(
            "x", storage, ["minimize"], RandomSampler(), None, space=Space.parse({"y": {"int": [0, 1]}}), patience=60.0
        )
    timer.join()


def test_without_a_pruner_nothing_is_pruned(study):
    # Optuna would take its median pruner.
    assert isinstance(study.pruner, NopPruner)


def test_a_pruner_and_several_objectives_do_not_go_together(space):
    directions = ["minimize", "minimize"]
    with pytest.raises(ValueError, match="MedianPruner compares one value and the study has 2 objectives"):
        open_study("x", InMemoryStorage(), directions, RandomSampler(), MedianPruner(), space=space)
    open_study("x", InMemoryStorage(), directions, RandomSampler(), NopPruner(), space=space)


@pytest.mark.parametrize(("directions", "sentence"), [(["min"], "unknown direction 'min'"), ([], "no objective")])
def test_wrong_directions_are_told(directions, sentence, space):
    with pytest.raises(UserError, match=sentence):
        open_study("x", InMemoryStorage(), directions, RandomSampler(), None, space=space)


def test_a_derived_seed_is_the_given_one_first_and_then_always_the_same_other_one():
    assert derived_seed(7, 0) == 7
    found = {derived_seed(7, 0, "1"), derived_seed(7, 0, "2"), derived_seed(7, 20), derived_seed(8, 20)}
    assert len(found) == 4
    assert all(0 <= seed < 2**32 for seed in found)
    assert derived_seed(7, 20, "4711") == 801985692  # not hash(), which differs from process to process


# ---- limits


@pytest.mark.parametrize("limit", ["trials", "epochs", "workers"])
def test_a_limit_below_one_is_told(limit, study, space):
    with pytest.raises(UserError, match=f"{limit} is 0; it must be 1 or more"):
        search(study, space, value, **{"trials": 1, limit: 0})


def test_the_limit_of_trials_is_that_of_the_study(study, space):
    assert search(study, space, value, trials=3) is study
    search(study, space, value, trials=3)
    assert states(study) == [COMPLETE] * 3
    search(study, space, value, trials=5)
    assert states(study) == [COMPLETE] * 5


def test_running_trials_of_other_processes_count(study, joined, space):
    with working() as worker:
        other = leave_running(joined, space, worker)
        search(study, space, value, trials=3)
        assert states(study) == [RUNNING, COMPLETE, COMPLETE]
        joined.tell(other, 1.0)


def test_a_trial_that_another_process_was_faster_with_is_given_back(study, joined, space, monkeypatch):
    ask = study.ask
    with working() as worker:

        def ask_second():
            leave_running(joined, space, worker)
            return ask()

        monkeypatch.setattr(study, "ask", ask_second)
        search(study, space, value, trials=1)
    assert states(study) == [RUNNING, FAIL]
    attributes = study.get_trials()[1].user_attrs
    assert attributes["lost"] is True
    assert attributes["reason"] == "withdrawn: the limit of 1 trials was reached by another process"


def test_a_waiting_trial_that_is_given_back_waits_again(study, joined, space, monkeypatch):
    ask = study.ask
    study.enqueue_trial({"x": 0.5}, user_attrs={"note": "mine"})
    with working() as worker:

        def ask_first():
            trial = ask()
            leave_running(joined, space, worker)
            return trial

        monkeypatch.setattr(study, "ask", ask_first)
        search(study, space, value, trials=1)
        monkeypatch.setattr(study, "ask", ask)
        assert states(study) == [FAIL, RUNNING, WAITING]
        search(study, space, value, trials=2)
    retry = study.get_trials()[2]
    assert retry.state == COMPLETE
    assert retry.params == {"x": 0.5}
    assert (retry.user_attrs["note"], retry.user_attrs["retry_of"]) == ("mine", 0)


def test_the_limit_of_epochs_stops_the_trial_that_reaches_it(study, space):
    search(study, space, epochs(4), epochs=10)
    assert states(study) == [COMPLETE, COMPLETE, PRUNED]
    last = study.get_trials()[2]
    assert last.user_attrs["reason"] == "stopped: the limit of 10 epochs was reached"
    assert last.user_attrs["epochs"] == 2
    assert last.value == last.params["x"] + 2
    search(study, space, epochs(4), epochs=10)
    assert len(study.get_trials()) == 3


def test_a_trial_whose_last_epoch_reaches_the_limit_is_complete(study, space):
    search(study, space, epochs(4), epochs=8)
    assert states(study) == [COMPLETE, COMPLETE]


def test_a_score_that_ends_though_told_to_stop_is_complete(study, space):
    def score(candidate):
        assert candidate.report(1, 0.5)
        return 0.25

    search(study, space, score, epochs=1)
    assert study.best_trial.value == 0.25


def test_epochs_of_lost_trials_and_other_processes_count(study, joined, space):
    with working() as worker:
        leave_running(joined, space, worker, epochs=3)
        lost = leave_running(joined, space, dead_worker())
        for step in range(4):
            lost.report(0.5, step)
        search(study, space, epochs(2), epochs=9)
    trials = study.get_trials()
    assert trials[1].user_attrs["epochs"] == 4
    assert sum(trial.user_attrs["epochs"] for trial in trials) == 9
    assert [trial.state for trial in trials] == [RUNNING, FAIL, COMPLETE]


def test_all_workers_stop_at_the_limit_of_epochs(study, space):
    gate = threading.Barrier(3)

    def score(candidate):
        gate.wait(60)
        step = 0
        while not candidate.report(step + 1, 1.0):
            step += 1
        raise optuna.TrialPruned

    search(study, space, score, epochs=20, workers=3)
    assert states(study) == [PRUNED] * 3
    # Each worker may be at an epoch when the limit is reached.
    assert 20 <= sum(trial.user_attrs["epochs"] for trial in study.get_trials()) <= 22


def test_the_limit_of_time_stops_what_is_running(study, space):
    now = itertools.count()
    search(study, space, epochs(1000), timeout=300, clock=lambda: next(now))
    (trial,) = study.get_trials()
    assert trial.state == PRUNED
    assert trial.user_attrs["reason"] == "stopped: the limit of 300 s was reached"
    assert 1 <= trial.user_attrs["epochs"] < 300


def test_the_limit_of_time_is_that_of_the_call(study, space):
    for _ in range(2):
        now = [0.0]

        def score(candidate, now=now):
            now[0] += 10
            return value(candidate)

        search(study, space, score, timeout=25, clock=lambda now=now: now[0])
    assert states(study) == [COMPLETE] * 6


def test_a_trial_that_is_stopped_before_its_first_report_is_tried_again_when_there_is_time(study, space):
    now = [0.0]

    def score(candidate):
        if now[0] == 0:
            now[0] = 100.0
            assert candidate.stopping == "stopped: the limit of 50 s was reached"
            raise optuna.TrialPruned
        return value(candidate)

    with pytest.raises(StudyFailed, match="no trial was scored; stopped: the limit of 50 s was reached"):
        search(study, space, score, timeout=50, clock=lambda: now[0])
    assert states(study) == [FAIL, WAITING]
    assert is_lost(study.get_trials()[0])
    search(study, space, score, trials=1, clock=lambda: now[0])
    assert states(study) == [FAIL, COMPLETE]
    first, second = study.get_trials()
    assert second.params == first.params


def test_a_score_may_count_epochs_that_it_does_not_report(study, space):
    def score(candidate):
        for fold in range(3):
            for _ in range(2):
                if candidate.trained(0.5):
                    raise optuna.TrialPruned
            candidate.report(fold + 1, 0.1)
        return 0.1

    search(study, space, score, epochs=8)
    assert states(study) == [COMPLETE, FAIL, WAITING], "the second was stopped before the end of its first fold"
    assert [trial.user_attrs["epochs"] for trial in study.get_trials()[:2]] == [6, 2]


# ---- how trials end


def test_a_trial_keeps_what_the_score_noted(study, space):
    def score(candidate):
        candidate.started()
        candidate.note(parameters=12, best_epoch=3)
        candidate.note(flops=5)
        return np.float32(0.5)

    search(study, space, score, trials=1)
    (trial,) = study.get_trials()
    assert trial.value == 0.5
    assert trial.user_attrs["metrics"] == {"parameters": 12, "best_epoch": 3, "flops": 5}
    assert trial.user_attrs["reason"] == ""
    assert trial.user_attrs["seconds"] >= 0
    assert trial.user_attrs["directory"] == "trials/0000"


@pytest.mark.parametrize(
    ("score", "state", "reason"),
    [
        (lambda candidate: float("nan"), FAIL, "the value is nan"),
        (lambda candidate: float("inf"), FAIL, "the value is inf"),
        (lambda candidate: None, FAIL, "the score returned 'None', which is no number"),
        (lambda candidate: "0.5", FAIL, "the score returned '0.5', which is no number"),
        (lambda candidate: True, FAIL, "the score returned 'True', which is no number"),
        (lambda candidate: [0.5, 0.5], FAIL, "the score returned 2 values for 1 objectives"),
        (lambda candidate: [], FAIL, "the score returned 0 values for 1 objectives"),
        (lambda candidate: [0.5], COMPLETE, ""),
        (lambda candidate: np.array(0.5), COMPLETE, ""),
        (lambda candidate: candidate.report(1, float("nan")), FAIL, "the value of step 1 is nan"),
        (lambda candidate: candidate.trained(float("-inf")), FAIL, "the value of epoch 1 is -inf"),
        (lambda candidate: 1 / 0, FAIL, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_score_returns(score, state, reason, study, space):
    search(study, space, lambda candidate: score(candidate) if candidate.number == 0 else 1.0, trials=2)
    first = study.get_trials()[0]
    assert first.state == state
    assert first.user_attrs["reason"] == reason
    assert study.get_trials()[1].state == COMPLETE


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (TrialFailed("out of memory"), FAIL, "out of memory"),
        (RuntimeError("two\nlines"), FAIL, "RuntimeError: two lines"),
        (Infeasible("the image is too small"), PRUNED, "infeasible: the image is too small"),
        (optuna.TrialPruned("after fold 2"), PRUNED, "after fold 2"),
        (optuna.TrialPruned(), PRUNED, "pruned"),
    ],
)
def test_what_a_score_raises(error, state, reason, study, space):
    def score(candidate):
        if candidate.number == 0:
            raise error
        return 1.0

    changed = []
    search(study, space, score, trials=2, on_change=changed.append)
    first = study.get_trials()[0]
    assert first.state == state
    assert first.value is None
    assert first.user_attrs["reason"] == reason
    assert first.user_attrs.get("infeasible", False) == isinstance(error, Infeasible)
    assert not is_lost(first)
    assert [(trial.number, trial.state) for trial in changed] == [(0, state), (1, COMPLETE)]


def test_a_pruned_trial_has_its_last_report(space):
    study, _ = open_study("x", InMemoryStorage(), ["minimize"], RandomSampler(seed=0), MedianPruner(1), space=space)

    def score(candidate):
        for step in (1, 2, 3):
            if candidate.report(step, candidate.number + step):
                raise optuna.TrialPruned
        return candidate.number

    search(study, space, score, trials=2)
    second = study.get_trials()[1]
    assert second.state == PRUNED
    assert second.value == 2
    assert second.user_attrs["reason"] == "pruned at step 1"
    assert second.user_attrs["epochs"] == 1


def test_several_objectives(pair, space):
    def score(candidate):
        assert not candidate.report(1, 0.5), "nobody can be asked"
        if candidate.number == 1:
            raise optuna.TrialPruned("too slow")
        if candidate.number == 2:
            return 0.5
        if candidate.number == 3:
            return 0.5, float("nan")
        return candidate.values["x"], 2.0

    search(pair, space, score, trials=5)
    assert states(pair) == [COMPLETE, PRUNED, FAIL, FAIL, COMPLETE]
    trials = pair.get_trials()
    assert trials[0].values == [trials[0].params["x"], 2.0]
    assert trials[1].values is None
    assert trials[2].user_attrs["reason"] == "the score returned 1 values for 2 objectives"
    assert trials[3].user_attrs["reason"] == "the value is nan"
    assert [trial.user_attrs["epochs"] for trial in trials] == [1] * 5


SAMPLERS = {
    "tpe": lambda: TPESampler(seed=0, n_startup_trials=4),
    "tpe-independent": lambda: TPESampler(seed=0, n_startup_trials=4, multivariate=False),
    "gp": lambda: GPSampler(seed=0, n_startup_trials=4),
    "nsga-ii": lambda: NSGAIISampler(seed=0, population_size=4),
    "nsga-iii": lambda: NSGAIIISampler(seed=0, population_size=4),
    "random": lambda: RandomSampler(seed=0),
    "qmc": lambda: QMCSampler(seed=0),
    "grid": lambda: GridSampler({"x": [0.0, 0.25, 0.5, 0.75, 1.0], "y": [1, 2, 3]}, seed=0),
    "brute-force": lambda: BruteForceSampler(seed=0),
    "cma-es": lambda: CmaEsSampler(seed=0, n_startup_trials=4),  # for one objective
}
CASES = [(name, count) for name in SAMPLERS for count in (1, 2) if (name, count) != ("cma-es", 2)]


@pytest.mark.parametrize(("sampler", "objectives"), CASES)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_take_infeasible_and_failed_trials(sampler, objectives):
    space = Space.parse({"x": {"float": [0, 1, 0.25]}, "y": {"int": [1, 3]}})
    directions = ["minimize", "maximize"][:objectives]
    built = SAMPLERS[sampler]()
    study, _ = open_study("x", InMemoryStorage(), directions, built, None, space=space)

    def score(candidate):
        if candidate.number % 3 == 1:
            raise Infeasible("too small")
        if candidate.number % 5 == 2:
            raise TrialFailed("no reason")
        if candidate.number % 5 == 3:
            raise optuna.TrialPruned
        return [candidate.values["x"], candidate.values["y"]][:objectives]

    search(study, space, score, trials=14)
    found = Counter(states(study))
    assert found[PRUNED] == 7
    assert found[FAIL] == 2
    assert found[COMPLETE] == 5
    assert study.best_trials
    assert all(trial.state == COMPLETE for trial in study.best_trials)


def test_tpe_avoids_what_is_infeasible():
    space = Space.parse({"x": {"float": [0, 1]}})
    study, _ = open_study("x", InMemoryStorage(), ["minimize"], TPESampler(seed=0), None, space=space)

    def score(candidate):
        if candidate.values["x"] < 0.5:
            raise Infeasible("below a half")
        return (candidate.values["x"] - 0.8) ** 2

    search(study, space, score, trials=60)
    infeasible = [trial.user_attrs.get("infeasible", False) for trial in study.get_trials()]
    assert sum(infeasible[:10]) >= 3
    assert sum(infeasible[30:]) <= 5  # half of them, were it drawn at random


# ---- failures


@pytest.mark.parametrize(
    ("fails", "trials", "sentence"),
    [
        (lambda number: True, 50, "4 of 4 trials failed, most often: out of memory in trial"),
        (lambda number: number % 5 < 3, 50, "6 of 10 trials failed, most often: out of memory"),
        (lambda number: True, 3, "all 3 trials failed, most often: out of memory in trial 0"),
    ],
)
def test_a_study_of_failures_ends(fails, trials, sentence, study, space):
    def score(candidate):
        if fails(candidate.number):
            raise TrialFailed("odd" if candidate.number == 1 else f"out of memory in trial {candidate.number}")
        return 1.0

    with pytest.raises(StudyFailed, match=sentence):
        search(study, space, score, trials=trials)


def test_half_of_the_trials_may_fail(study, space):
    def score(candidate):
        if candidate.number % 2:
            raise TrialFailed("odd")
        return 1.0

    search(study, space, score, trials=30)
    assert Counter(states(study)) == {COMPLETE: 15, FAIL: 15}


def test_infeasible_and_pruned_trials_are_no_failures(study, space):
    def score(candidate):
        raise Infeasible("no") if candidate.number % 2 else optuna.TrialPruned

    search(study, space, score, trials=12)
    assert states(study) == [PRUNED] * 12


def test_a_sampler_that_cannot_choose_fails_the_trial(study, space, monkeypatch):
    sample = study.sampler.sample_independent

    def sometimes(study, trial, *rest):
        if trial.number == 1:
            raise RuntimeError("singular matrix")
        return sample(study, trial, *rest)

    monkeypatch.setattr(study.sampler, "sample_independent", sometimes)
    search(study, space, value, trials=3)
    assert states(study) == [COMPLETE, FAIL, COMPLETE]
    reason = study.get_trials()[1].user_attrs["reason"]
    assert reason == "its values could not be chosen: singular matrix"


def test_a_full_disk_ends_the_search_and_loses_no_trial(study, space):
    def score(candidate):
        if candidate.number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return value(candidate)

    with pytest.raises(DiskFullError, match="no space left"):
        search(study, space, score, trials=3)
    assert states(study) == [COMPLETE, FAIL, WAITING]
    assert study.get_trials()[1].user_attrs["lost"]
    search(study, space, score, trials=3)
    assert Counter(states(study)) == {COMPLETE: 3, FAIL: 1}


def test_a_full_disk_under_the_storage_ends_the_search(space, tmp_path, monkeypatch):
    storage, _ = open_storage(f"journal:{tmp_path}/x", tmp_path)
    study, _ = open_study("x", storage, ["minimize"], RandomSampler(seed=0), None, space=space)
    search(study, space, value, trials=2)

    def fill(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fill)
        with pytest.raises(DiskFullError, match="no space left for the study"):
            search(study, space, value, trials=4)
    # What had been running has no owner any more; the next call sees to it.
    search(study, space, value, trials=4, **QUICK)
    assert sum(map(counts, study.get_trials())) == 4
    assert Counter(states(study))[COMPLETE] == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("records")])
def test_an_interruption_loses_no_trial(error, study, space):
    gate = threading.Event()

    def score(candidate):
        if candidate.number:
            candidate.report(1, 0.5)
            gate.set()
            candidate.interrupted.wait(60)
            raise optuna.TrialPruned
        gate.wait(60)
        return value(candidate)

    def interrupt(trial):
        raise error

    with pytest.raises(type(error)):
        search(study, space, score, trials=3, workers=2, on_change=interrupt)
    assert states(study) == [COMPLETE, FAIL, WAITING]
    lost, retry = study.get_trials()[1:]
    assert lost.user_attrs["reason"] == ("interrupted: records" if isinstance(error, RuntimeError) else "interrupted")
    assert lost.user_attrs["epochs"] == 1
    assert retry.user_attrs["retry_of"] == 1
    search(study, space, value, trials=3)
    assert Counter(states(study)) == {COMPLETE: 3, FAIL: 1}
    assert study.get_trials()[2].params == lost.params


def test_a_score_that_ends_during_an_interruption_is_kept(study, space):
    def score(candidate):
        if candidate.number == 1:
            candidate.interrupted.wait(60)
        return value(candidate)

    def interrupt(trial):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(study, space, score, trials=3, workers=2, on_change=interrupt)
    assert states(study)[:2] == [COMPLETE, COMPLETE]


def test_an_interruption_by_a_score_ends_the_search(study, space):
    def score(candidate):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(study, space, score, trials=3)
    assert states(study) == [FAIL, WAITING]


# ---- candidates


def test_slots_are_those_of_no_other_running_candidate(study, space):
    lock, taken, seen = threading.Lock(), set(), []

    def score(candidate):
        with lock:
            assert candidate.slot not in taken
            taken.add(candidate.slot)
            seen.append(candidate.slot)
        time.sleep(0.01)
        with lock:
            taken.remove(candidate.slot)
        return value(candidate)

    search(study, space, score, trials=20, workers=3)
    assert set(seen) == {0, 1, 2}
    assert states(study) == [COMPLETE] * 20


def test_a_replay_counts_no_epochs_and_asks_nothing(space):
    class NeverAgain(optuna.pruners.BasePruner):
        asked = 0

        def prune(self, study, trial):
            self.asked += 1
            return trial.last_step == 5

    pruner = NeverAgain()
    study, _ = open_study("x", InMemoryStorage(), ["minimize"], RandomSampler(seed=0), pruner, space=space)

    def score(candidate):
        candidate.replay([(1, 0.5), (2, 0.4), (5, 0.3), (5, 0.2)])
        assert candidate.epochs == 0
        assert not candidate.report(6, 0.25)
        return 0.2

    search(study, space, score, trials=1)
    (trial,) = study.get_trials()
    assert trial.intermediate_values == {1: 0.5, 2: 0.4, 5: 0.3, 6: 0.25}
    assert trial.user_attrs["epochs"] == 1
    assert pruner.asked == 1


def test_a_step_that_is_reported_twice_counts_once(study, space):
    def score(candidate):
        candidate.report(1, 0.5)
        candidate.report(1, 0.6)
        return 0.5

    search(study, space, score, trials=1)
    (trial,) = study.get_trials()
    assert trial.user_attrs["epochs"] == 1
    assert trial.intermediate_values == {1: 0.5}


def test_what_is_enqueued_comes_first_and_once(study, space):
    for trials in (3, 4):
        search(study, space, value, trials=trials, enqueue=[{"x": 0.25}, {"x": 0.75}])
    found = [trial.params["x"] for trial in study.get_trials()]
    assert found[:2] == [0.25, 0.75]
    assert len(set(found)) == 4


def test_a_candidate_sees_the_attributes_that_it_was_enqueued_with(study, space):
    study.enqueue_trial({"x": 0.25}, user_attrs={"parent": 3, "until": 5})
    seen = []
    search(study, space, lambda candidate: seen.append(candidate.attributes) or 1.0, trials=1)
    assert seen[0]["parent"] == 3
    assert seen[0]["until"] == 5
    assert seen[0]["directory"] == "trials/0000"


def test_population_based_training_runs_to_its_end(space):
    for name, workers_ in (("one", 1), ("three", 3)):
        sampler = PopulationSampler(population=3, ready=2, total=6, seed=0)
        study, _ = open_study(name, InMemoryStorage(), ["minimize"], sampler, None, space=space)
        search(study, space, value, workers=workers_, beat=0.3)
        assert states(study) == [COMPLETE] * 9
        assert Counter(trial.user_attrs["until"] for trial in study.get_trials()) == {2: 3, 4: 3, 6: 3}


# ---- owners


def test_a_worker_lives_as_long_as_its_search():
    with working() as worker:
        assert lives(worker) is True
        assert lives({**worker, "started": "0"}) is False, "another process has its number now"
        assert lives({**worker, "host": "elsewhere"}) is None
    assert lives(worker) is False
    assert lives(dead_worker()) is False


def test_a_zombie_is_dead():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process, working() as worker:
        _, started = workers._process(process.pid)
        other = {**worker, "pid": process.pid, "started": started}
        assert lives(other) is True
        process.stdin.close()
        while workers._process(process.pid)[0] != "Z":
            time.sleep(0.01)
        assert lives(other) is False


def test_workers_of_other_machines_are_judged_by_their_beats(study, space):
    now = [0.0]
    watch = Watch(silence=120, clock=lambda: now[0])
    trial = leave_running(study, space, {"host": "elsewhere", "pid": 1, "started": "1"})

    def found():
        return watch.lives(study.get_trials()[0])

    assert found() is None
    now[0] = 100.0
    assert found() is None
    trial.set_user_attr("beat", 0.5)  # their clock is their own
    assert found() is True
    now[0] = 220.0
    assert found() is True
    now[0] = 220.1
    assert found() is False


def test_beats_go_on_while_a_score_works_and_when_the_storage_fails(study, space, monkeypatch):
    set_attribute = study._storage.set_trial_user_attr
    failed = []

    def fail_at_first(trial_id, key, each):
        if threading.current_thread().name == "pulse" and len(failed) < 3:
            failed.append(key)
            raise ConnectionError("away")
        set_attribute(trial_id, key, each)

    monkeypatch.setattr(study._storage, "set_trial_user_attr", fail_at_first)

    def score(candidate):
        first = candidate.attributes["beat"]
        candidate.report(1, 0.5)
        while study.get_trials()[0].user_attrs["beat"] == first or "epochs" not in study.get_trials()[0].user_attrs:
            time.sleep(0.01)
        return 0.5

    search(study, space, score, trials=1, beat=0.05)
    assert failed == ["beat"] * 3
    assert not [thread for thread in threading.enumerate() if thread.name == "pulse"]


def test_a_pulse_stops_at_the_end_of_a_trial(study, space):
    trial = leave_running(study, space, dead_worker())
    with Pulse(0.01) as pulse:
        pulse.add(trial, lambda: {"epochs": 0, "seconds": 0.0})
        study.tell(trial, 0.5)
        while pulse._trials:
            time.sleep(0.01)


# ---- recovery


def test_the_trial_of_a_dead_worker_is_tried_again(study, space, caplog):
    trial = leave_running(study, space, worker := dead_worker(), note="mine", metrics={"a": 1})
    trial.report(0.5, 1)
    with caplog.at_level(logging.WARNING):
        search(study, space, value, trials=2)
    lost, retry, other = study.get_trials()
    assert lost.state == FAIL
    assert lost.user_attrs["reason"] == f"lost: worker {worker['pid']} died"
    assert (retry.state, other.state) == (COMPLETE, COMPLETE)
    assert retry.params == lost.params
    assert retry.user_attrs["retry_of"] == 0
    assert retry.user_attrs["note"] == "mine"
    assert retry.user_attrs["directory"] == "trials/0001"
    assert "metrics" not in retry.user_attrs
    assert "trial 0 is tried again" in caplog.text


def test_the_end_waits_for_a_sign_of_life_of_other_machines(study, joined, space):
    leave_running(joined, space, {"host": "elsewhere", "pid": 1, "started": "1"})
    search(study, space, value, trials=2, **QUICK)
    assert states(study) == [FAIL, COMPLETE, COMPLETE]
    reason = study.get_trials()[0].user_attrs["reason"]
    assert reason == "lost: worker 1 of another machine gave no sign of life for 0.6 s"


def test_the_end_does_not_wait_for_trials_whose_worker_gives_signs_of_life(study, joined, space):
    trial = leave_running(joined, space, {"host": "elsewhere", "pid": 1, "started": "1"})
    ended = threading.Event()

    def beat():
        while not ended.wait(0.01):
            trial.set_user_attr("beat", time.time())

    thread = threading.Thread(target=beat)
    thread.start()
    search(study, space, value, trials=2, beat=0.3, silence=600)
    ended.set()
    thread.join()
    assert states(study) == [RUNNING, COMPLETE]


def test_a_trial_that_was_never_claimed_is_tried_again(study, joined, space):
    joined.ask()  # killed right after
    search(study, space, value, trials=2, **QUICK)
    assert states(study) == [FAIL, COMPLETE, COMPLETE]
    lost = study.get_trials()[0]
    assert lost.user_attrs["reason"] == "lost: its worker died before it could claim it"
    assert study.get_trials()[2].params == lost.params


def test_a_trial_that_others_have_taken_for_lost_is_tried_again_and_dropped_here(study, joined, space, caplog):
    def score(candidate):
        if candidate.number == 0:
            with working() as other:
                workers.give_up(joined, joined.get_trials()[0], "lost: silent", other)
            with pytest.raises(UpdateFinishedTrialError):
                candidate.trial.set_user_attr("x", 1)
            assert candidate.report(1, 0.5), "it should stop"
            return 0.0
        return value(candidate)

    with caplog.at_level(logging.WARNING):
        search(study, space, score, trials=2)
    assert states(study) == [FAIL, COMPLETE, COMPLETE]
    assert study.get_trials()[0].user_attrs["reason"] == "lost: silent"
    assert "its result is dropped" in caplog.text


def test_of_two_trials_that_continue_the_same_one_the_first_counts(study, space):
    leave_running(study, space, dead_worker())
    with working() as worker:
        recover(study, space, Watch(), worker)
        workers._enqueue_again(study, 0)
    search(study, space, value, trials=2)
    assert states(study) == [FAIL, COMPLETE, FAIL, COMPLETE]
    second = study.get_trials()[2]
    assert second.user_attrs["reason"] == "withdrawn: trial 0 is continued by another one"
    assert sum(trial.user_attrs.get("retry_of") == 0 for trial in study.get_trials()) == 2
    search(study, space, value, trials=3)
    assert sum(trial.user_attrs.get("retry_of") is not None for trial in study.get_trials()) == 2


def test_a_trial_that_came_to_its_end_is_not_continued(study, space):
    search(study, space, value, trials=1)
    workers._enqueue_again(study, 0)
    search(study, space, value, trials=2)
    assert states(study) == [COMPLETE, FAIL, COMPLETE]


class Killed(BaseException):
    """What happens to a process between two writes."""


def allow(patch, storage, writes):
    """Let a storage take so many writes about trials, and kill who asks for one more."""
    left = itertools.count(writes, -1)

    def limited(through):
        def write(*arguments, **options):
            if next(left) <= 0:
                raise Killed
            return through(*arguments, **options)

        return write

    for name in ("set_trial_user_attr", "set_trial_state_values", "set_trial_param", "create_new_trial"):
        patch.setattr(storage, name, limited(getattr(storage, name)))


@pytest.mark.parametrize("claimed", [True, False], ids=["scored", "half asked"])
@pytest.mark.parametrize("sampler", [RandomSampler, BruteForceSampler])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_kill_between_any_two_writes_of_a_recovery_loses_nothing_and_counts_nothing_twice(claimed, sampler):
    space = Space.parse({"x": {"int": [0, 3]}, "y": {"int": [0, 3]}})
    for writes in itertools.count():
        study, _ = open_study("x", InMemoryStorage(), ["minimize"], sampler(seed=0), None, space=space)
        search(study, space, lambda candidate: 1.0, trials=2)
        if claimed:
            leave_running(study, space, dead_worker())
        else:
            trial = study.ask()
            trial.suggest_int("x", 0, 3)
            trial.set_user_attr("worker", dead_worker())
        with pytest.MonkeyPatch.context() as patch:
            allow(patch, study._storage, writes)
            try:
                with working() as worker:
                    recover(study, space, Watch(), worker)
                killed = False
            except Killed:
                killed = True
        assert sum(trial.state.is_finished() and not is_lost(trial) for trial in study.get_trials()) == 2
        with working() as worker:
            recover(study, space, Watch(), worker)
        assert states(study) == [COMPLETE, COMPLETE, FAIL, WAITING]
        lost, retry = study.get_trials()[2:]
        assert is_lost(lost)
        assert set(lost.params) == {"x", "y"}
        assert retry.system_attrs["fixed_params"] == lost.params
        assert retry.user_attrs["retry_of"] == 2
        search(study, space, lambda candidate: 1.0, trials=4)
        assert Counter(states(study)) == {COMPLETE: 4, FAIL: 1}
        if not killed:
            assert writes >= 7  # values, five attributes, the state, the retry: the loop has been between all of them
            return


# ---- real processes


WORKER = """
import random
import sys
import time
from pathlib import Path
from optuna.samplers import RandomSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import open_study, search

url, trials, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
space = Space.parse({"x": {"float": [0, 1]}, "y": {"float": [0, 1]}})
storage, _ = open_storage(url, Path("."))
study, _ = open_study("killed", storage, ["minimize"], RandomSampler(seed=seed), None, space=space)
print("ready", flush=True)

def score(candidate):
    for step in (1, 2, 3):
        time.sleep(0.01)
        candidate.report(step, candidate.values["x"])
    return candidate.values["x"]

search(study, space, score, trials=trials, workers=2, beat=0.3, silence=1.5)
"""


@pytest.fixture
def start():
    """Start a process that works on a study; what is left of them at the end is killed."""
    started = []

    def begin(url, trials, seed):
        command = [sys.executable, "-c", WORKER, url, str(trials), str(seed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_ten_kills_at_random_moments_lose_nothing_and_count_nothing_twice(kind, start, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else f"journal:{tmp_path}/study.journal"
    generator = random.Random(0)
    alive = [start(url, 100_000, 0)]
    for kill in range(10):  # there are always two, and either may be the one
        alive.append(start(url, 100_000, kill + 1))
        time.sleep(generator.uniform(0.0, 0.4))
        victim = alive.pop(generator.randrange(2))
        assert victim.poll() is None, victim.stderr.read()
        victim.kill()
    alive[0].kill()
    alive[0].communicate()
    storage, _ = open_storage(url, tmp_path)
    study = optuna.load_study(study_name="killed", storage=storage)
    assert RUNNING in states(study)
    trials = sum(map(counts, study.get_trials())) + 10
    for process in [start(url, trials, seed) for seed in (98, 99)]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    found = study.get_trials()
    assert [trial.number for trial in found] == list(range(len(found)))
    assert sum(map(counts, found)) == trials
    assert Counter(trial.state for trial in found if counts(trial)) == {COMPLETE: trials}
    lost = [trial for trial in found if is_lost(trial) and not trial.user_attrs.get("withdrawn")]
    assert lost
    continued = Counter(trial.user_attrs.get("retry_of") for trial in found if not trial.user_attrs.get("withdrawn"))
    for trial in lost:
        assert continued[trial.number] == 1
        retry = next(each for each in found if each.user_attrs.get("retry_of") == trial.number)
        assert retry.system_attrs["fixed_params"] == trial.params
        assert set(trial.params) == {"x", "y"}
    complete = [trial for trial in found if trial.state == COMPLETE]
    assert len({trial.params["x"] for trial in complete}) == trials, "a value was scored twice"
    assert all(trial.value == trial.params["x"] for trial in complete)


def test_an_interrupt_in_the_moment_when_a_score_begins_reaches_it_too(study, space, monkeypatch):
    begun = []

    def score(candidate):
        begun.append(candidate)
        assert candidate.interrupted.wait(30)

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments):
            super().submit(*arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr("lightning_automl.search.study.ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        search(study, space, score, trials=2)
    assert len(begun) <= 1
    assert all(candidate.interrupted.is_set() for candidate in begun)
    assert states(study) == [FAIL, WAITING]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_running_trials_up(number, tmp_path):
    url = f"journal:{tmp_path}/study.journal"
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n" + WORKER
    code = code.replace("time.sleep(0.01)", "candidate.interrupted.wait(60)\n        print('begun', flush=True)", 1)
    code = code.replace("def score(candidate):", "def score(candidate):\n    print('begun', flush=True)")
    process = subprocess.Popen(
        [sys.executable, "-c", code, url, "4", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert [process.stdout.readline() for _ in range(3)] == ["ready\n", "begun\n", "begun\n"]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    study = optuna.load_study(study_name="killed", storage=open_storage(url, tmp_path)[0])
    found = study.get_trials()
    # A score that came to its end in the meantime is kept.
    assert Counter(trial.state for trial in found[:2]) in ({COMPLETE: 2}, {COMPLETE: 1, FAIL: 1}, {FAIL: 2})
    assert not [trial for trial in found if trial.state == RUNNING]
