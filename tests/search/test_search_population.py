import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lightning_automl.rundir import UserError
from lightning_automl.search.samplers import PopulationSampler, lineage
from lightning_automl.search.samplers.population import perturb

SPACE = {"h0": FloatDistribution(0.0, 1.0), "h1": FloatDistribution(0.0, 1.0)}
MIXED = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "units": IntDistribution(16, 256, log=True),
    "depth": IntDistribution(2, 6),
    "dropout": FloatDistribution(0.0, 0.5, step=0.1),
    "kind": CategoricalDistribution(["a", "b", None]),
}


@pytest.fixture(autouse=True)
def quiet():
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


def population(**changes):
    return PopulationSampler(**{"population": 5, "ready": 2, "total": 10, **changes})


def open_study(sampler, direction="maximize", **arguments):
    return optuna.create_study(
        sampler=sampler, direction=direction, pruner=optuna.pruners.NopPruner(), load_if_exists=True, **arguments
    )


def trained(theta, values, epochs):
    """The toy of figure 2 of the paper: theta climbs the surrogate 1.2 - h0 theta0^2 - h1 theta1^2."""
    for _ in range(epochs):
        theta = theta - 0.02 * 2 * np.array([values["h0"], values["h1"]]) * theta
    return theta


def quality(theta):
    return 1.2 - float(np.square(theta).sum())


START = np.array([0.9, 0.9])


def segment(study, checkpoints, sampler):
    """Ask for a segment, train it from its parent's checkpoint, tell its quality."""
    trial = study.ask(SPACE)
    attributes = trial.user_attrs
    parent = checkpoints[attributes["parent"]] if "parent" in attributes else START
    checkpoints[trial.number] = trained(parent, trial.params, sampler.ready)
    study.tell(trial, quality(checkpoints[trial.number]))


def train(study, sampler, checkpoints, segments=None):
    count = 0
    while sampler.wanted(study) and count != segments:
        segment(study, checkpoints, sampler)
        count += 1
    return checkpoints


def told(study, value, space=None):
    """Ask and tell a trial of known value."""
    trial = study.ask(SPACE if space is None else space)
    study.tell(trial, value)
    return trials_of(study)[trial.number]


def trials_of(study):
    return study.get_trials(deepcopy=False)  # schedules of many segments take long to copy


def rows(study):
    keys = ("member", "parent", "donor", "until", "schedule")
    return [(t.params, t.values, *(t.user_attrs.get(key) for key in keys)) for t in trials_of(study)]


@pytest.fixture(scope="module")
def toy():
    sampler = PopulationSampler(population=8, ready=2, total=40, seed=0)
    study = open_study(sampler)
    return sampler, study, train(study, sampler, {})


def test_every_member_is_trained_for_all_epochs_and_the_population_keeps_its_size(toy):
    sampler, study, _ = toy
    assert sampler.finished(study)
    assert not sampler.wanted(study)
    assert len(trials_of(study)) == 8 * 20
    for until in range(2, 41, 2):
        assert sorted(t.user_attrs["member"] for t in trials_of(study) if t.user_attrs["until"] == until) == list(
            range(8)
        )


def test_a_segment_of_an_exploiting_member_starts_at_the_donors_weights_bit_for_bit(toy):
    _, study, checkpoints = toy
    exploited = [trial for trial in trials_of(study) if "donor" in trial.user_attrs]
    assert len(exploited) > 5
    for trial in exploited:
        donor = trials_of(study)[trial.user_attrs["donor"]]
        assert trial.user_attrs["parent"] == donor.number
        assert donor.user_attrs["member"] != trial.user_attrs["member"]
        assert donor.user_attrs["until"] == trial.user_attrs["until"] - 2
        assert np.array_equal(checkpoints[trial.number], trained(checkpoints[donor.number], trial.params, 2))


