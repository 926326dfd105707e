import json
import math
import random

import pytest

from lightning_automl.search.generations import Request, Scored, propose, search, study_of
from lightning_automl.search.spaces import Space

SPACE = Space.parse(
    {
        "arm": {"choice": ["cnn", "resnet"]},
        "policy": {"choice": ["none", "trivial_augment"]},
        "cnn.lr": {"log_float": [1e-4, 1e-1], "path": "lr", "when": {"arm": "cnn"}},
        "cnn.dropout": {"float": [0.0, 0.5], "when": {"arm": "cnn"}},
        "resnet.lr": {"log_float": [1e-4, 1e-1], "path": "lr", "when": {"arm": "resnet"}},
        "resnet.depth": {"choice": [14, 20, 26], "when": {"arm": "resnet"}},
    }
)
DEFAULTS = [
    {"arm": arm, "policy": policy, f"{arm}.lr": 1e-3}
    for policy in ("none", "trivial_augment")
    for arm in ("cnn", "resnet")
]
PLAIN = Space.parse({"x": {"float": [0, 1]}})


def value(values, step=0):
    """Best is a resnet with TrivialAugment and a rate of 0.01; folds are not equally hard."""
    distance = abs(math.log10(values.get(f"{values['arm']}.lr", 1e-3)) + 2)
    gain = 0.03 * (values["arm"] == "resnet") + 0.02 * (values["policy"] == "trivial_augment")
    return 0.8 - 0.1 * distance + gain + 0.01 * step


class Folds:
    """Evaluates, in any order, and remembers what it was asked."""

    def __init__(self, score=value, order=None, failing=(), rungs=math.inf):
        self.score, self.order, self.failing, self.rungs = score, order, failing, rungs
        self.asked: list[list[Request]] = []

    def __call__(self, requests):
        self.asked.append(list(requests))
        if len(self.asked) > self.rungs:
            return {}
        shuffled = random.Random(self.order).sample(list(requests), len(requests))
        return {
            each.number: None if (each.number, each.step) in self.failing else self.score(each.values, each.step)
            for each in shuffled
        }

    @property
    def rungs_asked(self):
        return [[each.number for each in rung] for rung in self.asked]


def searched(folds=None, sizes=(4, 4), steps=3, direction="maximize", seed=0, **arguments):
    scored, whole = search(SPACE, DEFAULTS, sizes, steps, folds or Folds(), direction=direction, seed=seed, **arguments)
    return scored, whole


def of(values, steps=3, **arguments):
    """A search in which candidate N is worth values[N] on each step."""
    folds = Folds(lambda own, step: values[round(own["x"] * 1000)])
    defaults = [{"x": number / 1000} for number in range(len(values))]
    scored, _ = search(PLAIN, defaults, [], steps, folds, direction="maximize", seed=0, **arguments)
    return scored, folds


def test_of_twelve_defaults_four_see_the_second_fold_and_two_the_third():
    scored, folds = of([number / 100 for number in range(12)])
    assert folds.rungs_asked == [list(range(12)), [8, 9, 10, 11], [10, 11]]
    assert [each.number for each in scored if each.state == "COMPLETE"] == [10, 11]
    assert [len(each.results) for each in scored] == [1] * 8 + [2] * 2 + [3] * 2


@pytest.mark.parametrize(("count", "rungs"), [(1, [1, 1, 1]), (2, [2, 2, 2]), (4, [4, 2, 2]), (7, [7, 3, 2])])
def test_a_third_goes_on_and_two_at_least(count, rungs):
    _, folds = of([0.5 + number / 100 for number in range(count)])
    assert [len(rung) for rung in folds.asked] == rungs


def test_the_reduction_can_be_another():
    _, folds = of([number / 100 for number in range(8)], reduction=2)
    assert [len(rung) for rung in folds.asked] == [8, 4, 2]


@pytest.mark.parametrize(("patience", "rungs"), [(1, [9, 3, 2, 2]), (2, [9, 9, 3, 2]), (3, [9, 9, 9, 3]), (4, [9] * 4)])
def test_before_a_candidate_may_be_dropped_it_has_so_many_steps(patience, rungs):
    scored, folds = of([number / 100 for number in range(9)], steps=4, patience=patience)
    assert [len(rung) for rung in folds.asked] == rungs
    assert sum(each.state == "COMPLETE" for each in scored) == rungs[-1]


def test_with_patience_the_mean_of_all_these_steps_decides():
    by_fold = {0: (0.9, 0.1, 0.5), 1: (0.1, 0.95, 0.5), 2: (0.6, 0.6, 0.5), 3: (0.4, 0.5, 0.5)}
    folds = Folds(lambda own, step: by_fold[round(own["x"] * 10)][step])
    defaults = [{"x": number / 10} for number in range(4)]
    search(PLAIN, defaults, [], 3, folds, direction="maximize", seed=0, patience=2)
    assert folds.rungs_asked == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2]]


