import numpy as np
import pytest
from scipy.stats import ttest_1samp

from lightning_automl.metrics import (
    SCORES,
    bootstrap_interval,
    corrected_resampled_t_test,
    difference_from_sample,
    paired_bootstrap,
)
from lightning_automl.rundir import UserError

DIFFERENCES = [0.01, 0.03, -0.01, 0.02, 0.05]


def mean_of(values):
    return lambda rows: values[rows].mean()


def test_a_pair_is_told_apart_where_two_intervals_overlap():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(size=300)
    first, second = difficulty + 0.05, difficulty + generator.normal(size=300) * 0.1
    alone = [bootstrap_interval(mean_of(values), 300) for values in (first, second)]
    assert alone[0].low < alone[1].high
    found = paired_bootstrap(mean_of(first), mean_of(second), 300)
    assert found.difference == pytest.approx((first - second).mean())
    assert found.low < found.difference < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * (first - second).std() / 300**0.5, rel=0.1)
    assert found.excludes_zero


def test_a_difference_that_may_be_chance_is_not_claimed():
    generator = np.random.default_rng(0)
    right = generator.random(100) < 0.8, generator.random(100) < 0.8
    assert not paired_bootstrap(mean_of(right[0]), mean_of(right[1]), 100).excludes_zero


def test_the_sign_says_which_model_is_better():
    worse, better = np.tile([0.0, 1.0, 0.0], 20), np.ones(60)
    assert paired_bootstrap(mean_of(worse), mean_of(better), 60).high < 0
    assert paired_bootstrap(mean_of(better), mean_of(worse), 60).low > 0


@pytest.mark.parametrize("name", SCORES)
def test_equal_models_have_no_difference_in_any_score(name):
    generator = np.random.default_rng(0)
    scores, labels = generator.dirichlet(np.ones(3), 40), np.arange(40) % 3
    arm = lambda rows: SCORES[name](scores[rows], labels[rows])  # noqa: E731
    found = paired_bootstrap(arm, arm, 40, draws=50)
    assert found == (0, 0, 0, 0)
    assert not found.excludes_zero


def test_whole_patients_are_drawn():
    # All that the models differ in is one patient with half of the images.
    first, patients = np.repeat([1.0, 0.0], 50), np.append(np.zeros(50), np.arange(1, 51))
    by_image = paired_bootstrap(mean_of(first), mean_of(np.zeros(100)), 100)
    by_patient = paired_bootstrap(mean_of(first), mean_of(np.zeros(100)), 100, patients)
    assert by_image.excludes_zero
    assert not by_patient.excludes_zero


def test_a_score_that_is_undefined_claims_nothing():
    found = paired_bootstrap(lambda rows: float("nan"), lambda rows: 0.5, 10, draws=20)
    assert found.undefined == 20
    assert not found.excludes_zero


def test_corrected_t_test_by_hand():
    # mean 0.02, squared deviations 1, 1, 9, 0, 9 (1e-4): variance 20e-4 / 4; of the mean (1/5 + 1/4) * 5e-4 = 2.25e-4
    found = corrected_resampled_t_test(DIFFERENCES, train_images=400, test_images=100)
    assert found.difference == pytest.approx(0.02)
    assert found.t == pytest.approx(0.02 / 0.015)
    assert found.low == pytest.approx(0.02 - 2.776445 * 0.015, abs=1e-7)  # Student's t, 4 degrees of freedom, 97.5 %
    assert found.high == pytest.approx(0.02 + 2.776445 * 0.015, abs=1e-7)
    # With 4 degrees of freedom and s = t / sqrt(4 + t^2), the two-sided p is 1 - 1.5 s + 0.5 s^3.
    s = found.t / (4 + found.t**2) ** 0.5
    assert found.p_value == pytest.approx(1 - 1.5 * s + 0.5 * s**3)
    assert not found.excludes_zero


