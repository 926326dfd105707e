"""The plan is a function of facts, measured seconds and budget; more time never means less."""

import json
from dataclasses import replace

import pytest
from seen import BREAST, DIGITS, PNEUMONIA, seen

from lightning_automl.auto.arms import ARMS
from lightning_automl.auto.costs import Costs, Programme, together
from lightning_automl.auto.ladder import MOST_SEEDS, SEARCHED_FROM
from lightning_automl.auto.plan import AIM, make_plan, programme_of
from lightning_automl.rundir import UserError

BUDGETS = (60, 75, 90, 120, 180, 300, 450, 600, 900, 1800, 3600, 7200, 20_000, 86_400)


def known(epoch, overhead=2.0, fixed=0.1, image=1e-4):
    return {
        **{"epoch_seconds": epoch, "overhead_seconds": overhead, "fixed_seconds": fixed},
        **{"parameters": 1, "test_image_seconds": image},
    }


def measured(not_run=None, search=None, **arms):
    """``measured.json`` of arms whose epoch takes so long."""
    found = {name: known(each) if isinstance(each, int | float) else each for name, each in arms.items()}
    return {"arms": found, "not_run": not_run or {}, "architecture_search": search}


MEASURED = {
    "digits": (DIGITS, measured(cnn=0.3, resnet=0.5, densenet=2.0, pcdarts=2.5, search=known(2.0))),
    "digits, pretrained": (
        DIGITS,
        measured(
            **{"cnn": 0.3, "resnet": 0.5, "densenet": 2.0, "pcdarts": 2.5, "search": known(2.0)},
            **{"finetune": 7.0, "head": 2.2, "lora": 7.0, "conv_adapter": 4.0},
        ),
    ),
    "BreastMNIST": (
        BREAST,
        measured(
            **{"cnn": 0.5, "resnet": 1.3, "densenet": 4.5},
            **{"finetune": known(9.5, 6.0), "head": known(3.0, 4.0), "lora": known(10.0, 7.0), "conv_adapter": 7.0},
        ),
    ),
    "PneumoniaMNIST": (
        PNEUMONIA,
        measured(
            **{"cnn": 3.0, "resnet": 10.0, "densenet": 35.0, "pcdarts": 30.0, "search": known(25.0)},
            **{"finetune": known(88.0, 7.0), "head": 27.0, "lora": known(88.0, 8.0), "conv_adapter": 62.0},
        ),
    ),
    "20 images": (
        seen((10, 10), (5, 5), (20, 20), size=28),
        measured(cnn=0.15, resnet=0.2, densenet=0.4, finetune=known(0.7, 5.0), head=known(0.3, 4.0)),
    ),
}


def planned(case, budget, *, spent=None, workers=2, metric="val_auroc", former=None):
    facts, times = MEASURED[case] if isinstance(case, str) else case
    spent = min(0.08 * budget, 12) + 4 if spent is None else spent
    return make_plan(facts, times, budget=budget, spent=spent, workers=workers, metric=metric, former=former)


def seconds(plan):
    return {each["name"]: each["seconds"] for each in plan["stages"]}


@pytest.mark.parametrize("case", MEASURED)
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_any_budget_from_a_minute_gives_a_plan_within_it(case, workers):
    for budget in BUDGETS:
        plan = planned(case, budget, workers=workers)
        assert plan["spent"] + sum(seconds(plan).values()) <= AIM * budget + 0.01
        assert 1 <= plan["final"]["seeds"] <= MOST_SEEDS
        assert plan["final"]["seeds"] >= 3 or budget < 600
        assert plan["arms"]
        for arm in plan["arms"]:
            assert 1 <= arm["epochs"] <= arm["default_epochs"]
            assert arm["policies"] in (["none"], ["none", "trivial_augment"])
        assert plan["generations"][0] == sum(len(arm["policies"]) for arm in plan["arms"])
        everything = [*(arm["name"] for arm in plan["arms"]), *(each["name"] for each in plan["not_run"])]
        there = set(MEASURED[case][1]["arms"]) - ({"pcdarts"} if plan["architecture_search"] else set())
        assert sorted(everything) == sorted(there)  # each arm is planned, or says why not
        assert json.loads(json.dumps(plan)) == plan


@pytest.mark.parametrize("case", MEASURED)
def test_the_same_questions_get_the_same_plan(case):
    assert planned(case, 1800) == planned(case, 1800)


@pytest.mark.parametrize("case", MEASURED)
@pytest.mark.parametrize("workers", [2, 8])
def test_arms_compete_as_soon_as_there_is_time_and_are_not_trained_for_too_short(case, workers):
    for budget in BUDGETS:
        plan = planned(case, budget, spent=10, workers=workers)
        shares = [arm["epochs"] / arm["default_epochs"] for arm in plan["arms"]]
        assert len(shares) == 1 or min(shares) >= 0.4, budget  # half of them, rounded
        assert len(shares) > 1 or budget < 600
        assert plan["final"]["seeds"] >= 3 or budget < 600