def test_of_equal_ones_the_earlier_goes_on():
    _, folds = of([0.5] * 9)
    assert folds.rungs_asked == [list(range(9)), [0, 1, 2], [0, 1]]


def test_the_mean_of_the_folds_so_far_decides_and_not_the_last_one():
    by_fold = {0: (0.90, 0.50, 0.0), 1: (0.80, 0.75, 0.0), 2: (0.70, 0.99, 0.0), 3: (0.1, 0.1, 0.1)}
    folds = Folds(lambda own, step: by_fold[round(own["x"] * 10)][step])
    defaults = [{"x": number / 10} for number in range(4)]
    search(PLAIN, defaults, [], 3, folds, direction="maximize", seed=0)
    assert folds.rungs_asked == [[0, 1, 2, 3], [0, 1], [0, 1]]  # means 0.70 and 0.775: two at least
    assert folds.asked[1][0].step == 1


def test_one_of_a_later_generation_goes_on_only_if_it_is_in_the_best_third_of_all():
    """Of the 7 on the first fold the best 3 are 6, 0 and 4; on the second are four, of which 6 and 0 are the best."""
    worth, asked = [0.9, 0.8, 0.7, 0.6, 0.85, 0.75, 0.95], []

    def evaluate(requests):
        asked.append([each.number for each in requests])
        return {each.number: worth[each.number] for each in requests}

    defaults = [{"x": number / 10} for number in range(4)]
    scored, _ = search(PLAIN, defaults, [3], 3, evaluate, direction="maximize", seed=0)
    assert asked == [[0, 1, 2, 3], [0, 1], [0, 1], [4, 5, 6], [4, 6], [6]]
    assert [each.state for each in scored] == ["COMPLETE"] * 2 + ["PRUNED"] * 4 + ["COMPLETE"]
    assert all(each.dropped for each in scored if each.state == "PRUNED")


def test_a_new_one_is_compared_with_the_others_on_the_folds_that_it_has_itself():
    """On the first fold it is the third of five, of which two go on; the means of all their folds are below its own."""
    worth = {0: (0.9, 0.1, 0.1), 1: (0.8, 0.1, 0.1), 2: (0.2,), 3: (0.2,), 4: (0.5,)}
    defaults = [{"x": number / 10} for number in range(4)]
    scored, _ = search(
        *(PLAIN, defaults, [1], 3, lambda requests: {each.number: worth[each.number][each.step] for each in requests}),
        direction="maximize",
        seed=0,
    )
    assert [each.results for each in scored] == [[0.9, 0.1, 0.1], [0.8, 0.1, 0.1], [0.2], [0.2], [0.5]]
    assert scored[4].dropped


def test_minimizing_is_maximizing_the_opposite():
    up, _ = searched(Folds())
    down, _ = searched(Folds(lambda own, step: -value(own, step)), direction="minimize")
    assert [each.values for each in up] == [each.values for each in down]
    assert [each.state for each in up] == [each.state for each in down]


@pytest.mark.parametrize("order", range(5))
def test_the_order_in_which_runs_end_changes_nothing(order):
    assert searched(Folds(order=order)) == searched(Folds(order=99))


@pytest.mark.parametrize("seed", range(5))
def test_more_generations_only_add_to_fewer_and_larger_ones_to_smaller(seed):
    long, _ = searched(sizes=(5, 5, 5), seed=seed)
    short, _ = searched(sizes=(5, 5), seed=seed)
    assert long[: len(short)] == short
    smaller, _ = searched(sizes=(3,), seed=seed)
    assert [each.values for each in smaller] == [each.values for each in long[:7]]


def test_another_seed_proposes_others():
    assert searched(seed=0)[0][:4] == searched(seed=1)[0][:4]
    assert searched(seed=0)[0][4:] != searched(seed=1)[0][4:]


@pytest.mark.parametrize("seed", range(3))
def test_proposals_are_within_the_space_and_differ(seed):
    scored, _ = searched(sizes=(6, 6), seed=seed)
    texts = [json.dumps(each.values, sort_keys=True) for each in scored]
    assert len(set(texts)) == len(texts) == 16
    for each in scored[4:]:
        arm = each.values["arm"]
        names = {"cnn": {"cnn.lr", "cnn.dropout"}, "resnet": {"resnet.lr", "resnet.depth"}}[arm]
        assert each.values.keys() == {"arm", "policy"} | names
        assert SPACE.encode(each.values) == each.values


