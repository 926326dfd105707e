"""Optuna's own tests of samplers on ours, and what our search relies on in Optuna's samplers and pruners."""

import inspect
import math
from itertools import pairwise

import numpy as np
import optuna
import pytest
from jsonargparse import ArgumentParser
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.samplers.nsgaii._elite_population_selection_strategy import (
    NSGAIIElitePopulationSelectionStrategy,
    _calc_crowding_distance,
    _rank_population,
)
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase
from optuna.trial import TrialState
from scipy.stats import kstest

from lightning_automl.search.pruners import rungs
from lightning_automl.search.samplers import GroupwiseSampler, PopulationSampler


@pytest.fixture(autouse=True)
def quiet():
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


# Of Optuna's cases MultiObjectiveSamplerTestCase does not apply: both samplers compare single values and refuse
# several objectives, which SingleOnlySamplerTestCase tests.


class TestPopulationSampler(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self):
        return lambda: PopulationSampler(population=3, total=5)  # both segments of members and trials beyond them


def groupwise(groups, within):
    sampler = GroupwiseSampler(groups, 2, within)
    sampler.check(["a", "x", "y"])  # of the names in Optuna's cases some lack a group or the other: no mistake
    return sampler


class TestGroupwiseSampler(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    # RelativeSamplerTestCase does not apply: the sampler within draws together or not, and the random one never does.
    @pytest.fixture
    def sampler(self):
        return lambda: groupwise([["x"], ["*"]], RandomSampler(seed=0))


class TestGroupwiseSamplerWithTpe(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self):
        return lambda: groupwise([["y", "a"], ["*"]], TPESampler(seed=0, n_startup_trials=0))


def test_optuna_has_no_sampler_tests_that_are_not_considered_here():
    names = {name for name, _ in inspect.getmembers(optuna.testing.pytest_samplers, inspect.isclass)}
    cases = {name for name in names if name.endswith("TestCase") and not name.startswith("_")}
    used = {base.__name__ for base in TestPopulationSampler.__bases__}
    assert cases == used | {"MultiObjectiveSamplerTestCase"}


def construct(kind, class_path, **init_args):
    """As the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=kind)
    config = parser.parse_object({"made": {"class_path": class_path, "init_args": init_args}})
    return parser.instantiate_classes(config).made


def test_our_samplers_are_constructed_by_class_path():
    home = "lightning_automl.search.samplers"
    found = construct(BaseSampler, f"{home}.PopulationSampler", total=20, ready=2, factors=[0.5, 2])
    assert (found.total, found.factors, found.seed) == (20, (0.5, 2), 0)
    within = {"class_path": "optuna.samplers.TPESampler", "init_args": {"seed": 3}}
    found = construct(BaseSampler, f"{home}.GroupwiseSampler", groups=[["lr"]], trials_per_group=3, sampler=within)
    assert isinstance(found.sampler, TPESampler)
    assert found.groups == [["lr"]]


def trials_of(study):
    return study.get_trials(deepcopy=False)


def run(study, curve):
    """Report a curve epoch by epoch, 1-based, until it is pruned; tell the last value."""
    trial = study.ask()
    for epoch, value in enumerate(curve, 1):
        trial.report(value, epoch)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            break
    else:
        study.tell(trial, curve[-1])
    return trials_of(study)[trial.number]


def open_study(pruner, direction="maximize", **arguments):
    return optuna.create_study(direction=direction, pruner=pruner, sampler=RandomSampler(seed=0), **arguments)


def curves(number, epochs, seed=0):
    """Noisy learning curves of different levels, in random order."""
    generator = np.random.default_rng(seed)
    levels = generator.random((number, 1))
    rise = 1 - np.exp(-np.arange(1, epochs + 1) / epochs * 3)
    return (levels * rise + 0.05 * generator.standard_normal((number, epochs))).tolist()


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(("epochs", "eta"), [(81, 3), (16, 4), (10, 2)])
def test_successive_halving_keeps_the_top_of_each_rung_and_stops_the_rest_there(epochs, eta, direction):
    study = open_study(SuccessiveHalvingPruner(min_resource=1, reduction_factor=eta), direction)
    steps = [resource for _, resource in rungs(eta ** (len(rungs(epochs, eta)) - 1), eta)[0]]
    seen = {step: [] for step in steps}
    sign = 1 if direction == "maximize" else -1
    for curve in curves(60, epochs):
        trial = run(study, curve)
        last, stopped = epochs, False
        for step in steps:
            seen[step].append(sign * curve[step - 1])
            survivors = sorted(seen[step], reverse=True)[: max(1, len(seen[step]) // eta)]
            if seen[step][-1] not in survivors:
                last, stopped = step, True
                break
        assert (trial.last_step, trial.state == TrialState.PRUNED) == (last, stopped)
    pruned = [trial.last_step for trial in trials_of(study) if trial.state == TrialState.PRUNED]
    assert len(pruned) > 30
    assert set(pruned) <= set(steps)


def test_about_one_of_eta_reaches_each_next_rung():
    study = open_study(SuccessiveHalvingPruner(min_resource=1, reduction_factor=3, bootstrap_count=3))
    for curve in curves(300, 27):
        run(study, curve)
    reached = [sum(trial.last_step >= step for trial in trials_of(study)) for step in (1, 3, 9, 27)]
    assert reached[0] == 300
    for many, few in pairwise(reached[:3]):
        assert 0.15 < few / many < 0.45
    assert 0 < reached[3] < 30


@pytest.mark.parametrize("pruner", [SuccessiveHalvingPruner(1, 3), SuccessiveHalvingPruner(1, 4)])
def test_a_trial_worse_than_all_is_stopped_at_the_first_rung_of_asha(pruner):
    study = open_study(pruner, "minimize")
    for level in range(10):
        trial = run(study, [float(level)] * 20)
        assert (trial.state, trial.last_step) == ((TrialState.PRUNED, 1) if level else (TrialState.COMPLETE, 20))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "pruner",
    [
        MedianPruner(n_startup_trials=2),
        MedianPruner(n_startup_trials=0, n_warmup_steps=3),
        SuccessiveHalvingPruner(1, 3),
        SuccessiveHalvingPruner(2, 2),
    ],
    ids=["median", "median after warm-up", "asha 3", "asha 2"],
)
def test_the_best_at_every_epoch_is_never_stopped(pruner, seed):
    study = open_study(pruner)
    highest = np.full(12, -math.inf)
    best = 0
    for number, curve in enumerate(curves(25, 12, seed)):
        if number % 5 == 4:  # one that is above all before it
            curve = (np.maximum(highest, curve) + 0.01).tolist()
        trial = run(study, curve)
        if number % 5 == 4:
            assert trial.state == TrialState.COMPLETE
            best += 1
        highest = np.maximum(highest, curve)
    assert best == 5
    assert any(trial.state == TrialState.PRUNED for trial in study.trials)


@pytest.mark.parametrize("startup", [1, 4])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_median_pruner_stops_nothing_before_its_first_trials_and_the_worst_right_after_the_warm_up(startup, warmup):
    study = open_study(MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup))
    for number in range(startup + 3):
        trial = run(study, [1.0 - 0.1 * number] * 6)
        expected = (TrialState.COMPLETE, 6) if number < startup else (TrialState.PRUNED, max(warmup, 1))
        assert (trial.state, trial.last_step) == expected


def test_a_running_trial_is_compared_without_being_finished():
    study = open_study(SuccessiveHalvingPruner(1, 2))
    better, worse = study.ask(), study.ask()
    better.report(0.9, 1)
    assert not better.should_prune()
    worse.report(0.1, 1)
    assert worse.should_prune()


def test_hyperband_stops_a_trial_at_the_rungs_of_its_bracket_only():
    pruner = HyperbandPruner(1, 27, 3)
    study = open_study(pruner, study_name="brackets")
    for curve in curves(150, 27):
        run(study, curve)
    stopped = {(pruner._get_bracket_id(study, t), t.last_step) for t in study.trials if t.state == TrialState.PRUNED}
    assert {bracket for bracket, _ in stopped} >= {0, 1, 2}
    table = rungs(27, 3)
    for bracket, step in stopped:
        assert step in [resource for _, resource in table[bracket]]


def test_hyperband_gives_brackets_trials_in_the_proportion_of_the_table():
    pruner = HyperbandPruner(1, 27, 3)
    study = open_study(pruner, study_name="brackets")
    for _ in range(2000):
        study.add_trial(optuna.create_trial(value=0.0, intermediate_values={1: 0.0}))
    pruner._try_initialization(study)
    trials = study.get_trials(deepcopy=False)
    counts = np.bincount([pruner._get_bracket_id(study, trial) for trial in trials], minlength=4)
    configurations = np.array([bracket[0][0] for bracket in rungs(27, 3)])
    assert counts / 2000 == pytest.approx(configurations / configurations.sum(), abs=0.03)


def test_a_threshold_pruner_stops_what_leaves_its_bounds():
    pruner = construct(BasePruner, "optuna.pruners.ThresholdPruner", lower=0.2, n_warmup_steps=2)
    study = open_study(pruner)
    assert run(study, [0.1, 0.3, 0.2, 0.5]).state == TrialState.COMPLETE
    assert run(study, [0.5, 0.1, 0.5, 0.5]).last_step == 2
    assert run(study, [0.5, 0.5, math.nan, 0.5]).last_step == 3
    assert [trial.state for trial in study.trials[1:]] == [TrialState.PRUNED] * 2


@pytest.mark.filterwarnings("ignore:PatientPruner is experimental:optuna.exceptions.ExperimentalWarning")
def test_a_patient_pruner_asks_the_pruner_within_only_after_epochs_without_progress():
    within = {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 1}}
    pruner = construct(BasePruner, "optuna.pruners.PatientPruner", wrapped_pruner=within, patience=2)
    study = open_study(pruner)
    run(study, [0.9] * 8)
    rising = run(study, [0.1 + 0.01 * epoch for epoch in range(8)])
    falling = run(study, [0.3 - 0.01 * epoch for epoch in range(8)])
    better = run(study, [0.99 - 0.01 * epoch for epoch in range(8)])
    assert rising.state == better.state == TrialState.COMPLETE
    assert (falling.state, falling.last_step) == (TrialState.PRUNED, 4)  # the first value and three that are lower


@pytest.mark.filterwarnings("ignore:WilcoxonPruner is experimental:optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_wilcoxon_pruner_stops_a_trial_whose_folds_are_all_worse_when_there_are_enough(direction):
    pruner = construct(BasePruner, "optuna.pruners.WilcoxonPruner", p_threshold=0.1, n_startup_steps=2)
    study = open_study(pruner, direction)
    sign = 1 if direction == "maximize" else -1
    folds = sign * np.array([0.80, 0.85, 0.90, 0.95, 0.88, 0.83])

    def mean(values):
        trial = study.ask()
        for fold, value in enumerate(values.tolist(), 1):
            trial.report(value, fold)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return study.trials[trial.number]
        study.tell(trial, float(values.mean()))
        return study.trials[trial.number]

    mean(folds)
    worse = mean(folds - sign * np.array([0.1, 0.2, 0.3, 0.4, 0.1, 0.1]))
    assert (worse.state, worse.last_step) == (TrialState.PRUNED, 4)  # 1/8 of three folds is not below 0.1, 1/16 is
    assert mean(folds + sign * 0.01).state == TrialState.COMPLETE


@pytest.mark.parametrize(
    "class_path", [f"optuna.pruners.{name}" for name in optuna.pruners.__all__ if name != "BasePruner"]
)
@pytest.mark.filterwarnings("ignore:.*is experimental:optuna.exceptions.ExperimentalWarning")
def test_every_pruner_of_optuna_is_constructed_by_class_path_and_judges_a_report(class_path):
    needed = {
        "PatientPruner": {"wrapped_pruner": None, "patience": 1},
        "PercentilePruner": {"percentile": 25.0},
        "ThresholdPruner": {"lower": 0.0},
    }
    pruner = construct(BasePruner, class_path, **needed.get(class_path.rsplit(".", 1)[-1], {}))
    study = open_study(pruner)
    assert [run(study, [0.5] * 4).state for _ in range(2)] == [TrialState.COMPLETE] * 2


def test_reports_of_several_objectives_are_refused():
    study = optuna.create_study(directions=["minimize", "maximize"], pruner=NopPruner(), sampler=RandomSampler(seed=0))
    trial = study.ask()
    with pytest.raises(NotImplementedError):
        trial.report(0.0, 1)


def two_objectives(points, directions=("minimize", "minimize")):
    study = optuna.create_study(directions=directions, sampler=NSGAIISampler(seed=0), pruner=NopPruner())
    for point in points:
        study.tell(study.ask(), list(point))
    return study


LINE = [(1, 4), (2, 3), (3, 2), (4, 1)]


def fronts(study):
    return [[tuple(trial.values) for trial in front] for front in _rank_population(study.trials, study.directions)]


def test_a_point_that_two_dominate_makes_a_second_front():
    assert fronts(two_objectives(LINE)) == [LINE]
    study = two_objectives([*LINE, (3, 3)])
    assert fronts(study) == [LINE, [(3, 3)]]
    assert [trial.number for trial in study.best_trials] == [0, 1, 2, 3]


def test_identical_points_share_a_front():
    assert fronts(two_objectives([(1, 1), (2, 2), (1, 1), (2, 2)])) == [[(1, 1)] * 2, [(2, 2)] * 2]


def test_a_dominated_point_never_outranks_and_each_front_is_the_pareto_set_of_what_is_left():
    points = np.random.default_rng(0).integers(0, 8, (40, 2))
    found = fronts(two_objectives([(int(a), int(-b)) for a, b in points], ("minimize", "maximize")))
    left = sorted(map(tuple, points.tolist()))
    for front in found:
        own = sorted((int(a), int(-b)) for a, b in front)
        pareto = [p for p in left if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in left)]
        assert own == pareto
        left = [p for p in left if p not in own]
    assert not left
    assert len(found) > 3


def test_crowding_distances_by_hand_are_infinite_at_the_ends():
    distances = _calc_crowding_distance(two_objectives([(0, 10), (1, 6), (4, 5), (10, 0)]).trials)
    assert distances[0] == distances[3] == math.inf
    assert distances[1] == pytest.approx((4 - 0) / 10 + (10 - 5) / 10)
    assert distances[2] == pytest.approx((10 - 1) / 10 + (6 - 0) / 10)


def test_the_elite_are_whole_fronts_and_then_the_least_crowded():
    study = two_objectives([(0, 10), (1, 6), (1.1, 5.9), (4, 5), (10, 0), (11, 11)])
    elite = NSGAIIElitePopulationSelectionStrategy(population_size=4)(study, study.trials)
    assert sorted(trial.number for trial in elite) == [0, 1, 3, 4]  # trial 2 is the most crowded
    elite = NSGAIIElitePopulationSelectionStrategy(population_size=5)(study, study.trials)
    assert sorted(trial.number for trial in elite) == [0, 1, 2, 3, 4]


SPACE = {"x": FloatDistribution(-5.0, 5.0), "lr": FloatDistribution(1e-4, 1e-1, log=True)}


def params(sampler, sign=1.0, trials=30):
    direction = "minimize" if sign > 0 else "maximize"
    study = optuna.create_study(sampler=sampler, direction=direction, pruner=NopPruner())
    for _ in range(trials):
        trial = study.ask(SPACE)
        study.tell(trial, sign * ((trial.params["x"] - 1) ** 2 + (math.log10(trial.params["lr"]) + 3) ** 2))
    return [trial.params for trial in study.trials]


SAMPLERS = [
    RandomSampler,
    TPESampler,
    lambda seed: NSGAIISampler(population_size=8, seed=seed),
    lambda seed: GroupwiseSampler([["lr"], ["x"]], 15, seed=seed),
    lambda seed: PopulationSampler(population=4, total=8, seed=seed),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["random", "tpe", "nsga-ii", "groupwise", "population"])
def test_the_same_seed_gives_the_same_trials_and_maximizing_f_those_of_minimizing_minus_f(sampler):
    first = params(sampler(seed=0))
    assert params(sampler(seed=0)) == first
    assert params(sampler(seed=0), sign=-1.0) == first
    assert params(sampler(seed=1)) != first


def test_cma_es_is_found_by_its_package():
    pytest.importorskip("cmaes")
    found = params(construct(BaseSampler, "optuna.samplers.CmaEsSampler", seed=0), trials=60)
    assert found == params(optuna.samplers.CmaEsSampler(seed=0), trials=60)
    late = np.mean([abs(each["x"] - 1) for each in found[-20:]])
    assert late < 0.5 * np.mean([abs(each["x"] - 1) for each in found[:20]])


def test_log_parameters_are_log_uniform():
    values = [each["lr"] for each in params(RandomSampler(seed=0), trials=500)]
    assert kstest((np.log10(values) + 4) / 3, "uniform").pvalue > 0.05
    assert kstest(np.array(values) / 0.1, "uniform").pvalue < 1e-6


def grid():
    return GridSampler({"x": [-1.0, 0.0, 1.0], "lr": [0.001, 0.01]}, seed=0)


def tell_by_hand(sampler, space, trials):
    """Ask and tell ``trials`` times and once more, outside of `Study.optimize`."""
    study = optuna.create_study(sampler=sampler, pruner=NopPruner())
    for _ in range(trials):
        study.tell(study.ask(space), 0.0)
    with pytest.raises(RuntimeError, match=r"`Study\.stop` is supposed to be invoked inside"):
        study.tell(study.ask(space), 0.0)
    return study


@pytest.mark.filterwarnings("ignore:BruteForceSampler is experimental:optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    ("sampler", "space"),
    [(grid, SPACE), (BruteForceSampler, {"x": IntDistribution(0, 1), "y": IntDistribution(0, 2)})],
    ids=["grid", "brute force"],
)
def test_all_points_are_visited_once_and_the_last_tell_raises_though_it_is_stored(sampler, space):
    study = tell_by_hand(sampler(), space, trials=5)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 6
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_a_grid_says_when_it_is_done():
    sampler = grid()
    assert not sampler.is_exhausted(optuna.create_study(sampler=sampler))
    assert sampler.is_exhausted(tell_by_hand(sampler, SPACE, trials=5))