@pytest.mark.parametrize("case", ["digits", "BreastMNIST", "PneumoniaMNIST"])
def test_most_of_the_time_is_used(case):
    for budget in (1800, 7200):
        plan = planned(case, budget)
        assert plan["spent"] + sum(seconds(plan).values()) >= 0.5 * budget


def test_nothing_is_searched_before_the_time_from_which_it_is():
    short = planned("digits", SEARCHED_FROM / AIM)
    assert (short["comparison"], short["policy_search"], short["architecture_search"]) == (None, None, None)
    assert len(short["generations"]) == 1
    assert set(short["why_not"]) == {"comparison", "policy_search", "architecture_search"}
    long = planned("digits", 7200)
    assert all(long[stage] for stage in ("comparison", "policy_search", "architecture_search"))
    assert long["why_not"] == {}
    assert long["architecture_search"]["arm"]["name"] == "pcdarts"
    assert "pcdarts" not in [arm["name"] for arm in long["arms"]]


@pytest.mark.parametrize("case", MEASURED)
def test_whatever_is_searched_is_compared(case):
    for budget in BUDGETS:
        plan = planned(case, budget)
        searched = len(plan["generations"]) > 1 or plan["policy_search"] or plan["architecture_search"]
        assert bool(plan["comparison"]) or not searched


def test_pairs_of_the_comparison_are_four_at_least():
    for folds in (5, 3):
        facts = seen((40, 40), (10, 10), (20, 20), size=28, folds=folds)
        plan = planned((facts, measured(cnn=0.2, resnet=0.4)), 3600)
        assert plan["comparison"]["seeds"] * len(plan["comparison_folds"]) >= 4


def test_folds_and_what_is_compared_on_are_those_of_the_facts_whatever_the_budget():
    for budget in BUDGETS:
        plan = planned("BreastMNIST", budget)
        assert plan["folds"] == BREAST.folds
        assert plan["comparison_folds"] == BREAST.comparison_folds == [3, 4]
        # None is kept from the selection when nothing is compared.
        assert plan["search_folds"] == ([0, 1, 2] if plan["comparison"] else list(range(len(plan["search_folds"]))))
        assert len(plan["search_folds"]) >= 2


def test_an_architecture_is_searched_only_where_it_was_measured():
    few = "only 999 images"
    plan = planned((DIGITS, measured({"pcdarts": few}, cnn=0.3, resnet=0.5)), 7200)
    assert plan["architecture_search"] is None
    assert plan["why_not"]["architecture_search"] == few
    assert {"name": "pcdarts", "title": ARMS["pcdarts"].title, "why": few} in plan["not_run"]


def test_no_policy_is_searched_on_folds_with_few_images_of_a_class():
    few, enough = (
        planned((seen((images, 400), (9, 90), (20, 100), size=28), measured(cnn=0.2, resnet=0.4)), 7200)
        for images in (40, 41)  # with those of the validation split 9.8 and 10 in each of five folds
    )
    assert few["policy_search"] is None
    assert "10 images of each class" in few["why_not"]["policy_search"]
    assert enough["policy_search"] is not None


def test_a_policy_needs_a_fold_beside_the_one_that_it_is_scored_on():
    facts = seen((100, 100), (20, 20), (20, 20), size=28, folds=2)
    assert planned((facts, measured(cnn=0.2, resnet=0.4)), 7200)["policy_search"] is None


def test_a_budget_that_is_too_small_for_an_epoch_is_refused_with_one_that_is_not():
    with pytest.raises(UserError, match=r"too small for one epoch.*small CNN.*give 30 s or more") as caught:
        planned("PneumoniaMNIST", 20, spent=6)
    least = float(str(caught.value).split("give ")[1].split(" s")[0])
    assert planned("PneumoniaMNIST", least, spent=6)["arms"]
    with pytest.raises(UserError, match="no arm that could be measured"):
        planned((DIGITS, measured({"cnn": "broken"})), 180)


def test_at_the_smallest_budget_one_epoch_of_the_fastest_arm_is_planned():
    facts = seen(size=8)
    times = measured(cnn=10.0, resnet=20.0)
    exact = (12.0 + 0 + 8.0) / (AIM - 0.03)  # an epoch with its start, evaluation and report
    plan = planned((facts, times), exact * 1.05, spent=0)
    assert [(arm["name"], arm["epochs"]) for arm in plan["arms"]] == [("cnn", 1)]
    with pytest.raises(UserError):
        planned((facts, times), exact * 0.99, spent=0)