def test_the_winners_schedule_replayed_from_the_start_gives_its_weights_bit_for_bit(toy):
    _, study, checkpoints = toy
    for number in (study.best_trial.number, trials_of(study)[-1].number, trials_of(study)[-3].number):
        schedule = trials_of(study)[number].user_attrs["schedule"]
        assert [entry["from_epoch"] for entry in schedule] == list(range(0, 40, 2))
        theta = START
        for entry in schedule:
            theta = trained(theta, entry["values"], 2)
        assert np.array_equal(theta, checkpoints[number])
    schedule = study.best_trial.user_attrs["schedule"]
    assert len({tuple(entry["values"].items()) for entry in schedule}) > 1, "the winner has no schedule but a point"


def test_the_lineage_goes_from_a_first_segment_to_the_trial(toy):
    _, study, _ = toy
    trials = trials_of(study)
    numbers = lineage(trials, study.best_trial.number)
    assert [trials[number].user_attrs["until"] for number in numbers] == list(range(2, 41, 2))
    assert "parent" not in trials[numbers[0]].user_attrs
    assert [trials[n].params for n in numbers] == [e["values"] for e in study.best_trial.user_attrs["schedule"]]


def test_a_member_that_does_not_exploit_goes_on_with_its_own_weights_and_values(toy):
    _, study, _ = toy
    own = [trial for trial in trials_of(study) if "parent" in trial.user_attrs and "donor" not in trial.user_attrs]
    assert len(own) > 5
    for trial in own:
        parent = trials_of(study)[trial.user_attrs["parent"]]
        assert parent.user_attrs["member"] == trial.user_attrs["member"]
        assert parent.params == trial.params


def test_the_worst_fifth_exploits_the_best_fifth_and_nobody_else_does(toy):
    _, study, _ = toy
    for until in range(2, 39, 2):
        ranking = sorted((t for t in trials_of(study) if t.user_attrs["until"] == until), key=lambda t: -t.value)
        after = {t.user_attrs["member"]: t for t in trials_of(study) if t.user_attrs["until"] == until + 2}
        exploiting = {member for member, trial in after.items() if "donor" in trial.user_attrs}
        assert exploiting == {trial.user_attrs["member"] for trial in ranking[-2:]}  # 0.2 of 8, rounded up
        assert {after[m].user_attrs["donor"] for m in exploiting} <= {trial.number for trial in ranking[:2]}


@pytest.mark.parametrize("seed", range(3))
def test_a_population_beats_as_many_runs_with_constant_random_values(seed):
    sampler = PopulationSampler(population=8, ready=2, total=40, seed=seed)
    study = open_study(sampler)
    checkpoints = train(study, sampler, {})
    population = [checkpoints[t.number] for t in trials_of(study) if t.user_attrs["until"] == 40]
    first = [trial.params for trial in trials_of(study)[:8]]  # the same draws, so that luck is the same
    constant = [trained(START, values, 40) for values in first]
    assert np.mean([quality(theta) for theta in population]) > np.mean([quality(theta) for theta in constant]) + 0.02


@pytest.mark.parametrize("storage", ["memory", "journal", "sqlite"])
def test_a_study_in_two_halves_goes_on_as_the_uninterrupted_one(storage, tmp_path):
    def stored():
        if storage == "journal":
            return JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
        return RDBStorage(f"sqlite:///{tmp_path}/study.db") if storage == "sqlite" else None

    whole = open_study(population(seed=4))
    train(whole, whole.sampler, {})
    kept = None if storage != "memory" else optuna.storages.InMemoryStorage()
    checkpoints = {}
    for segments in (7, None):
        half = open_study(population(seed=4), storage=stored() or kept, study_name="halves")
        train(half, half.sampler, checkpoints, segments)
    assert len(whole.trials) == 25
    assert rows(half) == rows(whole)


def test_another_seed_gives_other_values():
    first, other = (told(open_study(population(seed=seed)), 0.0).params for seed in (0, 1))
    assert first != other
    assert told(open_study(population(seed=0)), 0.0).params == first


