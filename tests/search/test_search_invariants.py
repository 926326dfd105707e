"""What must hold of a search whatever it is for: the same seed, the same trials; a grid once; no epoch uncounted."""

import itertools
import threading
from collections import Counter

import optuna
import pytest
from optuna.pruners import MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import (
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from lightning_automl.search.samplers import PopulationSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import TrialFailed, derived_seed, open_study, search
from lightning_automl.search.workers import counts, is_lost, working

MIXED = Space.parse(
    {
        "lr": {"log_float": [1e-4, 1e-1]},
        "layers": {"int": [1, 3]},
        "pool": {"choice": ["none", "max", "avg"]},
        "momentum": {"float": [0, 0.99], "when": {"pool": ["max", "avg"]}},
    }
)
LINE = Space.parse({"x": {"float": [-5, 5]}})
SAMPLERS = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga-ii": lambda seed: NSGAIISampler(seed=seed, population_size=8),
    "random": lambda seed: RandomSampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=5),
    "cma-es": lambda seed: CmaEsSampler(seed=seed),
    "qmc": lambda seed: QMCSampler(seed=seed),
    "pbt": lambda seed: PopulationSampler(population=5, ready=1, total=6, seed=seed),
}

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def opened(sampler, space=LINE, directions=("minimize",), pruner=None, storage=None, name="x"):
    return open_study(name, storage or InMemoryStorage(), directions, sampler, pruner, space=space)[0]


def parabola(candidate):
    return (candidate.values["x"] - 1) ** 2


def loss(candidate):
    values = candidate.values
    return values["lr"] * values["layers"] + values.get("momentum", 0.5)


