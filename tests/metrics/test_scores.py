import math
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from lightning_automl.metrics import (
    SCORES,
    auroc_by_class,
    average_precision_by_class,
    bootstrap_interval,
    classification_metrics,
)
from lightning_automl.rundir import UserError

LOGGED = sorted(classification_metrics(torch.tensor([[0.7, 0.3]] * 2), torch.tensor([0, 1])))


def predictions(images, classes, seed=0):
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(classes), images), generator.integers(classes, size=images)


def tied(images, classes, seed=0):
    """Probabilities in eighths: many ties, also for the first place, and none at an edge of the 15 bins but 0 and 1."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(8, np.ones(classes) / classes, images)
    counts[counts.max(1) == 8] = [1, 7] + [0] * (classes - 2)
    return counts / 8, generator.integers(classes, size=images)


def missing(images, classes, seed=0):
    """No image of class 0, and class 1 is never predicted."""
    scores, labels = predictions(images, classes, seed)
    scores[:, 1] = 0
    return scores / scores.sum(1, keepdims=True), np.maximum(labels, 1)


def lone(images, classes, seed=0):
    scores, labels = predictions(images, classes, seed)
    return scores, np.full_like(labels, classes - 1)


def test_every_metric_that_a_task_logs_is_a_score():
    assert set(LOGGED) <= set(SCORES)


@pytest.mark.parametrize("name", LOGGED)
@pytest.mark.parametrize("make", [predictions, tied, missing, lone])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_scores_are_those_that_a_task_logs(name, make, classes):
    scores, labels = make(200, classes)
    logged = classification_metrics(torch.tensor(scores), torch.tensor(labels))[name]
    assert SCORES[name](scores, labels) == pytest.approx(logged.item(), abs=1e-6, nan_ok=True)


def test_two_classes_by_hand():
    # One positive with score 0.9, negatives with 0.1, 0.2 and 0.8: one false alarm at 0.5, but perfectly ranked.
    positive = np.array([0.9, 0.1, 0.2, 0.8])
    found = {
        name: score(np.stack([1 - positive, positive], 1), np.array([1, 0, 0, 0])) for name, score in SCORES.items()
    }
    assert found == pytest.approx(
        {
            "accuracy": 0.75,
            "balanced_accuracy": (1 + 2 / 3) / 2,
            "auroc": 1.0,
            "f1": (2 / 3 + 0.8) / 2,
            # 0.9 (two images) and 0.8 (two images, one of them wrong) are in two bins.
            "calibration_error": (2 * abs(1 - 0.9) + 2 * abs(0.5 - 0.8)) / 4,
            "average_precision": 1.0,
            "brier_score": 2 * (0.1**2 + 0.1**2 + 0.2**2 + 0.8**2) / 4,
            "negative_log_likelihood": -(math.log(0.9) + math.log(0.9) + math.log(0.8) + math.log(0.2)) / 4,
        }
    )


@pytest.mark.parametrize("make", [predictions, tied])
def test_areas_are_those_of_scikit_learn_also_with_ties(make):
    scores, labels = make(300, 5)
    for index in range(5):
        own = labels == index
        assert auroc_by_class(scores, labels)[index] == pytest.approx(roc_auc_score(own, scores[:, index]))
        assert average_precision_by_class(scores, labels)[index] == pytest.approx(
            average_precision_score(own, scores[:, index])
        )
    assert SCORES["average_precision"](scores, labels) == pytest.approx(
        average_precision_score(np.eye(5)[labels], scores, average="macro")
    )


def test_classes_without_a_positive_or_a_negative_have_no_area():
    scores, labels = missing(50, 3)
    for by_class, name in ((auroc_by_class, "auroc"), (average_precision_by_class, "average_precision")):
        values = by_class(scores, labels)
        assert np.isnan(values).tolist() == [True, False, False]
        assert SCORES[name](scores, labels) == pytest.approx(values[1:].mean())
        assert np.isnan(by_class(*lone(20, 3))).all()
        assert math.isnan(SCORES[name](*lone(20, 3)))


def test_average_precision_of_scores_without_information_is_the_mean_prevalence():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    scores = np.full((100, 3), 1 / 3)
    assert average_precision_by_class(scores, labels) == pytest.approx([0.7, 0.2, 0.1])
    assert SCORES["average_precision"](scores, labels) == pytest.approx(1 / 3)


def test_brier_score_is_twice_scikit_learns_for_two_classes_and_2_at_worst():
    scores, labels = predictions(100, 2)
    assert SCORES["brier_score"](scores, labels) == pytest.approx(2 * brier_score_loss(labels, scores[:, 1]))
    assert SCORES["brier_score"](np.eye(3), np.array([1, 2, 0])) == 2


def test_likelihood_is_scikit_learns_and_finite_for_a_certain_error():
    scores, labels = predictions(100, 4)
    scores[0] = np.eye(4)[(labels[0] + 1) % 4]
    assert SCORES["negative_log_likelihood"](scores, labels) == pytest.approx(log_loss(labels, scores))
    assert SCORES["negative_log_likelihood"](np.eye(2), np.array([1, 0])) == pytest.approx(-52 * math.log(0.5))


@pytest.mark.parametrize("name", SCORES)
def test_scores_leave_their_input_alone_and_do_not_depend_on_the_order(name):
    scores, labels = tied(60, 4)
    kept = scores.copy(), labels.copy()
    order = np.random.default_rng(1).permutation(60)
    value = SCORES[name](scores, labels)
    assert isinstance(value, float)
    assert SCORES[name](scores[order], labels[order]) == pytest.approx(value, abs=1e-12)
    assert (scores == kept[0]).all()
    assert (labels == kept[1]).all()


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    ("scores", "labels", "sentence"),
    [
        (np.ones((3, 2)) / 2, np.array([0, 1]), "give .images, classes. and .images,."),
        (np.ones(3), np.array([0, 1, 0]), "give .images, classes. and .images,."),
        (np.ones((0, 2)), np.zeros(0, int), "of one image or more"),
        (np.ones((2, 2)) / 2, np.array([0, 2]), r"labels are in \[0, 2\], but probabilities have 2 classes"),
        (np.ones((2, 2)) / 2, np.array([-1, 0]), r"labels are in \[-1, 0\]"),
        (np.array([[0.5, 0.5], [np.nan, 0.5]]), np.array([0, 1]), "not finite"),
    ],
)
def test_predictions_that_do_not_belong_together_are_refused(name, scores, labels, sentence):
    with pytest.raises(UserError, match=sentence):
        SCORES[name](scores, labels)


def test_a_bootstrap_of_every_score_takes_seconds():
    scores, labels = predictions(600, 2)
    started = time.process_time()
    for score in SCORES.values():
        bootstrap_interval(lambda rows, score=score: score(scores[rows], labels[rows]), 600, draws=500)
    assert time.process_time() - started < 4  # about 0.4 where it was written