def test_smaller_is_better_when_minimizing():
    studies = [open_study(population(), direction=direction) for direction in ("maximize", "minimize")]
    for study, sign in zip(studies, (1, -1), strict=True):
        for value in range(15):
            told(study, sign * (value * 7 % 11))
    assert [t.user_attrs.get("donor") for t in studies[0].trials] == [
        t.user_attrs.get("donor") for t in studies[1].trials
    ]
    assert any("donor" in trial.user_attrs for trial in studies[0].trials)


def test_values_stay_in_their_ranges_and_on_their_grids_and_change():
    study = open_study(PopulationSampler(population=4, total=60, resample_probability=0.0, seed=1))
    generator = np.random.default_rng(0)
    for _ in range(240):
        told(study, generator.random(), MIXED)
    changed = {name: 0 for name in MIXED}
    for trial in trials_of(study):
        for name, value in trial.params.items():
            distribution = MIXED[name]
            assert distribution._contains(distribution.to_internal_repr(value)), (name, value)
            assert not isinstance(value, np.generic)
        assert isinstance(trial.params["units"], int)
        if "donor" in trial.user_attrs:
            donor = trials_of(study)[trial.user_attrs["donor"]].params
            changed = {name: count + (donor[name] != trial.params[name]) for name, count in changed.items()}
    assert changed.pop("kind") == 0  # a choice is drawn anew or kept
    assert all(count > 5 for count in changed.values()), changed


def test_explored_values_are_those_of_the_donor_times_a_factor():
    study = open_study(population(total=40, resample_probability=0.0, factors=(0.5, 2.0)))
    space = {"x": FloatDistribution(1e-9, 1e9, log=True)}
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(100):
        trial = told(study, generator.random(), space)
        if "donor" in trial.user_attrs:
            ratios.append(trial.params["x"] / trials_of(study)[trial.user_attrs["donor"]].params["x"])
    assert set(ratios) == {0.5, 2.0}
    assert len(ratios) > 10


def test_with_certain_resampling_an_exploiting_member_draws_anew_choices_too():
    study = open_study(PopulationSampler(population=4, total=60, resample_probability=1.0, seed=1))
    generator = np.random.default_rng(0)
    pairs = []
    for _ in range(240):
        trial = told(study, generator.random(), MIXED)
        if "donor" in trial.user_attrs:
            pairs.append((trials_of(study)[trial.user_attrs["donor"]].params, trial.params))
    assert len(pairs) > 20
    assert all(before["lr"] != after["lr"] for before, after in pairs)
    assert {after["kind"] for _, after in pairs} == {"a", "b", None}
    logarithms = np.log10([after["lr"] for _, after in pairs])
    assert abs(np.mean(logarithms) + 2.5) < 0.5  # log-uniform between -4 and -1


@pytest.mark.parametrize(
    ("value", "distribution", "factor", "expected"),
    [
        (0.5, FloatDistribution(0, 1), 1.2, 0.6),
        (0.9, FloatDistribution(0, 1), 1.2, 1.0),
        (1e-3, FloatDistribution(9e-4, 1, log=True), 0.8, 9e-4),
        (-0.5, FloatDistribution(-1, 1), 1.2, -0.6),
        (100, IntDistribution(16, 256, log=True), 0.8, 80),
        (3, IntDistribution(1, 9), 1.2, 4),  # 3.6 rounded
        (1, IntDistribution(1, 9), 1.2, 2),  # 1.2 would stay 1
        (2, IntDistribution(1, 9), 0.8, 1),
        (0, IntDistribution(0, 9), 1.2, 1),
        (0, IntDistribution(0, 9), 0.8, 0),
        (-2, IntDistribution(-9, 9), 1.2, -3),
        (64, IntDistribution(32, 256, step=32), 1.2, 96),
        (256, IntDistribution(32, 256, step=32), 1.2, 256),
        (0.2, FloatDistribution(0, 0.3, step=0.1), 1.2, 0.3),  # 3 * 0.1 is above 0.3
        (3, IntDistribution(1, 9), 1.0, 3),
    ],
)
def test_a_perturbed_value_by_hand(value, distribution, factor, expected):
    found = perturb(value, distribution, factor)
    assert found == pytest.approx(expected, rel=1e-12)
    assert distribution._contains(distribution.to_internal_repr(found))
    assert type(found) is (int if isinstance(distribution, IntDistribution) else float)


