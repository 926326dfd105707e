import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from searched import Time
from seen import DIGITS

from lightning_automl.auto.candidates import Candidate
from lightning_automl.auto.comparison import FRESH, Challenger, best_challenger, compare
from lightning_automl.auto.runs import BUDGET, Outcome
from lightning_automl.metrics.comparison import corrected_resampled_t_test

SIMPLE = Candidate("resnet", {}, "none", {"lr": 1}, True, "ResNet-20")
TUNED = Candidate("resnet", {"lr": 2}, "none", {"lr": 2}, False, "ResNet-20")
POLICY = Candidate("resnet", {}, "searched", {"lr": 1, "policy": "p"}, False, "ResNet-20")
CELLS = Candidate("pcdarts", {}, "none", {"genotype": "g"}, False, "PC-DARTS")


class Trained:
    """Runs whose values are known beforehand; each takes 10 seconds."""

    def __init__(self, directory, value, left=1000.0, workers=2):
        self.directory = directory
        self.value = value
        self.clock = Time(left)
        self.workers = SimpleNamespace(number=workers)
        self.done = []

    def is_settled(self, job):
        return job in self.done

    def wall_seconds(self, jobs):
        return 10.0 * sum(job not in self.done for job in jobs) / self.workers.number

    def each(self, jobs, within=None):
        outcomes = []
        for job in jobs:
            place = self.directory / job.candidate.key / job.name
            place.mkdir(parents=True, exist_ok=True)
            (place / "data.json").write_text(json.dumps({"counts": {"train": [600, 600], "val": [120, 80]}}))
            found = self.value(job)
            self.clock.seconds -= 10.0 / self.workers.number * (job not in self.done)
            reason = found if isinstance(found, str) else ""
            if reason != BUDGET:
                self.done.append(job)
            outcomes.append(Outcome(None if reason else found, reason, 10.0, 5, place))
        return outcomes


@pytest.fixture
def trained(tmp_path):
    return lambda value, **keys: Trained(tmp_path, value, **keys)


def plan_of(seeds=3, direction="maximize", **keys):
    return {
        "metric": "val_auroc",
        "direction": direction,
        "search_folds": [0, 1, 2],
        "comparison_folds": [3, 4],
        "comparison": {"seeds": seeds},
        "stages": [{"name": "selection", "seconds": 300}, {"name": "comparison", "seconds": 60},
                   {"name": "final", "seconds": 100}],
        **keys,
    }  # fmt: skip


NOISE = dict(zip([(fold, seed) for fold in (3, 4) for seed in range(3)], [4, -3, 1, -2, 3, -3], strict=True))


def better_by(difference):
    """Fold and start make the same difference to both; what is searched has another mean, and some luck of its own."""

    def value(job):
        noise = NOISE[job.fold, job.seed - FRESH]
        own = difference - 0.001 * noise if job.candidate is not SIMPLE else 0.0
        return 0.8 + 0.01 * noise + own

    return value


