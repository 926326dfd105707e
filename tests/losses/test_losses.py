"""What holds for every loss that ``lightning_automl.losses`` exports; a new one joins by being exported."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_automl import losses


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", losses.__all__)
def test_a_loss_is_a_finite_scalar_with_finite_gradients(name, dtype, soft):
    logits = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    targets = torch.randn(6, 4).softmax(1) if soft else torch.randint(4, (6,))
    loss = getattr(losses, name)()(logits, targets)
    assert loss.shape == ()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", losses.__all__)
def test_the_right_label_costs_less_than_the_wrong_one(name):
    loss = getattr(losses, name)()
    logits = torch.tensor([[3.0, -3.0]])
    assert loss(logits, torch.tensor([0])) < loss(logits, torch.tensor([1]))


@pytest.mark.parametrize("name", losses.__all__)
def test_the_command_line_parses_every_loss_and_its_weight(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "loss")
    given = {"class_path": f"lightning_automl.losses.{name}", "init_args": {"weight": [1, 2.5]}}
    config = parser.parse_string(parser.dump(parser.parse_object({"loss": given})))
    assert parser.instantiate(config).loss.weight.tolist() == [1.0, 2.5]