def test_tuning_finds_better_ones_than_the_defaults():
    gains = []
    for seed in range(5):
        scored, _ = searched(sizes=(4, 4, 4), seed=seed)
        best = {
            kind: max(value(each.values) for each in scored if (each.generation > 0) == kind) for kind in (False, True)
        }
        gains.append(best[True] - best[False])
    assert sum(gain > 0 for gain in gains) >= 4


def test_a_small_space_is_gone_through_once():
    space = Space.parse({"a": {"choice": [1, 2, 3]}, "b": {"choice": [1, 2]}})
    folds = Folds(lambda own, step: own["a"] + own["b"])
    scored, whole = search(space, [{"a": 1, "b": 1}], [4, 4], 1, folds, direction="maximize", seed=0)
    assert whole
    assert len(scored) == 6
    assert [each.number for each in scored] == list(range(6))


def test_a_failed_one_is_out_and_others_take_its_place():
    folds = Folds(lambda own, step: value(own, step), failing={(3, 0), (2, 1)})
    scored, whole = searched(folds, sizes=(), steps=3)
    # without 3, the best ones are 1 (resnet) and 2 (cnn with TrivialAugment)
    assert folds.rungs_asked == [[0, 1, 2, 3], [1, 2], [1]]
    assert [each.state for each in scored] == ["PRUNED", "COMPLETE", "FAIL", "FAIL"]
    assert whole


def test_if_all_fail_nothing_more_of_them_is_asked():
    folds = Folds(failing={(number, 0) for number in range(4)})
    scored, whole = searched(folds, sizes=(2,))
    assert whole
    assert folds.rungs_asked[0] == [0, 1, 2, 3]
    assert [each.state for each in scored[:4]] == ["FAIL"] * 4
    assert len(scored) == 6


@pytest.mark.parametrize("rungs", range(7))
def test_a_search_that_was_cut_has_what_the_whole_one_has_at_first(rungs):
    whole = Folds()
    everything, _ = searched(whole)
    cut = Folds(rungs=rungs)
    scored, complete = searched(cut)
    assert complete == (rungs >= len(whole.asked))
    assert cut.rungs_asked == whole.rungs_asked[: rungs + 1]
    assert [each.values for each in scored] == [each.values for each in everything[: len(scored)]]
    assert all(each.results == everything[each.number].results[: len(each.results)] for each in scored)
    waiting = [each for each in scored if each.state == "PRUNED" and not each.dropped]
    assert bool(waiting) != complete
    assert not any(each.state == "RUNNING" for each in scored)


def test_a_rung_that_was_done_in_part_counts_as_far_as_it_goes():
    def half(requests):
        return {each.number: 0.5 for each in requests if each.number < 2}

    scored, whole = search(SPACE, DEFAULTS, [4], 3, half, direction="maximize", seed=0)
    assert not whole
    assert [each.results for each in scored] == [[0.5], [0.5], [], []]
    assert {each.state for each in scored} == {"PRUNED"}


def test_each_rung_is_told():
    told = []
    searched(on_rung=lambda scored: told.append([(len(each.results), each.state) for each in scored]))
    assert told[0] == [(1, "PRUNED"), (1, "RUNNING"), (1, "PRUNED"), (1, "RUNNING")]
    assert len(told[-1]) == 12


def test_the_study_of_it_has_the_numbers_states_means_and_reports():
    scored = [
        Scored(0, 0, DEFAULTS[0], [0.5, 0.7], "COMPLETE"),
        Scored(1, 0, DEFAULTS[1], [0.4], "PRUNED", dropped=True),
        Scored(2, 0, DEFAULTS[2], [0.4], "FAIL"),
    ]
    study = study_of(SPACE, scored, "maximize", attributes={1: {"reason": "others were better"}})
    trials = study.trials
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert trials[0].value == pytest.approx(0.6)
    assert trials[0].intermediate_values == pytest.approx({1: 0.5, 2: 0.6})
    assert (trials[1].value, trials[2].value) == (0.4, None)
    assert trials[1].user_attrs == {"reason": "others were better"}
    assert trials[0].params == DEFAULTS[0]
    assert study.best_trial.number == 0


def test_proposing_tells_nobody_of_the_studies_that_it_makes(capfd):
    propose(SPACE, [], 2, direction="maximize", seed=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("steps", "reduction", "patience", "defaults"),
    [(0, 3, 1, DEFAULTS), (3, 1, 1, DEFAULTS), (3, 3, 0, DEFAULTS), (3, 3, 1, [])],
)
def test_impossible_numbers_are_refused(steps, reduction, patience, defaults):
    with pytest.raises(ValueError, match="make no search"):
        search(
            SPACE, defaults, [], steps, Folds(), direction="maximize", seed=0, reduction=reduction, patience=patience
        )