def configs(study):
    return [trial.params for trial in study.get_trials()]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_same_configs(name):
    space, score, trials = (MIXED, loss, 30)
    if name in ("gp", "pbt"):  # a slow one, and one that takes no conditions
        space, score, trials = (LINE, parabola, 9)
    found = [configs(search(opened(SAMPLERS[name](seed), space), space, score, trials=trials)) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert len(found[0]) == trials


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_the_storage_changes_no_config(kind, tmp_path):
    storage, _ = open_storage(None if kind == "sqlite" else f"journal:{tmp_path}/x", tmp_path)
    in_file = search(opened(TPESampler(seed=0), MIXED, storage=storage), MIXED, loss, trials=15)
    assert configs(in_file) == configs(search(opened(TPESampler(seed=0), MIXED), MIXED, loss, trials=15))


def test_the_configs_are_those_of_optuna_alone():
    study = optuna.create_study(sampler=TPESampler(seed=3))
    study.optimize(lambda trial: (trial.suggest_float("x", -5, 5) - 1) ** 2, n_trials=30)
    assert configs(search(opened(TPESampler(seed=3)), LINE, parabola, trials=30)) == configs(study)


def test_tpe_begins_with_ten_random_trials():
    # Of the same stream when nothing else draws from it.
    tpe = opened(TPESampler(seed=0, multivariate=False))
    drawn = [trial["x"] for trial in configs(search(tpe, LINE, parabola, trials=11))]
    plain = [trial["x"] for trial in configs(search(opened(RandomSampler(seed=0)), LINE, parabola, trials=11))]
    assert drawn[:10] == plain[:10]
    assert drawn[10] != plain[10]
    assert all(-5 <= x <= 5 for x in drawn)


# ---- samplers that go through all points

GRID = Space.parse({"x": {"int": [0, 3]}, "y": {"choice": ["a", "b", "c"]}})
TREE = Space.parse(
    {"n": {"int": [1, 2]}, "a": {"int": [0, 2]}, "b": {"choice": ["p", "q"], "when": {"n": [2]}}}
)  # 3 + 3 * 2 points


def exhaustive(name, seed=0):
    if name == "grid":
        return GridSampler(GRID.grid(), seed=seed), GRID, 12
    return BruteForceSampler(seed=seed), TREE, 9


def check_once(study, points):
    kept = [trial for trial in study.get_trials() if not is_lost(trial)]
    found = Counter(tuple(sorted(trial.params.items())) for trial in kept)
    assert len(found) == points
    assert set(found.values()) == {1}
    assert all(trial.state.is_finished() for trial in kept)


@pytest.mark.parametrize("workers", [1, 3, 20])
@pytest.mark.parametrize("name", ["grid", "brute force"])
def test_all_points_are_visited_once_and_then_it_stops(name, workers):
    sampler, space, points = exhaustive(name)
    study = opened(sampler, space)
    gate = threading.Barrier(min(workers, points))  # all at once, so that points are running while others are asked for

    def score(candidate):
        if candidate.number < gate.parties:
            gate.wait(60)
        if candidate.number % 5 == 1:
            raise TrialFailed("no reason")
        return 1.0

    search(study, space, score, workers=workers, beat=0.3)
    check_once(study, points)
    asked = len(study.get_trials())
    search(study, space, score, workers=workers, beat=0.3)  # nothing is left
    assert len(study.get_trials()) == asked
    check_once(study, points)


@pytest.mark.parametrize("name", ["grid", "brute force"])
def test_all_points_are_visited_once_by_two_processes(name):
    storage = InMemoryStorage()
    _, space, points = exhaustive(name)
    # The same seed: it decides which place in the grid a number is.
    studies = [opened(exhaustive(name)[0], space, storage=storage) for _ in range(2)]
    threads = [
        threading.Thread(target=search, args=(study, space, lambda candidate: 1.0), kwargs={"beat": 0.3})
        for study in studies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_once(studies[0], points)


class Interrupted(BruteForceSampler):
    """Lets another process do something when this one has chosen all values of a trial and noted all but the last."""

    def __init__(self, other):
        super().__init__(seed=0)
        self.other = other

    def sample_independent(self, study, trial, name, distribution):
        value = super().sample_independent(study, trial, name, distribution)
        values = {**trial.params, name: value}
        if self.other is not None and len(values) == (2 if values["n"] == 1 else 3):
            other, self.other = self.other, None
            other(values)
        return value


def test_a_value_under_which_others_are_being_chosen_is_not_taken_for_visited():
    storage = InMemoryStorage()

    def visit(values):
        assert values["n"] == 1
        other = opened(Interrupted(None), TREE, storage=storage)
        search(other, TREE, lambda candidate: 1.0, trials=7)  # the six points with n=2, and the one being chosen

    study = opened(Interrupted(visit), TREE, storage=storage)
    search(study, TREE, lambda candidate: 1.0, enqueue=[{"n": 1}])
    check_once(study, 9)


@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["before it is noted", "after it is noted"])
def test_a_point_that_another_process_comes_to_meanwhile_is_visited_once_and_ends_no_search(seconds):
    storage = InMemoryStorage()
    other = opened(Interrupted(None), TREE, storage=storage)
    with working() as worker:
        trial = other.ask()
        trial.set_user_attr("worker", worker)

        def visit(values):
            for name, value in values.items():
                distribution = TREE.distributions()[name]
                storage.set_trial_param(trial._trial_id, name, distribution.to_internal_repr(value), distribution)
            other.tell(trial, 1.0)

        def visit_in_time(values):
            later = threading.Timer(seconds, visit, [values])
            later.start()
            if not seconds:
                later.join()

        study = opened(Interrupted(visit_in_time), TREE, storage=storage)
        search(study, TREE, lambda candidate: 1.0)
    check_once(study, 9)
    assert sum(map(is_lost, study.get_trials())) == 1  # the one that came to the same point


@pytest.mark.parametrize("name", ["grid", "brute force"])
@pytest.mark.parametrize("asked", [0, 1, 2], ids=["before any value", "between values", "after all values"])
def test_a_point_that_was_lost_is_visited_again(name, asked):
    sampler, space, points = exhaustive(name)
    study = opened(sampler, space)
    search(study, space, lambda candidate: 1.0, trials=3)
    trial = study.ask()
    with working() as worker:
        trial.set_user_attr("worker", worker)  # dead when the block ends
        for _, (suggest, arguments) in zip(
            range(asked),
            [
                (trial.suggest_int, ("x", 0, 3) if name == "grid" else ("n", 1, 2)),
                (
                    trial.suggest_categorical if name == "grid" else trial.suggest_int,
                    ("y", ["a", "b", "c"]) if name == "grid" else ("a", 0, 2),
                ),
            ],
            strict=False,
        ):
            suggest(*arguments)
    search(study, space, lambda candidate: 1.0, workers=2, beat=0.3)
    check_once(study, points)
    # with two workers one may come to a point that the other has, and give it back
    assert sum(is_lost(each) and not each.user_attrs.get("withdrawn") for each in study.get_trials()) == 1


# ---- quality


@pytest.mark.slow
def test_tpe_beats_random_search():
    def mean(sampler):
        best = [search(opened(sampler(seed=seed)), LINE, parabola, trials=50).best_value for seed in range(30)]
        return sum(best) / len(best)

    assert mean(TPESampler) < mean(RandomSampler) / 2


@pytest.mark.parametrize("name", ["tpe", "random", "nsga-ii", "cma-es", "pbt"])
def test_maximizing_f_is_minimizing_its_negative(name):
    down = search(opened(SAMPLERS[name](0)), LINE, parabola, trials=30)
    up = search(
        opened(SAMPLERS[name](0), directions=("maximize",)), LINE, lambda candidate: -parabola(candidate), trials=30
    )
    assert configs(down) == configs(up)
    assert down.best_trial.number == up.best_trial.number


# ---- pruning


def curves(curve, steps=8):
    """A score whose value at a step is ``curve(number, step)``."""

    def score(candidate):
        for step in range(1, steps + 1):
            if candidate.report(step, curve(candidate.number, step), last=step == steps):
                raise optuna.TrialPruned
        return curve(candidate.number, steps)

    return score


@pytest.mark.parametrize(
    ("pruner", "first_rung"),
    [(MedianPruner(n_startup_trials=2), 1), (SuccessiveHalvingPruner(min_resource=2, reduction_factor=2), 2)],
)
def test_a_trial_that_is_worse_at_every_step_is_pruned_at_the_first_rung(pruner, first_rung):
    study = opened(RandomSampler(seed=0), pruner=pruner)
    # Losses, each trial better than all before it but the last, which is the worst.
    search(study, LINE, curves(lambda number, step: (99 if number == 5 else 10 - number) / step), trials=6)
    *others, last = study.get_trials()
    assert last.state == TrialState.PRUNED
    assert last.user_attrs["reason"] == f"pruned at step {first_rung}"
    assert last.user_attrs["epochs"] == first_rung
    assert all(trial.state == TrialState.COMPLETE for trial in others), "the best so far was pruned"


@pytest.mark.parametrize(
    ("pruner", "trials", "steps"),
    [
        (MedianPruner(n_startup_trials=5), 5, 1),
        (MedianPruner(n_startup_trials=1, n_warmup_steps=4), 1, 4),
        (SuccessiveHalvingPruner(min_resource=4, reduction_factor=2), 1, 4),
    ],
)
def test_nothing_is_pruned_before_enough_trials_or_in_the_warm_up(pruner, trials, steps):
    study = opened(RandomSampler(seed=0), pruner=pruner)
    search(study, LINE, curves(lambda number, step: number + 1.0), trials=10)  # each worse than all before it
    found = study.get_trials()
    assert all(trial.state == TrialState.COMPLETE for trial in found[:trials])
    assert any(trial.state == TrialState.PRUNED for trial in found[trials:])
    assert min(trial.user_attrs["epochs"] for trial in found) == steps


def test_every_epoch_is_counted_once():
    trained = itertools.count()
    pruner = MedianPruner(n_startup_trials=2)
    study = opened(RandomSampler(seed=0), pruner=pruner)
    curve = curves(lambda number, step: (number * 7 % 5 + 1) / step)

    def score(candidate):
        report = candidate.report

        def counted(step, *rest, **options):
            next(trained)
            return report(step, *rest, **options)

        candidate.report = counted
        if candidate.number % 6 == 5:
            candidate.report(1, 1.0)
            raise TrialFailed("after an epoch")
        return curve(candidate)

    search(study, LINE, score, epochs=60, workers=2)
    search(study, LINE, score, epochs=80)
    found = study.get_trials()
    assert {trial.state for trial in found} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert sum(trial.user_attrs["epochs"] for trial in found) == next(trained)
    assert all(trial.user_attrs["epochs"] == len(trial.intermediate_values) for trial in found)


# ---- several calls and processes


@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal"])
def test_twenty_and_twenty_trials_are_forty(kind, tmp_path):
    for existing in (0, 20):
        storage = None if kind == "memory" else f"journal:{tmp_path}/x"
        if kind != "memory":
            storage, _ = open_storage(None if kind == "sqlite" else storage, tmp_path)
        elif existing:
            storage = study._storage  # noqa: F821 - of the first round
        study = opened(TPESampler(seed=derived_seed(0, existing)), storage=storage)
        search(study, LINE, parabola, trials=existing + 20)
    found = study.get_trials()
    assert [trial.number for trial in found] == list(range(40))
    assert all(trial.state == TrialState.COMPLETE for trial in found)
    assert len({trial.params["x"] for trial in found}) == 40, "the second process drew the values of the first"


def test_two_searches_on_one_journal_lose_no_trial(tmp_path):
    url = f"journal:{tmp_path}/x"
    scored = []

    def work(seed):
        storage, _ = open_storage(url, tmp_path)  # of its own, as another process has it
        study = opened(RandomSampler(seed=seed), storage=storage)
        search(study, LINE, lambda candidate: scored.append(candidate.number) or parabola(candidate), trials=40)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    study = optuna.load_study(study_name="x", storage=open_storage(url, tmp_path)[0])
    found = study.get_trials()
    assert [trial.number for trial in found] == list(range(len(found)))
    assert sum(map(counts, found)) == 40
    assert sorted(scored) == [trial.number for trial in found if trial.state == TrialState.COMPLETE]
