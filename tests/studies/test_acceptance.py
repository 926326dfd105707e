import math
from pathlib import Path

import numpy as np
import pytest

from lightning_automl.metrics.comparison import corrected_resampled_t_test
from lightning_automl.results.run import Run
from lightning_automl.studies.acceptance import SIMPLE, judge, last_value

PAIRS = [(fold, seed) for fold in (5, 6) for seed in (0, 1, 2)]
NOISE = np.array([0.004, -0.003, 0.001, -0.002, 0.003, -0.003])


def values(**means):
    """Of each arm by fold and seed: its mean, and what makes a fold hard and a start lucky, the same for all."""
    shared = np.array([0.01, 0.02, -0.01, -0.02, 0.03, -0.03])
    own = {"none": 0 * NOISE, "trivial_augment": NOISE, "searched": -NOISE}
    return {
        name: dict(zip(PAIRS, (mean + shared + own[name]).tolist(), strict=True)) for name, mean in (means | {}).items()
    }


def judged(direction="maximize", **means):
    return judge(values(**means), "val_accuracy", direction, train_images=1200, test_images=200)


def test_a_policy_that_beats_both_simple_arms_by_more_than_chance_is_adopted():
    record = judged(none=0.90, trivial_augment=0.91, searched=0.94)
    assert record["adopted"] == "searched"
    assert [each["against"] for each in record["comparisons"]] == list(SIMPLE)
    assert all(each["better"] and each["low"] > 0 for each in record["comparisons"])


def test_the_interval_is_that_of_the_corrected_resampled_t_test_by_hand():
    against_none = judged(none=0.90, trivial_augment=0.91, searched=0.94)["comparisons"][0]
    differences = 0.04 - NOISE
    # Student's t with 5 degrees of freedom: 2.5706 at 97.5 %
    reach = 2.5706 * math.sqrt((1 / 6 + 200 / 1200) * differences.var(ddof=1))
    assert against_none["difference"] == pytest.approx(0.04)
    assert against_none["low"] == pytest.approx(0.04 - reach, abs=1e-6)
    assert against_none["high"] == pytest.approx(0.04 + reach, abs=1e-6)
    assert against_none["p_value"] == pytest.approx(corrected_resampled_t_test(differences, 1200, 200).p_value)


@pytest.mark.parametrize(
    ("means", "adopted"),
    [
        ({"none": 0.90, "trivial_augment": 0.94, "searched": 0.94}, "trivial_augment"),  # beats none alone
        ({"none": 0.94, "trivial_augment": 0.90, "searched": 0.94}, "none"),  # beats TrivialAugment alone
        ({"none": 0.90, "trivial_augment": 0.90, "searched": 0.902}, "none"),  # by chance; of equal ones the simplest
        ({"none": 0.94, "trivial_augment": 0.95, "searched": 0.90}, "trivial_augment"),  # is worse than both
    ],
)
def test_otherwise_the_better_simple_arm_is_named(means, adopted):
    record = judged(**means)
    assert record["adopted"] == adopted
    assert "is adopted instead" in record["sentence"]
    assert SIMPLE[adopted][1] in record["sentence"].rpartition(";")[2]


def test_of_a_loss_the_smaller_is_better():
    assert judged("minimize", none=0.94, trivial_augment=0.94, searched=0.90)["adopted"] == "searched"
    assert judged("minimize", none=0.90, trivial_augment=0.91, searched=0.94)["adopted"] == "none"
    assert judged("minimize", none=0.91, trivial_augment=0.90, searched=0.94)["adopted"] == "trivial_augment"


@pytest.mark.parametrize("arm", ["searched", "none", "trivial_augment"])
def test_a_run_that_has_diverged_adopts_nothing(arm):
    found = values(none=0.90, trivial_augment=0.91, searched=0.99)
    found[arm][5, 1] = math.nan
    record = judge(found, "val_loss", "maximize", 1200, 200)
    assert record["adopted"] == ("none" if arm == "trivial_augment" else "trivial_augment")
    assert "diverged" in record["sentence"]


def test_equal_differences_are_no_proof():
    found = {name: dict.fromkeys(PAIRS, mean) for name, mean in (("none", 0.5), ("searched", 0.75))}
    found["trivial_augment"] = found["none"]
    assert judge(found, "val_accuracy", "maximize", 1200, 200)["adopted"] == "none"


def run_with(*epochs):
    return Run(Path("run"), {}, None, {}, {}, [{"epoch": number, **row} for number, row in enumerate(epochs)])


def test_the_last_epoch_counts_and_not_the_best():
    assert last_value(run_with({"val_loss": 0.1}, {"val_loss": 0.3}, {"train_loss": 0.0}), "val_loss") == 0.3
    assert math.isnan(last_value(run_with({"val_loss": 0.1}, {"val_loss": math.nan}), "val_loss"))


def test_a_metric_that_was_never_there_is_no_divergence():
    with pytest.raises(ValueError, match="has no val_auroc after any of its 2 epochs"):
        last_value(run_with({"val_loss": 0.1}, {"val_loss": 0.3}), "val_auroc")


def test_the_record_holds_every_run():
    record = judged(none=0.90, trivial_augment=0.91, searched=0.94)
    for name, own in values(none=0.90, trivial_augment=0.91, searched=0.94).items():
        kept = {(each["fold"], each["seed"]): each["value"] for each in record["arms"][name]["values"]}
        assert kept == own
        assert record["arms"][name]["low"] < record["arms"][name]["mean"] < record["arms"][name]["high"]
