import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from lightning_automl.rundir import UserError
from lightning_automl.search.samplers import GroupwiseSampler, PopulationSampler

SPACE = {name: FloatDistribution(0.0, 1.0) for name in ("lr", "decay", "filters_0", "filters_1")}
GROUPS = [["lr"], ["filters_*"], ["*"]]


@pytest.fixture(autouse=True)
def quiet():
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


def open_study(groups=GROUPS, trials_per_group=4, sampler=None, pruner=None, **arguments):
    sampler = GroupwiseSampler(groups, trials_per_group, sampler or RandomSampler(seed=0))
    return optuna.create_study(sampler=sampler, pruner=pruner or NopPruner(), **arguments)


def told(study, value, space=SPACE):
    trial = study.ask(dict(space))
    study.tell(trial, value)
    return study.trials[trial.number]


def bowl(params):
    return sum((value - 0.3) ** 2 for value in params.values())


def scored(study, trials, space=SPACE):
    for _ in range(trials):
        trial = study.ask(dict(space))
        study.tell(trial, bowl(trial.params))
    return study.trials


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("sampler", [RandomSampler(seed=0), TPESampler(seed=0, n_startup_trials=2)], ids=str)
def test_only_the_parameters_of_the_current_group_differ_from_the_best_trial_so_far(sampler, direction):
    trials = scored(open_study(sampler=sampler, direction=direction), 20)
    assert [trial.user_attrs["group"] for trial in trials] == [0] * 4 + [1] * 4 + [2] * 12
    assert "fixed_to" not in trials[0].user_attrs
    own = [{"lr"}, {"filters_0", "filters_1"}, {"decay"}]
    best_of = min if direction == "minimize" else max
    for trial in trials[1:]:
        best = best_of(trials[: trial.number], key=lambda each: each.value)
        assert trial.user_attrs["fixed_to"] == best.number
        differing = {name for name in SPACE if trial.params[name] != best.params[name]}
        assert differing == own[trial.user_attrs["group"]]


def test_before_a_trial_is_complete_everything_is_sampled():
    study = open_study()
    running = [study.ask(dict(SPACE)) for _ in range(3)]
    assert all(len({trial.params[name] for trial in running}) == 3 for name in SPACE)
    study.tell(running[0], state=TrialState.FAIL)
    assert "fixed_to" not in study.ask(dict(SPACE)).user_attrs


def test_running_failed_and_pruned_trials_count_and_lost_and_waiting_ones_do_not():
    study = open_study(trials_per_group=4)
    study.ask(dict(SPACE))
    study.tell(study.ask(dict(SPACE)), state=TrialState.FAIL)
    study.tell(study.ask(dict(SPACE)), state=TrialState.PRUNED)
    for _ in range(3):
        lost = study.ask(dict(SPACE))
        lost.set_user_attr("lost", True)
        study.tell(lost, state=TrialState.FAIL)
    study.enqueue_trial({"lr": 0.5})
    other = optuna.Trial(study, study._storage.create_new_trial(study._study_id))  # asked before the waiting one
    assert other.user_attrs["group"] == 0
    study.ask(dict(SPACE))
    assert told(study, 1.0).user_attrs["group"] == 1


def test_a_second_trial_object_of_the_same_trial_does_not_change_what_it_is_fixed_to():
    study = open_study()
    told(study, 1.0)
    running = study.ask(dict(SPACE))
    told(study, 0.5)
    assert optuna.Trial(study, running._trial_id).user_attrs == running.user_attrs == {"group": 0, "fixed_to": 0}


def test_a_trial_keeps_its_best_trial_while_others_finish():
    study = open_study([["lr"], ["*"]], 1)
    first = told(study, 1.0)
    running = study.ask()
    assert running.suggest_float("lr", 0.0, 1.0) == first.params["lr"]
    better = study.ask()
    better.suggest_float("lr", 0.0, 1.0)
    study.tell(better, 0.0)
    study.add_trial(optuna.create_trial(value=-1.0, params={"lr": 0.5}, distributions={"lr": SPACE["lr"]}))
    assert running.user_attrs == {"group": 1, "fixed_to": 0}
    assert study.trials[1].user_attrs == running.user_attrs
    assert told(study, 2.0).user_attrs["fixed_to"] == 3


def conditional(trial):
    layers = trial.suggest_int("layers", 1, 4)
    return layers, [trial.suggest_int(f"units_{index}", 1, 10**6) for index in range(layers)]


def test_parameters_that_the_best_trial_lacks_are_sampled():
    study = open_study([["units_*"], ["layers"]], 5, TPESampler(seed=0, n_startup_trials=3))
    seen = set()
    for number in range(40):
        trial = study.ask()
        layers, units = conditional(trial)
        best = study.trials[trial.user_attrs["fixed_to"]] if number else None
        if number >= 5:
            for index, value in enumerate(units):
                if f"units_{index}" in best.params:
                    assert value == best.params[f"units_{index}"]
                else:
                    seen.add(value)
        elif number:
            assert layers == best.params["layers"]
        study.tell(trial, abs(layers - 2) + sum(units) / 1e7)
    assert len(seen) > 5, "no trial had more layers than the best"


def test_a_best_value_out_of_the_range_asked_for_is_sampled():
    study = open_study([["lr"], ["*"]], 1)
    distributions = {"lr": IntDistribution(0, 9), "decay": FloatDistribution(0.0, 1.0)}
    study.add_trial(optuna.create_trial(value=0.0, params={"lr": 5, "decay": 0.5}, distributions=distributions))
    trial = study.ask({"lr": FloatDistribution(0.0, 1.0), "decay": FloatDistribution(0.0, 1.0)})
    assert 0 <= trial.params["lr"] <= 1
    assert trial.user_attrs["group"] == 1