def test_without_overlap_it_is_the_plain_t_test():
    found = corrected_resampled_t_test(DIFFERENCES, train_images=10**12, test_images=1, confidence=0.9)
    plain = ttest_1samp(DIFFERENCES, 0)
    assert (found.t, found.p_value) == pytest.approx((plain.statistic, plain.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(plain.confidence_interval(0.9)))


def test_the_correction_takes_back_a_claim_of_the_plain_test():
    differences = [0.02, 0.03, 0.01, 0.02, 0.03, 0.0, 0.02, 0.01]
    assert corrected_resampled_t_test(differences, 10**9, 1).excludes_zero
    assert not corrected_resampled_t_test(differences, 100, 100).excludes_zero


def test_p_and_interval_agree_about_a_clear_difference():
    found = corrected_resampled_t_test([-0.2, -0.21, -0.19, -0.2, -0.22], 400, 100)
    assert found.excludes_zero
    assert found.p_value < 0.001
    assert found.t < 0


def test_equal_arms_claim_nothing():
    found = corrected_resampled_t_test([0.0] * 5, 400, 100)
    assert found == (0, 0, 0, 0, 1)
    assert not found.excludes_zero


@pytest.mark.parametrize("differences", [[0.05] * 5, [0.95 - 0.9, 0.85 - 0.8, 0.75 - 0.7]])
def test_differences_that_are_equal_but_not_zero_have_no_test(differences):
    found = corrected_resampled_t_test(differences, 400, 100)
    assert found.difference == pytest.approx(0.05)
    assert np.isnan(found[1:]).all()
    assert not found.excludes_zero


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0.1], 10, 5), "give one number a split"),
        (([[0.1, 0.2]], 10, 5), "give one number a split"),
        (([0.1, float("nan")], 10, 5), "not finite"),
        (([0.1, 0.2], 0, 5), "0 train and 5 test images"),
        (([0.1, 0.2], 10, 0), "10 train and 0 test images"),
        (([0.1, 0.2], 10, 5, 95), "confidence is 95"),
    ],
)
def test_what_cannot_be_tested_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        corrected_resampled_t_test(*arguments)


def test_one_value_beside_a_sample_by_hand():
    sample = [0.90, 0.92, 0.94]  # mean 0.92, deviation 0.02; t of 2 degrees of freedom is 4.302653
    found = difference_from_sample(0.95, sample)
    error = 0.02 * (1 + 1 / 3) ** 0.5
    assert found.difference == pytest.approx(0.03)
    assert (found.low, found.high) == pytest.approx((0.03 - 4.302653 * error, 0.03 + 4.302653 * error))
    assert found.t == pytest.approx(0.03 / error)
    assert not found.excludes_zero


def test_one_value_beside_a_sample_is_a_pooled_t_test_against_a_group_of_one():
    # The group of one adds nothing to the pooled variance, and one to the sum of inverse sizes.
    generator = np.random.default_rng(0)
    sample = generator.normal(size=9)
    found = difference_from_sample(2.0, sample)
    expected = ttest_1samp(sample, 2.0)
    assert found.t == pytest.approx(-expected.statistic * (1 / 9) ** 0.5 / (1 + 1 / 9) ** 0.5)
    assert found.excludes_zero == (found.p_value < 0.05)


def test_a_value_of_the_same_kind_is_called_different_as_often_as_promised():
    draws = np.random.default_rng(0).normal(size=(2000, 6))
    claimed = np.mean([difference_from_sample(row[0], row[1:]).excludes_zero for row in draws])
    assert claimed == pytest.approx(0.05, abs=0.015)  # three standard deviations


def test_a_sample_of_equal_values_claims_nothing():
    found = difference_from_sample(0.9, [0.8, 0.8, 0.8])
    assert found.difference == pytest.approx(0.1)
    assert np.isnan(found[1:]).all()
    assert not found.excludes_zero


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0.5, [0.4]), "the sample has shape"),
        ((float("nan"), [0.4, 0.5]), "some values are not finite"),
        ((0.5, [0.4, float("inf")]), "some values are not finite"),
        ((0.5, [0.4, 0.5], 1.0), "confidence is 1.0"),
    ],
)
def test_a_sample_that_cannot_be_compared_with_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        difference_from_sample(*arguments)
