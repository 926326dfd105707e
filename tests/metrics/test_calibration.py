import math

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from lightning_automl.metrics import SCORES, expected_calibration_error, fit_temperature, reliability
from lightning_automl.metrics.calibration import TEMPERATURES
from lightning_automl.rundir import UserError

BINNINGS = pytest.mark.parametrize("equal_mass", [False, True])


def with_confidence(confidence, right):
    """Two classes; the first is predicted, and right where it says so."""
    confidence = np.asarray(confidence, float)
    return np.stack([confidence, 1 - confidence], 1), np.where(right, 0, 1)


def loss(logits, labels, temperature):
    return -log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean()


def confused(images=400, classes=4, scale=3.0):
    """Logits whose softmax at temperature ``scale`` is the distribution that the labels are drawn from."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(images, classes)) * 2
    labels = np.array([generator.choice(classes, p=row) for row in softmax(logits, axis=1)])
    return logits * scale, labels


@BINNINGS
def test_a_classifier_that_is_right_as_often_as_it_says_has_no_error(equal_mass):
    # 0.6 and 0.9, right in 6 and 9 of 10
    predictions = with_confidence([0.6] * 10 + [0.9] * 10, [True] * 6 + [False] * 4 + [True] * 9 + [False])
    assert expected_calibration_error(reliability(*predictions, equal_mass=equal_mass)) == pytest.approx(0)


@BINNINGS
def test_constant_confidence_of_90_percent_at_50_percent_accuracy_has_0_4(equal_mass):
    predictions = with_confidence([0.9] * 10, [True, False] * 5)
    assert expected_calibration_error(reliability(*predictions, equal_mass=equal_mass)) == pytest.approx(0.4)


def test_the_table_by_hand():
    # Of five bins of equal width, [0.4, 0.6) has one image, [0.6, 0.8) two, [0.8, 1] three; 1 is in the last.
    predictions = with_confidence([0.55, 0.625, 0.7, 0.8, 0.85, 1], [False, True, False, True, True, True])
    table = reliability(*predictions, bins=5)
    assert table.lower == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert table.upper == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert table.counts.tolist() == [0, 0, 1, 2, 3]
    nan = math.nan
    assert table.confidence == pytest.approx([nan, nan, 0.55, 0.6625, 2.65 / 3], nan_ok=True)
    assert table.accuracy == pytest.approx([nan, nan, 0, 0.5, 1], nan_ok=True)
    assert expected_calibration_error(table) == pytest.approx((0.55 + 2 * 0.1625 + 0.35) / 6)


def test_bins_of_equal_mass_have_as_many_images():
    scores = np.random.default_rng(0).dirichlet(np.ones(3), 100)
    table = reliability(scores, np.zeros(100, int), bins=8, equal_mass=True)
    assert sorted(set(table.counts.tolist())) == [12, 13]
    assert (table.lower[1:] == table.upper[:-1]).all()
    assert table.lower[0] == scores.max(1).min()
    assert table.upper[-1] == scores.max(1).max()


def test_images_of_the_same_confidence_stay_together():
    predictions = with_confidence([0.9] * 30 + [0.6] * 10, [True, False] * 20)
    table = reliability(*predictions, bins=4, equal_mass=True)
    assert table.counts.tolist() == [10, 30]


@BINNINGS
@pytest.mark.parametrize("bins", [1, 7, 200])
def test_every_image_is_in_one_bin(equal_mass, bins):
    scores = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    labels = np.arange(50) % 3
    table = reliability(scores, labels, bins, equal_mass)
    filled = table.counts > 0
    assert table.counts.sum() == 50
    assert (table.counts[filled] * table.accuracy[filled]).sum() / 50 == pytest.approx(
        (scores.argmax(1) == labels).mean()
    )
    assert (table.counts[filled] * table.confidence[filled]).sum() / 50 == pytest.approx(scores.max(1).mean())
    assert (table.lower[filled] <= table.confidence[filled]).all()
    assert (table.confidence[filled] <= table.upper[filled]).all()


def test_a_probability_above_one_by_a_rounding_is_in_the_last_bin():
    scores = np.array([[1 + 1e-7, 0.0]], np.float32)
    assert reliability(scores, np.array([0])).counts.tolist() == [0] * 14 + [1]


@pytest.mark.parametrize(
    ("scores", "bins", "sentence"), [([[3.0, -1.0]], 15, "softmax"), ([[0.5, 0.5]], 0, "bins is 0")]
)
def test_what_cannot_be_binned_is_refused(scores, bins, sentence):
    with pytest.raises(UserError, match=sentence):
        reliability(np.array(scores), np.array([0]), bins)


def test_the_temperature_is_found_with_which_the_labels_were_drawn():
    assert fit_temperature(*confused(images=4000, scale=3.0)) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(*confused(images=4000, scale=0.4)) == pytest.approx(0.4, rel=0.05)


def test_no_other_temperature_has_a_higher_likelihood():
    logits, labels = confused()
    found = fit_temperature(logits, labels)
    best = loss(logits, labels, found)
    assert all(loss(logits, labels, other) >= best - 1e-12 for other in np.geomspace(*TEMPERATURES, 500))
    # With the derivative in 1/T zero, the mean logit of the labels is the expected one.
    expected = (softmax(logits / found, axis=1) * logits).sum(1).mean()
    assert logits[np.arange(len(labels)), labels].mean() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_temperature_never_makes_the_likelihood_worse_nor_changes_a_prediction(seed):
    generator = np.random.default_rng(seed)
    images, classes = generator.integers(1, 40), generator.integers(1, 6)
    logits = (generator.normal(size=(images, classes)) * generator.choice([0.01, 1, 100])).astype(np.float32)
    labels = generator.integers(classes, size=images)
    found = fit_temperature(logits, labels)
    assert TEMPERATURES[0] <= found <= TEMPERATURES[1]
    assert loss(logits, labels, found) <= loss(logits, labels, 1)
    assert (softmax(logits / found, axis=1).argmax(1) == softmax(logits, axis=1).argmax(1)).all()


def test_a_temperature_makes_an_overconfident_classifier_better_calibrated():
    logits, labels = confused(images=2000)
    before, after = softmax(logits, axis=1), softmax(logits / fit_temperature(logits, labels), axis=1)
    assert SCORES["calibration_error"](after, labels) < 0.3 * SCORES["calibration_error"](before, labels)


def test_a_classifier_without_errors_is_left_as_it_is():
    logits = np.array([[0.1, 0.0], [0.0, 3.0], [2.0, 0.0]])
    assert fit_temperature(logits, np.array([0, 1, 0])) == 1
    assert 1 < fit_temperature(logits, np.array([0, 0, 0])) < TEMPERATURES[1]  # one error, of which it is sure


def test_a_classifier_that_is_always_wrong_gets_the_highest_temperature():
    logits = np.array([[0.0, 50.0], [0.0, 30.0]])
    assert fit_temperature(logits, np.array([0, 0])) == pytest.approx(TEMPERATURES[1], rel=1e-4)


def test_huge_logits_lose_no_digits():
    logits, labels = confused()
    assert fit_temperature(logits + 1e6, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-5)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="some logits are not finite"):
        fit_temperature(np.array([[0.0, np.inf]]), np.array([0]))
