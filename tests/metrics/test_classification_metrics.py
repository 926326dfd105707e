import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from lightning_automl.metrics import StageOutputs, classification_metrics


def test_two_classes_by_hand():
    # One positive with score 0.9, negatives with 0.1, 0.2 and 0.8: one false alarm at 0.5, but perfectly ranked.
    scores = torch.tensor([0.9, 0.1, 0.2, 0.8])
    metrics = classification_metrics(torch.stack([1 - scores, scores], 1), torch.tensor([1, 0, 0, 0]))
    assert metrics["accuracy"] == pytest.approx(0.75)
    assert metrics["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["auroc"] == pytest.approx(1.0)
    assert metrics["f1"] == pytest.approx((2 / 3 + 0.8) / 2)  # positive: 2*1*.5/1.5; negative: 2*1*(2/3)/(5/3)


def test_calibration_error_of_constant_confidence():
    scores = torch.tensor([[0.9, 0.1]] * 10)
    half = torch.tensor([0, 1] * 5)
    assert classification_metrics(scores, half)["calibration_error"] == pytest.approx(0.4, abs=1e-6)


def test_agrees_with_scikit_learn_on_many_classes():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(500, 7, generator=generator).softmax(1)
    labels = torch.randint(7, (500,), generator=generator)
    metrics = classification_metrics(scores, labels)
    assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, scores.double(), multi_class="ovr"), abs=1e-5)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)), abs=1e-6)
    assert metrics["f1"] == pytest.approx(f1_score(labels, scores.argmax(1), average="macro"), abs=1e-6)


def test_classes_that_do_not_occur_are_left_out_of_the_means():
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    metrics = classification_metrics(scores, torch.tensor([0, 1, 1]))
    assert metrics["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert metrics["auroc"] == pytest.approx(1.0)


def test_auroc_of_a_single_class_is_undefined():
    assert classification_metrics(torch.tensor([[0.7, 0.3]]), torch.tensor([0]))["auroc"].isnan()


def test_outputs_are_kept_without_their_graph_and_weighted_by_batch_size():
    outputs = StageOutputs()
    logits = torch.randn(3, 2, requires_grad=True)
    outputs.update(logits, torch.tensor([0, 1, 1]), torch.tensor(1.0))
    outputs.update(logits[:1], torch.tensor([0]), torch.tensor(5.0))
    kept, labels, loss = outputs.compute()
    assert kept.shape == (4, 2)
    assert not kept.requires_grad
    assert labels.tolist() == [0, 1, 1, 0]
    assert loss == pytest.approx((3 * 1 + 5) / 4)