def test_enqueued_values_are_those_of_the_first_members_and_the_rest_is_drawn():
    study = open_study(population())
    study.enqueue_trial({"h0": 0.25, "h1": 0.75})
    study.enqueue_trial({"h0": 0.5})
    first, second, third = (told(study, 0.0) for _ in range(3))
    assert [trial.user_attrs["member"] for trial in (first, second, third)] == [0, 1, 2]
    assert first.params == {"h0": 0.25, "h1": 0.75}
    assert second.params["h0"] == 0.5
    for trial in (first, second, third):
        assert trial.user_attrs["schedule"] == [{"from_epoch": 0, "values": trial.params}]


def test_values_enqueued_later_are_those_of_the_next_segment():
    study = open_study(population())
    for value in range(6):
        told(study, float(value))
    study.enqueue_trial({"h1": 0.125})
    trial = told(study, 0.0)
    assert (trial.user_attrs["member"], trial.user_attrs["parent"]) == (1, 1)
    assert trial.params == {"h0": trials_of(study)[1].params["h0"], "h1": 0.125}
    assert trial.user_attrs["schedule"][-1]["values"] == trial.params


def place(trial):
    return tuple(trial.user_attrs.get(key) for key in ("member", "parent", "donor", "until", "schedule"))


def fail(study, **attributes):
    trial = study.ask(SPACE)
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    study.tell(trial, state=TrialState.PRUNED if "infeasible" in attributes else TrialState.FAIL)
    return trials_of(study)[trial.number]


@pytest.mark.parametrize("finished", [0, 5, 7])
def test_a_lost_segment_is_repeated_with_the_same_values_from_the_same_parent_however_often(finished):
    study = open_study(population())
    for value in range(finished):
        told(study, float(value))
    lost = [fail(study, lost=True) for _ in range(4)]
    again = told(study, 0.0)
    assert {place(trial)[:4] for trial in lost} == {place(again)[:4]}
    assert all(trial.params == again.params and place(trial) == place(again) for trial in lost)


def test_a_lost_enqueued_first_segment_keeps_its_values():
    study = open_study(population())
    study.enqueue_trial({"h0": 0.25, "h1": 0.75})
    fail(study, lost=True)
    assert told(study, 0.0).params == {"h0": 0.25, "h1": 0.75}


def test_a_repetition_that_the_loop_enqueues_takes_the_lost_trials_place():
    study = open_study(population())
    sampler = study.sampler
    for value in range(7):
        told(study, float(value))
    lost = fail(study, lost=True)
    study.enqueue_trial(lost.params, user_attrs={"retry_of": lost.number})
    assert sampler.wanted(study)
    again = study.ask(SPACE)
    assert place(again) == place(lost)
    assert again.params == lost.params
    running = [again, *(study.ask(SPACE) for _ in range(4))]
    assert sorted(trial.user_attrs["member"] for trial in running) == [0, 1, 2, 3, 4]


def test_a_waiting_repetition_alone_makes_a_trial_wanted():
    study = open_study(population(population=2, total=2))
    running = study.ask(SPACE)
    lost = fail(study, lost=True)
    study.enqueue_trial(lost.params, user_attrs={"retry_of": lost.number})
    assert study.sampler.wanted(study)
    assert place(study.ask(SPACE)) == place(lost)
    assert not study.sampler.wanted(study)
    assert running.user_attrs["member"] == 0


def test_nobody_else_takes_the_member_of_a_repetition_that_is_about_to_begin():
    study = open_study(population())
    lost = fail(study, lost=True)
    study.enqueue_trial(lost.params, user_attrs={"retry_of": lost.number})
    other = optuna.Trial(
        study, study._storage.create_new_trial(study._study_id)
    )  # the waiting one is not asked for yet
    assert other.user_attrs["member"] == 1
    assert study.ask(SPACE).user_attrs["member"] == 0