def test_the_likely_best_arm_is_taken_in_as_soon_as_half_of_its_epochs_fit():
    first = next(budget for budget in range(60, 9000, 30) if _has(planned("BreastMNIST", budget, spent=10), "finetune"))
    plan = planned("BreastMNIST", first, spent=10)
    assert plan["arms"][0]["name"] == "finetune"
    assert plan["arms"][0]["epochs"] >= plan["arms"][0]["default_epochs"] // 2


def _has(plan, name):
    return name in [arm["name"] for arm in plan["arms"]]


def test_reasons_name_the_numbers_that_decided():
    plan = planned("PneumoniaMNIST", 600)
    why = {each["name"]: each["why"] for each in plan["not_run"]}
    assert "a run of 2 epochs takes 3 min" in why["finetune"]
    assert any("choices are made on" in sentence for sentence in plan["sentences"])
    assert any(sentence.startswith("Not run: ") and "fine-tuned" in sentence for sentence in plan["sentences"])
    assert all(sentence.endswith(".") and "  " not in sentence for sentence in plan["sentences"])


@pytest.mark.parametrize("seconds", [60, 90, 120, 180, 240, 420, 900, 1800])
def test_sentences_promise_no_comparison_and_no_choice_where_there_is_none(seconds):
    plan = planned("PneumoniaMNIST", seconds)
    told = " ".join(plan["sentences"])
    assert ("kept for the comparison" in told) == (plan["comparison"] is not None)
    assert ("nothing is chosen. The test split" in told) == (plan["comparison"] is None and plan["generations"] == [1])
    assert ("the worse two thirds stop after each" in told) == (sum(plan["generations"]) > 2)


@pytest.mark.parametrize(("metric", "direction"), [("val_auroc", "maximize"), ("val_loss", "minimize")])
def test_a_loss_is_to_be_small(metric, direction):
    assert planned("digits", 180, metric=metric)["direction"] == direction


# A longer budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MEASURED)
def test_a_longer_budget_keeps_what_was_trained_and_adds_to_it(case):
    for shorter, longer in ((300, 600), (600, 3600), (1800, 7200)):
        former = planned(case, shorter)
        spent = former["spent"] + sum(seconds(former).values())
        plan = planned(case, longer, spent=spent, former=former)
        old, new = ({arm["name"]: arm["epochs"] for arm in each["arms"]} for each in (former, plan))
        assert old.keys() <= new.keys()
        # The same epochs, so that the same runs are wanted; or so much more that these are worth nothing.
        ratio = sum(new[name] / epochs for name, epochs in old.items()) / len(old)
        assert all(new[name] == epochs for name, epochs in old.items()) or ratio >= 2
        assert plan["final"]["seeds"] >= min(3, former["final"]["seeds"])
        assert plan["folds"] == former["folds"]
        assert plan["comparison"] or plan["search_folds"][: len(former["search_folds"])] == former["search_folds"]


def test_a_little_more_time_leaves_the_plan_as_it_was():
    former = planned("digits", 300)
    spent = former["spent"] + sum(seconds(former).values())
    plan = planned("digits", 301, spent=spent, former=former)
    assert programme_of(plan, list(MEASURED["digits"][1]["arms"])) == programme_of(
        former, list(MEASURED["digits"][1]["arms"])
    )


def test_a_plan_is_read_back_as_the_programme_that_it_holds():
    plan = planned("digits", 7200)
    programme = programme_of(plan, ["resnet", "cnn", "densenet"])
    costs = Costs(*MEASURED["digits"], 2)
    assert costs.total(programme) == pytest.approx(sum(seconds(plan).values()) - costs.evaluation(7200), abs=0.01)
    assert programme_of(plan, ["cnn"]) is None


# Costs --------------------------------------------------------------------------------------------------------------


def test_jobs_are_shared_among_workers_the_longest_first():
    assert together([1, 2, 3, 4], 1) == 10
    assert together([1, 2, 3, 4], 2) == 5
    assert together([4, 1, 1, 1], 2) == 4
    assert together([2, 2, 2], 2) == 4
    assert together([], 3) == 0


