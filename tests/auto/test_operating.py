import numpy as np
import pytest

from lightning_automl.auto.operating import (
    choose_temperature,
    choose_threshold,
    choose_unsure_below,
    rates_at,
    sure_and_unsure,
)
from lightning_automl.metrics.scores import accuracy, negative_log_likelihood
from lightning_automl.results.ensemble import combine


def drawn(seed, images=60, classes=3, sharpness=3.0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.normal(size=(images, classes)) + np.eye(classes)[labels]
    powers = np.exp(sharpness * logits)
    return powers / powers.sum(1, keepdims=True), labels


@pytest.mark.parametrize("seed", range(20))
def test_a_temperature_never_changes_the_class_and_never_raises_the_likelihoods_loss(seed):
    scores, labels = drawn(seed, sharpness=float(np.random.default_rng(seed).uniform(0.2, 6)))
    temperature, _ = choose_temperature(scores, labels)
    calibrated = combine([scores], temperature)
    assert (calibrated.argmax(1) == scores.argmax(1)).all()
    assert negative_log_likelihood(calibrated, labels) <= negative_log_likelihood(combine([scores]), labels)
    assert accuracy(calibrated, labels) == accuracy(scores, labels)


def test_a_model_that_is_too_sure_is_told_so():
    # Ten times in 40 it is wrong, and says 0.99: the best answer is log(0.99 / 0.01) / T = log(3).
    labels = np.arange(40) % 2
    said = np.where(np.arange(40) < 10, 1 - labels, labels)
    scores = np.where(np.eye(2)[said] == 1, 0.99, 0.01)
    temperature, why = choose_temperature(scores, labels)
    assert temperature == pytest.approx(np.log(99) / np.log(3), rel=1e-4)
    assert "too sure" in why
    assert combine([scores], temperature).max(1) == pytest.approx(np.full(40, 0.75), rel=1e-4)


def test_few_images_have_no_temperature_and_are_not_called_unsure():
    scores, labels = drawn(0, images=19)
    assert choose_temperature(scores, labels) == (
        1.0,
        "19 validation images are too few to fit a temperature to; it takes 20",
    )
    assert choose_unsure_below(scores) is None


def test_where_nothing_is_better_the_temperature_is_1():
    labels = np.arange(40) % 2
    certain = np.eye(2)[labels] * 0.8 + 0.1  # all right: a lower temperature would promise what nobody knows
    temperature, why = choose_temperature(certain, labels)
    assert temperature == 1
    assert "no temperature lowers" in why


def test_a_model_is_made_surer_only_if_that_is_more_than_chance():
    # One time in 20 it is wrong, and says 0.9: the best answer is log(9) / T = log(19), and twice the gain of n images
    # is 2 n (0.95 log(0.95 / 0.9) + 0.05 log(0.05 / 0.1)) = 0.0334 n.
    def chosen(images):
        labels = np.arange(images) % 2
        said = np.where(np.arange(images) % 20 == 7, 1 - labels, labels)
        return choose_temperature(np.where(np.eye(2)[said] == 1, 0.9, 0.1), labels)

    temperature, why = chosen(200)
    assert temperature == pytest.approx(np.log(9) / np.log(19), rel=1e-4)
    assert "not sure enough" in why
    temperature, why = chosen(100)
    assert temperature == 1
    assert "a temperature of 0.75 would lower" in why
    assert "may be chance" in why


def test_the_threshold_is_where_recall_and_specificity_are_best_together():
    labels = np.array([0, 0, 0, 1, 1, 1])
    scores = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.9])
    assert choose_threshold(scores, labels) == pytest.approx(0.25)
    assert rates_at(0.25, np.stack([1 - scores, scores], 1), labels)["balanced_accuracy"] == 1


def test_of_equally_good_thresholds_the_nearest_to_a_half_is_taken():
    labels = np.array([0, 0, 1, 1])
    assert choose_threshold(np.array([0.1, 0.2, 0.7, 0.9]), labels) == 0.5
    # J is 1/2 from 0.3 up to 0.4, and again from 0.8 up to 0.9.
    assert choose_threshold(np.array([0.2, 0.8, 0.4, 0.9]), labels) == pytest.approx(0.3)


def test_of_one_class_there_is_no_threshold():
    assert choose_threshold(np.array([0.2, 0.3]), np.array([1, 1])) is None


def test_a_tenth_of_the_images_lies_below_what_is_unsure():
    top = np.linspace(0.5, 0.99, 50)
    scores = np.stack([top, 1 - top], 1)
    below = choose_unsure_below(scores)
    assert (top < below).sum() == 5
    labels = np.zeros(50, np.int64)
    labels[:2] = 1
    assert sure_and_unsure(scores, labels, below) == {
        "share": pytest.approx(0.1),
        "accuracy_sure": 1.0,
        "accuracy_unsure": pytest.approx(0.6),
    }


def test_a_model_that_is_equally_sure_of_everything_is_unsure_of_nothing():
    scores = np.tile([0.9, 0.1], (30, 1))
    below = choose_unsure_below(scores)
    assert sure_and_unsure(scores, np.zeros(30, np.int64), below) == {
        "share": 0.0,
        "accuracy_sure": 1.0,
        "accuracy_unsure": None,
    }