def test_the_segments_of_all_brackets_of_hyperband_are_seen():
    sampler = population(total=6)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.HyperbandPruner(1, 9, 3), study_name="brackets")
    trial = study.ask(SPACE)
    trial.report(0.0, 1)
    trial.should_prune()  # makes the brackets
    study.tell(trial, 0.0)
    for _ in range(14):
        told(study, 0.0)
    assert sampler.finished(study)


def test_trials_of_another_sampler_are_nobodys():
    study = open_study(population())
    study.add_trial(optuna.create_trial(value=99.0, params={"h0": 0.5}, distributions={"h0": SPACE["h0"]}))
    trial = told(study, 0.0)
    assert (trial.number, trial.user_attrs["member"]) == (1, 0)


def test_a_first_failure_is_repeated_and_a_second_one_exploits_with_new_values():
    study = open_study(population())
    for value in (9.0, 6.0, 5.0, 7.0, 8.0):  # member 1 is not among the worst fifth
        told(study, value)
    told(study, 9.5)
    first, second, third, fourth = (fail(study) for _ in range(4))
    assert place(first) == place(second)
    for trial in (third, fourth):
        assert place(trial)[:4] == (1, 0, 0, 4)
    assert third.params != first.params
    assert fourth.params != third.params
    assert place(told(study, 0.0))[:4] == (1, 0, 0, 4)
    assert told(study, 0.0).user_attrs["member"] == 2


def test_infeasible_first_segments_are_drawn_anew_at_once():
    study = open_study(population())
    refused = [fail(study, infeasible=True).params for _ in range(3)]
    accepted = told(study, 0.0)
    assert accepted.user_attrs["member"] == 0
    assert len({tuple(params.items()) for params in [*refused, accepted.params]}) == 4


def test_the_best_member_that_cannot_go_on_varies_its_own_values():
    study = open_study(population(population=2))
    told(study, 9.0)
    told(study, 1.0)
    fail(study, infeasible=True)
    trial = told(study, 9.0)
    assert place(trial)[:4] == (0, 0, None, 4)
    assert trial.params != trials_of(study)[0].params


def test_the_middle_of_three_neither_exploits_nor_is_taken_over_at_one_half():
    study = open_study(population(population=3, total=4, bottom=0.5, top=0.5))
    for value in (1.0, 3.0, 2.0):
        told(study, value)
    assert [told(study, 0.0).user_attrs.get("donor") for _ in range(3)] == [1, None, None]


def test_seven_hundredths_of_a_hundred_are_seven():
    study = open_study(population(population=100, total=4, bottom=0.07))  # 0.07 * 100 is 7.000000000000001
    for value in range(100):
        told(study, float(value))
    assert sum("donor" in told(study, 0.0).user_attrs for _ in range(100)) == 7


def test_members_with_equal_values_leave_each_other_alone():
    study = open_study(population())
    for _ in range(25):
        told(study, 0.5)
    assert not any("donor" in trial.user_attrs for trial in trials_of(study))


def test_a_member_ahead_is_compared_at_the_epochs_that_others_have_too():
    study = open_study(population(population=2, total=20))
    running = study.ask(SPACE)  # member 0
    for value in (3.0, 4.0, 5.0):  # member 1, alone: nobody to compare with
        assert "donor" not in told(study, value).user_attrs
    study.tell(running, 2.0)
    behind = told(study, 0.0)
    assert place(behind)[:4] == (0, 1, 1, 4)  # from the first segment of member 1, not from its newest