def test_the_seconds_of_runs_and_stages_by_hand():
    # 300 train and 60 validation images: an epoch is worth 320 images. Five folds of 72: three to search on.
    facts = seen((150, 150), (30, 30), (10, 10), size=28, folds=5)
    costs = Costs(facts, measured(cnn=known(3.3, 5.0, 0.1), resnet=known(6.5, 5.0, 0.1)), workers=2)
    assert costs.run("cnn", 10) == pytest.approx(5 + 10 * 3.3)
    # A search fold leaves two others to train on: 144 + 72 / 3 = 168 images. A comparison leaves four: 288 + 24 = 312.
    search, comparison = 5 + 10 * (0.1 + 3.2 * 168 / 320), 5 + 10 * (0.1 + 3.2 * 312 / 320)
    assert costs.run("cnn", 10, "search") == pytest.approx(search)
    assert costs.run("cnn", 10, "comparison") == pytest.approx(comparison)
    one = Programme({"cnn": 10}, (("cnn", "none"),), seeds=3)
    assert costs.selection(one) == 0
    assert costs.final(one) == pytest.approx(2 * 38)
    two = one.with_default("cnn", "trivial_augment")
    # Without a comparison no fold is kept from it. Both on each of two folds, at once, or of all:
    assert costs.selection(two) == pytest.approx(2 * comparison)
    assert costs.selection(replace(two, folds=9)) == pytest.approx(5 * comparison)
    many = Programme({"cnn": 10}, (("cnn", "none"),) * 9)
    assert costs.selection(many) == pytest.approx((5 + 2) * comparison)  # 9 and 3 candidates
    tuned = Programme({"cnn": 10}, (("cnn", "none"),) * 2, tuned=(4,), compared=2, seeds=3)
    assert costs.selection(tuned) == pytest.approx((3 + 2 + 1 + 1) * search)  # and 4, 2 and 1 of them
    assert costs.comparison(tuned) == pytest.approx(4 * comparison)  # two of both on each of two folds: 8 runs
    assert costs.final(tuned) == pytest.approx(3 * 38)  # of both


def test_of_few_images_a_final_run_takes_as_long_as_one_without_a_fold():
    # 40 train and 20 validation images, a third as long each: 46.7. Without one of five folds 48 and 12: 52.
    facts = seen((20, 20), (10, 10), (10, 10), folds=5)
    costs = Costs(facts, measured(cnn=known(46.7, 0.0, 0.0)), workers=1)
    assert costs.run("cnn", 1) == costs.run("cnn", 1, "comparison") == pytest.approx(52, rel=1e-3)


@pytest.mark.parametrize(
    ("train", "val", "folds", "patience"),
    [(12, 3, 5, 5), (40, 10, 5, 2), (60, 15, 5, 1), (59, 15, 5, 2), (48, 12, 4, 1), (4, 2, 2, 2)],
)
def test_candidates_are_dropped_only_after_thirty_images(train, val, folds, patience):
    facts = seen((train, train), (val, val), (10, 10), folds=folds)
    assert facts.patience == patience
    costs = Costs(facts, measured(cnn=known(1.0, 0.0, 0.0)), workers=1)
    run = costs.run("cnn", 1, "comparison")
    many = Programme({"cnn": 1}, (("cnn", "none"),) * 9, folds=folds)
    counts = [9 if step <= patience else (3 if step == patience + 1 else 2) for step in range(1, folds + 1)]
    assert costs.selection(many) == pytest.approx(sum(counts) * run)


def test_that_candidates_are_dropped_later_is_said_and_planned_for():
    facts = seen((40, 40), (10, 10), (20, 20), size=28)
    plan = make_plan(facts, MEASURED["20 images"][1], budget=300, spent=5, workers=2, metric="val_auroc")
    assert plan["patience"] == 2
    assert "the worse two thirds stop after 2 folds and after each later one" in " ".join(plan["sentences"])
    facts = seen((8, 8), (2, 2), (20, 20), size=28)
    plan = make_plan(facts, MEASURED["20 images"][1], budget=300, spent=5, workers=2, metric="val_auroc")
    assert "none is stopped early" in " ".join(plan["sentences"])


@pytest.mark.parametrize(
    ("val", "folds", "deep", "few", "held_out"),
    [
        ((15, 14), 5, False, True, [0, 1, 2, 3, 4]),
        ((15, 14), 4, False, True, [0, 1, 2, 3]),
        ((15, 14), 3, False, True, []),
        ((15, 14), 5, True, True, []),
        ((15, 15), 5, False, False, []),
    ],
)
def test_final_runs_do_without_folds_in_turn_where_validation_is_small(val, folds, deep, few, held_out):
    facts = seen((40, 40), val, (10, 10), folds=folds, deep=deep)
    assert (facts.few, facts.final_folds) == (few, held_out)
    plan = make_plan(facts, measured(cnn=0.2), budget=120, spent=5, workers=2, metric="val_auroc")
    assert any("each without another fold" in each for each in plan["sentences"]) == bool(held_out)


def test_with_one_fold_to_search_on_the_other_is_trained_on():
    facts = seen((100, 100), (0, 0), (10, 10), folds=2)
    costs = Costs(facts, measured(cnn=known(2.0, 0.0, 0.0)), workers=1)
    assert costs.run("cnn", 1, "search") == pytest.approx(2.0 * (100 + 100 / 3) / 200)
