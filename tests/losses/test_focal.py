import math

import pytest
import torch
import torch.nn.functional as F

from lightning_automl.losses import FocalLoss

WEIGHT = [0.5, 1.0, 3.0]


def test_focal_loss_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2
    expected = (0.25**2 * -math.log(0.75) + 0.5**2 * -math.log(0.5)) / 2
    assert FocalLoss(gamma=2.0)(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_weighted_focal_loss_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    expected = (1.0 * 0.25 * -math.log(0.75) + 4.0 * 0.5 * -math.log(0.5)) / (1 + 4)
    assert FocalLoss(gamma=1.0, weight=[1.0, 4.0])(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_gamma_zero_is_cross_entropy(soft, weight, label_smoothing):
    torch.manual_seed(0)
    logits = torch.randn(8, 3)
    targets = torch.randn(8, 3).softmax(1) if soft else torch.randint(3, (8,))
    expected = F.cross_entropy(
        logits, targets, weight=None if weight is None else torch.tensor(weight), label_smoothing=label_smoothing
    )
    loss = FocalLoss(gamma=0.0, weight=weight, label_smoothing=label_smoothing)(logits, targets)
    torch.testing.assert_close(loss, expected)


def test_one_hot_labels_are_labels():
    logits, targets = torch.randn(8, 3), torch.randint(3, (8,))
    focal = FocalLoss(gamma=1.5)
    torch.testing.assert_close(focal(logits, targets), focal(logits, F.one_hot(targets, 3).float()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradients_are_finite_at_certainty_right_and_wrong(gamma):
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    FocalLoss(gamma)(logits, torch.tensor([0, 0])).backward()
    assert logits.grad.isfinite().all()


def test_gradient_by_finite_differences():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 1])
    assert torch.autograd.gradcheck(lambda x: FocalLoss(gamma=1.5)(x, targets), logits)


def test_weight_is_a_buffer_like_that_of_cross_entropy():
    assert FocalLoss().state_dict() == {}
    assert FocalLoss().weight is None
    assert FocalLoss(weight=WEIGHT).state_dict()["weight"].tolist() == WEIGHT
    late = FocalLoss()
    late.weight = torch.tensor(WEIGHT)
    assert "weight" in late.state_dict()


def test_mistakes_in_its_arguments_are_told():
    with pytest.raises(ValueError, match="gamma is -1"):
        FocalLoss(gamma=-1)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        FocalLoss(label_smoothing=1.5)