def test_a_new_trial_is_wanted_only_while_a_member_waits():
    study = open_study(population(total=2))
    sampler = study.sampler
    running = [study.ask(SPACE) for _ in range(5)]
    assert [trial.user_attrs["member"] for trial in running] == [0, 1, 2, 3, 4]
    assert not sampler.wanted(study)
    extra = study.ask(SPACE)
    assert "member" not in extra.user_attrs
    assert SPACE["h0"]._contains(extra.params["h0"])
    study.tell(extra, 99.0)
    study.tell(running[3], state=TrialState.FAIL)
    assert sampler.wanted(study)
    assert study.ask(SPACE).user_attrs["member"] == 3
    for trial in (*running[:3], running[4]):
        study.tell(trial, 0.0)
    assert not sampler.finished(study)
    study.tell(6, 0.0)  # the repetition of member 3
    assert sampler.finished(study)
    assert not sampler.wanted(study)


class SlowStorage(optuna.storages.InMemoryStorage):
    """Between reading the trials and noting what follows from them others have time to read the same."""

    def get_all_trials(self, *arguments, **options):
        trials = super().get_all_trials(*arguments, **options)
        time.sleep(0.001)
        return trials


def test_threads_never_train_the_same_segment_twice():
    sampler = PopulationSampler(population=6, total=5)
    study = open_study(sampler, storage=SlowStorage())

    def work(_):
        while not sampler.finished(study):
            if sampler.wanted(study):
                trial = study.ask(SPACE)
                study.tell(trial, trial.params["h0"])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    own = [place(trial)[0:1] + place(trial)[3:4] for trial in trials_of(study) if "member" in trial.user_attrs]
    assert sorted(own) == [(member, until) for member in range(6) for until in range(1, 6)]


def test_a_segment_may_have_a_smaller_number_than_the_one_before_it():
    study = open_study(population(population=2, total=4))
    held_up = study._storage.create_new_trial(study._study_id)  # a thread between its number and its plan
    for value in (2.0, 1.0):
        told(study, value)
    trial = optuna.Trial(study, held_up)
    assert (trial.number, trial.user_attrs["member"], trial.user_attrs["parent"]) == (0, 0, 1)
    study.tell(trial, 3.0)
    assert place(told(study, 0.0))[:2] == (1, 1)
    assert study.sampler.finished(study)


def test_of_two_trials_that_took_the_same_segment_the_first_counts():
    study = open_study(population(population=2, total=6))
    told(study, 1.0)
    twin = optuna.create_trial(value=5.0, params={}, user_attrs={**trials_of(study)[0].user_attrs})
    study.add_trial(twin)
    told(study, 2.0)
    assert not study.sampler.finished(study)
    assert place(told(study, 1.0))[:4] == (0, 2, 2, 4)
    train_on = [told(study, float(value)) for value in range(3)]
    assert study.sampler.finished(study)
    assert [trial.user_attrs["member"] for trial in train_on] == [1, 0, 1]


def test_a_second_trial_object_of_the_same_trial_does_not_move_it():
    study = open_study(population())
    trial = study.ask(SPACE)
    before = place(trials_of(study)[0])
    optuna.Trial(study, trial._trial_id)
    assert place(trials_of(study)[0]) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"population": 1}, "population is 1; members learn from each other, give at least 2"),
        ({"ready": 0}, "ready is 0; "),
        ({"total": 9}, r"total is 9 epochs and a segment \(ready\) 2; give a multiple of 2"),
        ({"total": 0}, "total is 0 epochs"),
        ({"bottom": 0.0}, r"bottom is 0.0; .* \(0, 0.5\]"),
        ({"top": 0.6}, r"top is 0.6; .* \(0, 0.5\]"),
        ({"factors": []}, r"factors are \[\]; give at least one"),
        ({"factors": [0.8, -1]}, "all above 0"),
        ({"factors": [float("inf")]}, "all above 0"),
        ({"resample_probability": 1.5}, r"resample_probability is 1.5; give one in \[0, 1\]"),
        ({"seed": -1}, "seed is -1; give a whole number of at least 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        population(**arguments)


def test_several_objectives_are_refused():
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=population())
    with pytest.raises(UserError, match="the study has 2 objectives; give one monitor"):
        study.ask(SPACE)