def test_what_is_better_by_more_than_chance_is_adopted_and_the_interval_is_that_of_the_test_by_hand(trained):
    record = compare(trained(better_by(0.04)), plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters")
    differences = 0.04 - 0.001 * np.array(list(NOISE.values()))
    # Student's t with 5 degrees of freedom: 2.5706 at 97.5 %; each run has 1200 images to train and 200 to validate on
    reach = 2.5706 * math.sqrt((1 / 6 + 200 / 1200) * differences.var(ddof=1))
    assert record["difference"] == pytest.approx(0.04)
    assert (record["low"], record["high"]) == pytest.approx((0.04 - reach, 0.04 + reach), abs=1e-6)
    assert record["p_value"] == pytest.approx(corrected_resampled_t_test(differences, 1200, 200).p_value)
    assert (record["adopted"], record["better"]) == ("searched", True)
    assert record["sentence"] == (
        f"The tuned hyper-parameters outperformed the defaults (val_auroc +0.0400 [{0.04 - reach:+.4f}, "
        f"{0.04 + reach:+.4f}] on 2 held-out folds with 3 seeds each) and are adopted."
    )


def test_what_may_be_chance_is_not_adopted(trained):
    record = compare(trained(better_by(0.002)), plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters")
    assert record["low"] < 0 < record["difference"]
    assert (record["adopted"], record["better"]) == ("simple", False)
    assert record["sentence"].startswith(
        "The tuned hyper-parameters did not outperform the defaults (val_auroc +0.0020 ["
    )
    assert record["sentence"].endswith("on 2 held-out folds with 3 seeds each); the simple arm is kept.")


def test_what_is_worse_by_more_than_chance_is_not_adopted(trained):
    record = compare(trained(better_by(-0.04)), plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters")
    assert record["high"] < 0
    assert (record["adopted"], record["better"]) == ("simple", False)
    assert "did not outperform" in record["sentence"]


def test_of_a_loss_the_smaller_is_better(trained):
    plan = plan_of(direction="minimize")
    assert compare(trained(better_by(-0.04)), plan, DIGITS, SIMPLE, TUNED, "hyper-parameters")["adopted"] == "searched"
    assert compare(trained(better_by(0.04)), plan, DIGITS, SIMPLE, TUNED, "hyper-parameters")["adopted"] == "simple"


@pytest.mark.parametrize("kind", ["hyper-parameters", "policy", "architecture"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("constant", [0.0, 0.5, 1.0])
def test_equal_arms_claim_nothing(trained, kind, direction, constant):
    searched = {"hyper-parameters": TUNED, "policy": POLICY, "architecture": CELLS}[kind]
    record = compare(
        trained(lambda job: constant), plan_of(direction=direction), DIGITS, SIMPLE, searched, kind, tried=3
    )
    assert (record["adopted"], record["better"], record["difference"], record["p_value"]) == ("simple", False, 0.0, 1.0)
    assert "did not outperform" in record["sentence"]
    assert "and is adopted" not in record["sentence"]


def test_differences_that_are_all_the_same_claim_nothing(trained):
    record = compare(
        trained(lambda job: 0.5 + 0.25 * (job.candidate is TUNED)), plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters"
    )
    assert (record["adopted"], record["difference"]) == ("simple", 0.25)
    assert math.isnan(record["low"])
    assert "did not outperform the defaults (val_auroc +0.2500 on 2 held-out folds" in record["sentence"]


def test_a_single_pair_claims_nothing(trained):
    plan = plan_of(seeds=1)
    facts = SimpleNamespace(comparison_folds=[4])
    record = compare(
        trained(lambda job: 0.5 + 0.25 * (job.candidate is TUNED)), plan, facts, SIMPLE, TUNED, "hyper-parameters"
    )
    assert record["adopted"] == "simple"
    assert (
        "(val_auroc +0.2500 on 1 held-out fold with 1 seed, a single pair, which shows nothing)" in record["sentence"]
    )


@pytest.mark.parametrize("arm", [SIMPLE, TUNED])
def test_a_run_that_has_failed_claims_nothing(trained, arm):
    def value(job):
        lost = job.candidate is arm and (job.fold, job.seed) == (4, FRESH + 1)
        return "it has diverged: val_auroc is nan" if lost else better_by(0.04)(job)

    record = compare(trained(value), plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters")
    assert (record["adopted"], record["better"]) == ("simple", False)
    assert "could not be compared with the defaults: a run has failed (it has diverged" in record["sentence"]


def test_both_are_trained_on_the_comparison_folds_with_the_same_fresh_seeds(trained):
    runs = trained(better_by(0.04))
    record = compare(runs, plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters", seed=0)
    wanted = {(fold, FRESH + seed) for fold in (3, 4) for seed in range(3)}
    for candidate, own in ((SIMPLE, record["values"]["simple"]), (TUNED, record["values"]["searched"])):
        assert {(job.fold, job.seed) for job in runs.done if job.candidate is candidate} == wanted
        assert {(each["fold"], each["seed"]) for each in own} == wanted
    assert len(runs.done) == 12
    # Neither the seed of the choices before nor one of the final runs after, of any number of them.
    assert not {seed for _, seed in wanted} & set(range(100))


def test_seeds_that_do_not_fit_are_left_out_and_are_not_made_up_for_later(trained):
    # 100 s are for the stage after it, a seed takes 4 runs of 10 s on 2 workers: 20 s
    runs = trained(better_by(0.04), left=145.0)
    record = compare(runs, plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters")
    assert len(record["values"]["searched"]) == len(record["values"]["simple"]) == 4
    assert runs.clock.cuts == {"comparison": "The comparison was cut after 2 of 3 seeds, for lack of time."}
    assert "on 2 held-out folds with 2 seeds each" in record["sentence"]
    runs.clock.seconds = 1000.0  # the same command again, in which nothing has to be trained any more
    again = compare(runs, plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters")
    assert again == record


def test_a_pair_that_the_clock_has_stopped_is_left_out(trained):
    def value(job):
        return BUDGET if (job.candidate, job.fold, job.seed) == (TUNED, 4, FRESH + 2) else better_by(0.04)(job)

    runs = trained(value)
    record = compare(runs, plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters")
    assert (4, FRESH + 2) not in [(each["fold"], each["seed"]) for each in record["values"]["simple"]]
    assert record["adopted"] == "searched"
    runs.value = better_by(0.04)
    assert compare(runs, plan_of(), DIGITS, SIMPLE, TUNED, "hyper-parameters") == record  # what is cut stays cut


def test_without_any_time_nothing_is_compared(trained):
    runs = trained(better_by(0.04), left=90.0)
    record = compare(runs, plan_of(), DIGITS, SIMPLE, POLICY, "policy")
    assert not runs.done
    assert (record["adopted"], record["difference"]) == ("simple", None)
    assert record["sentence"] == (
        "The searched augmentation policy could not be compared, since the time was over; the simple arm is kept."
    )


def test_without_a_challenger_or_a_plan_the_reason_is_said(trained):
    runs = trained(better_by(0.04))
    record = compare(runs, plan_of(), DIGITS, SIMPLE, None, "", why="Nothing was searched.")
    assert (record["adopted"], record["sentence"]) == ("simple", "Nothing was searched; the simple arm is kept.")
    plan = plan_of(comparison=None, why_not={"comparison": "the budget is too small for a comparison"})
    record = compare(runs, plan, DIGITS, SIMPLE, TUNED, "hyper-parameters")
    assert record["sentence"] == "The budget is too small for a comparison; the simple arm is kept."
    assert not runs.done


def test_a_sentence_names_the_simple_arm_and_how_many_were_tried(trained):
    tuned_policy = Candidate("resnet", {"lr": 2}, "searched", {"lr": 2, "policy": "p"}, False, "ResNet-20")
    record = compare(trained(better_by(0.04)), plan_of(), DIGITS, SIMPLE, tuned_policy, "policy", tried=3)
    assert record["sentence"].startswith(
        "The searched augmentation policy with tuned hyper-parameters, the best of 3 searched challengers, "
        "outperformed the simple arm (ResNet-20, no policy) (val_auroc +0.0400 ["
    )
    assert record["sentence"].endswith("and is adopted.")


# ---- which challenger is compared


CHALLENGERS = [
    Challenger(TUNED, "hyper-parameters"),
    Challenger(POLICY, "policy"),
    Challenger(CELLS, "architecture"),
]


def means(**values):
    """The mean of a candidate by the kind of its search, with what makes folds hard the same for all."""
    own = {
        **{SIMPLE.key: values["simple"], TUNED.key: values["tuned"]},
        **{POLICY.key: values["policy"], CELLS.key: values["cells"]},
    }
    return lambda job: own[job.candidate.key] if isinstance(own[job.candidate.key], str) else (
        own[job.candidate.key] + 0.01 * (job.fold - 1)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "direction", "best"),
    [
        ({"simple": 0.8, "tuned": 0.81, "policy": 0.83, "cells": 0.82}, "maximize", POLICY),
        ({"simple": 0.8, "tuned": 0.81, "policy": 0.79, "cells": 0.82}, "maximize", CELLS),
        ({"simple": 0.8, "tuned": 0.79, "policy": 0.83, "cells": 0.82}, "minimize", TUNED),
        ({"simple": 0.8, "tuned": 0.81, "policy": "failed", "cells": 0.8}, "maximize", TUNED),
        ({"simple": 0.8, "tuned": 0.8, "policy": 0.8, "cells": 0.8}, "maximize", None),  # equal is not better
        ({"simple": 0.8, "tuned": 0.7, "policy": 0.7, "cells": "failed"}, "maximize", None),
        ({"simple": 0.8, "tuned": "failed", "policy": "failed", "cells": "failed"}, "maximize", None),
        ({"simple": "failed", "tuned": 0.8, "policy": 0.8, "cells": 0.8}, "maximize", None),
    ],
)
def test_the_best_challenger_on_the_search_folds_is_compared_if_it_is_better_than_the_simple_arm(
    trained, values, direction, best
):
    runs = trained(means(**values))
    choice = best_challenger(runs, plan_of(direction=direction), SIMPLE, CHALLENGERS)
    assert (choice.challenger and choice.challenger.candidate) is best
    assert choice.tried == sum(not isinstance(values[name], str) for name in ("tuned", "policy", "cells"))
    assert [row["kind"] for row in choice.means] == ["simple", "hyper-parameters", "policy", "architecture"]
    assert [row["mean"] for row in choice.means] == [
        None if isinstance(value, str) else pytest.approx(value) for value in values.values()
    ]
    assert {job.fold for job in runs.done} == {0, 1, 2}  # no run has seen the folds of the comparison
    assert {job.seed for job in runs.done} == {0}


def test_the_reason_that_none_is_compared_is_a_sentence(trained):
    values = {"simple": 0.8, "tuned": 0.75, "policy": 0.7, "cells": 0.7}
    one = best_challenger(trained(means(**values)), plan_of(), SIMPLE, CHALLENGERS[:1])
    assert one.sentence == (
        "The tuned hyper-parameters did not outperform the simple arm on the search folds (val_auroc 0.7500, and "
        "0.8000 of ResNet-20, no policy)"
    )
    several = best_challenger(trained(means(**values)), plan_of(), SIMPLE, CHALLENGERS)
    assert several.sentence.startswith("None of 3 searched challengers outperformed the simple arm on the search folds")


@pytest.mark.parametrize("challengers", [[], [Challenger(SIMPLE, "hyper-parameters")]])
def test_without_challengers_nothing_is_trained(trained, challengers):
    runs = trained(better_by(0.04))
    choice = best_challenger(runs, plan_of(), SIMPLE, challengers)
    assert (choice.challenger, choice.tried, choice.means, runs.done) == (None, 0, [], [])
    assert compare(runs, plan_of(), DIGITS, SIMPLE, None, "", why=choice.sentence)["sentence"] == (
        "Nothing that was searched is left to compare; the simple arm is kept."
    )


def test_a_challenger_for_which_there_is_no_time_is_left_out(trained):
    values = {"simple": 0.8, "tuned": 0.81, "policy": 0.9, "cells": 0.9}
    # 80 s for this stage: half of them for the comparison, the others for the runs of two of four candidates
    runs = trained(means(**values), left=180.0)
    choice = best_challenger(runs, plan_of(), SIMPLE, CHALLENGERS)
    assert choice.challenger == CHALLENGERS[0]
    assert (choice.tried, set(runs.clock.cuts)) == (1, {"judgement of the policy", "judgement of the architecture"})