def test_the_first_group_that_matches_has_a_parameter():
    study = open_study([["*_0"], ["filters_*", "*"]], 2)
    trials = scored(study, 4)
    assert trials[1].params["filters_1"] == trials[0].params["filters_1"]
    assert trials[1].params["filters_0"] != trials[0].params["filters_0"]


def test_with_hyperband_the_trials_of_all_brackets_are_seen():
    study = open_study(pruner=HyperbandPruner(1, 27, 3), study_name="brackets")
    numbers = []
    for _ in range(12):
        trial = study.ask(dict(SPACE))
        for step in (1, 3, 9, 27):
            trial.report(bowl(trial.params), step)
            trial.should_prune()
        study.tell(trial, bowl(trial.params))
        numbers.append(trial.user_attrs["group"])
    assert numbers == [0] * 4 + [1] * 4 + [2] * 4
    assert len({study.pruner._get_bracket_id(study, trial) for trial in study.trials}) > 1
    trials = study.trials
    best = [min(trials[:number], key=lambda each: each.value).number for number in range(1, 12)]
    assert [trial.user_attrs["fixed_to"] for trial in trials[1:]] == best


def test_infeasible_trials_are_never_the_best():
    study = open_study()
    trial = study.ask(dict(SPACE))
    trial.set_constraint("feasible", 1.0)
    study.tell(trial, -1.0)
    assert "fixed_to" not in told(study, 1.0).user_attrs
    assert told(study, 1.0).user_attrs["fixed_to"] == 1


def test_a_study_goes_on_in_its_group_with_a_new_sampler():
    storage = optuna.storages.InMemoryStorage()
    for _ in range(2):
        study = open_study(storage=storage, study_name="halves", load_if_exists=True)
        scored(study, 5)
    assert [trial.user_attrs["group"] for trial in study.trials] == [0] * 4 + [1] * 4 + [2] * 2


def test_the_default_sampler_is_tpe_with_the_seed():
    first, again, other = (
        scored(optuna.create_study(sampler=GroupwiseSampler(GROUPS, 8, seed=seed), pruner=NopPruner()), 24)
        for seed in (3, 3, 4)
    )
    assert isinstance(GroupwiseSampler(GROUPS, 8).sampler, TPESampler)
    assert [trial.params for trial in first] == [trial.params for trial in again]
    assert first[0].params != other[0].params


class Noting(RandomSampler):
    def __init__(self):
        super().__init__(seed=0)
        self.noted = []

    def before_trial(self, study, trial):
        self.noted.append(("before", trial.number))

    def after_trial(self, study, trial, state, values):
        self.noted.append(("after", trial.number, state, values))

    def reseed_rng(self):
        self.noted.append("reseeded")


def test_the_sampler_within_is_told_about_its_trials():
    sampler = Noting()
    study = open_study(sampler=sampler)
    told(study, 0.5)
    study.sampler.reseed_rng()
    assert sampler.noted == [("before", 0), ("after", 0, TrialState.COMPLETE, [0.5]), "reseeded"]


def test_a_parameter_in_no_group_is_refused_when_it_is_seen():
    study = open_study([["lr"], ["filters_*"]])
    with pytest.raises(UserError, match=r"'decay' is in no group; known: lr; filters_\*; add it to one, or '\*'"):
        study.ask(dict(SPACE))


def test_a_group_whose_condition_did_not_hold_yet_is_no_mistake_in_a_known_space():
    study = open_study([["lr"], ["momentum"]], 2)
    study.sampler.check(["lr", "momentum"])
    trials = scored(study, 4, {"lr": SPACE["lr"]})
    assert [trial.user_attrs["group"] for trial in trials] == [0, 0, 1, 1]


def test_a_group_without_a_parameter_is_refused_when_its_turn_comes():
    study = open_study([["lr"], ["filtres_*"], ["*"]], 2)
    scored(study, 2)
    with pytest.raises(UserError, match=r"no parameter of group 2, filtres_\*, .* known: decay, filters_0"):
        study.ask(dict(SPACE))


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([["lr"], ["filters_*"]], "'decay' is in no group"),
        ([["lr"], ["filtres_0", "*"]], "'filtres_0' in group 2 matches no parameter .* known: decay, filters_0"),
        (
            [["filters_*"], ["filters_0"], ["*"]],
            "'filters_0' in group 2 matches no parameter that is not in an earlier",
        ),
    ],
)
def test_groups_are_compared_with_the_names_of_a_space(groups, sentence):
    GroupwiseSampler(GROUPS, 1).check(list(SPACE))
    with pytest.raises(UserError, match=sentence):
        GroupwiseSampler(groups, 1).check(list(SPACE))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"groups": []}, r"groups are \[\]; give a list of lists of names"),
        ({"groups": [["lr"], []]}, "none empty"),
        ({"groups": ["lr", "*"]}, "give a list of lists"),
        ({"groups": [["lr"], ["*", "lr"]]}, "lr occurs twice"),
        ({"trials_per_group": 0}, "trials_per_group is 0; give at least 1"),
        ({"sampler": PopulationSampler(total=2)}, "give another sampler for groups"),
        ({"sampler": RandomSampler(), "seed": 1}, "seed 1 is for the TPE sampler"),
    ],
)
def test_bad_arguments_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        GroupwiseSampler(**{"groups": GROUPS, "trials_per_group": 3, **arguments})


def test_several_objectives_are_refused():
    study = open_study(directions=["minimize", "maximize"])
    with pytest.raises(UserError, match="which 2 objectives do not have; give one monitor"):
        study.ask(dict(SPACE))
