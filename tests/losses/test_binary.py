import math

import pytest
import torch
import torch.nn.functional as F

from lightning_automl.losses import BinaryCrossEntropy


def softplus(value):
    return math.log1p(math.exp(value))


def test_binary_cross_entropy_by_hand():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    expected = softplus(1.0) + softplus(2.0) + softplus(0.5)  # no, yes, no
    assert BinaryCrossEntropy()(logits, torch.tensor([1])).item() == pytest.approx(expected)


def test_weight_and_smoothing_by_hand():
    logits = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    on, off = 0.95, 0.05
    first = on * softplus(-1.0) + off * softplus(1.0) + off * softplus(2.0) + on * softplus(-2.0)
    second = off * softplus(-0.5) + on * softplus(0.5) + math.log(2)
    loss = BinaryCrossEntropy(weight=[1.0, 3.0], label_smoothing=0.1)(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((first + 3 * second) / 4)


def test_soft_labels_between_two_classes():
    logits = torch.randn(4, 2)
    targets = torch.tensor([[0.3, 0.7]]).expand(4, 2)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    torch.testing.assert_close(BinaryCrossEntropy()(logits, targets), expected)


@pytest.mark.parametrize("weight", [None, [1.0, 3.0]], ids=str)
def test_one_logit_is_the_odds_of_class_one(weight):
    logits, targets = torch.tensor([[0.7], [-0.2]]), torch.tensor([1, 0])
    loss = BinaryCrossEntropy(weight=weight)
    first, second = softplus(-0.7), softplus(-0.2)
    expected = (first + second) / 2 if weight is None else (3 * first + second) / 4
    assert loss(logits, targets).item() == pytest.approx(expected)
    torch.testing.assert_close(loss(logits, F.one_hot(targets, 2).float()), loss(logits, targets))
    torch.testing.assert_close(loss.probabilities(logits)[:, 1], logits[:, 0].sigmoid())


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_probabilities_are_sigmoids_that_sum_to_one(classes):
    logits = torch.randn(6, classes)
    probabilities = BinaryCrossEntropy().probabilities(logits)
    assert probabilities.shape == (6, max(classes, 2))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
    if classes > 1:
        torch.testing.assert_close(probabilities, logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True))


def test_probabilities_and_gradients_are_finite_at_certainty():
    logits = torch.tensor([[-200.0, -300.0], [200.0, 300.0]], requires_grad=True)
    loss = BinaryCrossEntropy()
    torch.testing.assert_close(loss.probabilities(logits), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    loss(logits, torch.tensor([0, 1])).backward()
    assert logits.grad.isfinite().all()


def test_gradient_by_finite_differences():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 1])
    assert torch.autograd.gradcheck(lambda x: BinaryCrossEntropy(label_smoothing=0.25)(x, targets), logits)


def test_weight_is_a_buffer():
    assert BinaryCrossEntropy().weight is None
    assert BinaryCrossEntropy(weight=[1.0, 2.0]).state_dict()["weight"].tolist() == [1.0, 2.0]


def test_smoothing_outside_its_range_is_told():
    with pytest.raises(ValueError, match=r"label_smoothing is -0\.1"):
        BinaryCrossEntropy(label_smoothing=-0.1)
