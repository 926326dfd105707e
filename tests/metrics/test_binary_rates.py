import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score

from lightning_automl.metrics import PredictiveValues, predictive_values, rates
from lightning_automl.rundir import UserError


def test_rates_by_hand():
    found = rates(np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.8]), 0.5)
    assert found._asdict() == pytest.approx(
        {"accuracy": 0.75, "recall": 1, "precision": 0.5, "specificity": 2 / 3, "balanced_accuracy": 5 / 6}
    )


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.8])
def test_rates_agree_with_scikit_learn(threshold):
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(2, size=200), generator.integers(11, size=200) / 10  # ties with the threshold
    found, taken = rates(labels, scores, threshold), scores >= threshold
    assert found.accuracy == pytest.approx((labels == taken).mean())
    assert found.recall == pytest.approx(recall_score(labels, taken))
    assert found.precision == pytest.approx(precision_score(labels, taken))
    assert found.specificity == pytest.approx(recall_score(labels, taken, pos_label=0))
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, taken))


def test_a_score_at_the_threshold_is_taken_for_class_1():
    assert rates(np.array([1]), np.array([0.5])).recall == 1


def test_a_share_of_nothing_is_nan():
    healthy = rates(np.array([0, 0]), np.array([0.1, 0.2]))
    assert np.isnan([healthy.recall, healthy.precision, healthy.balanced_accuracy]).all()
    assert (healthy.accuracy, healthy.specificity) == (1, 1)
    assert np.isnan(rates(np.array([1]), np.array([0.9])).specificity)


@pytest.mark.parametrize(
    ("labels", "scores", "sentence"),
    [
        ([1, 0], [0.5], r"labels have shape \(2,\) and scores \(1,\)"),
        ([], [], "give one of both an image"),
        ([1, 2], [0.5, 0.5], r"labels are \[1, 2\]; give 0 and 1"),
        ([1, 0], [0.5, float("nan")], "not a number"),
    ],
)
def test_rates_of_something_else_are_refused(labels, scores, sentence):
    with pytest.raises(UserError, match=sentence):
        rates(np.array(labels), np.array(scores))


def test_a_good_test_for_a_rare_disease_is_mostly_wrong_when_it_finds_something():
    found = predictive_values(sensitivity=0.9, specificity=0.9, prevalence=0.01)
    assert found.positive == pytest.approx(0.083333, abs=5e-7)
    assert found.negative == pytest.approx(0.891 / 0.892)


def test_at_the_prevalence_of_the_set_the_predictive_value_is_the_precision():
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(2, size=200), generator.random(200)
    found = rates(labels, scores)
    values = predictive_values(found.recall, found.specificity, labels.mean())
    assert values.positive == pytest.approx(found.precision)
    assert values.negative == pytest.approx((labels[scores < 0.5] == 0).mean())


@pytest.mark.parametrize(
    ("shares", "values"),
    [
        ((1, 1, 0.3), (1, 1)),
        ((0, 1, 0.3), (float("nan"), 0.7)),  # nothing is found
        ((1, 0, 0.3), (0.3, float("nan"))),  # nothing is left alone
        ((float("nan"), 0.9, 0.3), (float("nan"), float("nan"))),
    ],
)
def test_predictive_values_at_the_limits(shares, values):
    assert predictive_values(*shares) == pytest.approx(PredictiveValues(*values), nan_ok=True)


@pytest.mark.parametrize("name", ["sensitivity", "specificity", "prevalence"])
@pytest.mark.parametrize("value", [-0.1, 1.1, 90])
def test_a_share_is_not_a_percentage(name, value):
    shares = {"sensitivity": 0.9, "specificity": 0.9, "prevalence": 0.1, name: value}
    with pytest.raises(UserError, match=f"{name} is {value}; give a share"):
        predictive_values(**shares)
