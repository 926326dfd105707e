import io
from math import cos, pi

import pytest
import torch
from torch import nn

from lightning_automl.tasks.schedules import WarmupCosineLR


def optimizer(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(scheduler, steps, group=0):
    """The learning rate of each step."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[group]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_a_whole_run_by_hand():
    # 4 of 9 steps rise by a fifth each; 4 more steps make the half cosine
    expected = [0.2, 0.4, 0.6, 0.8, 1.0] + [(1 + cos(pi * quarter / 4)) / 2 for quarter in (1, 2, 3, 4)]
    assert rates(WarmupCosineLR(optimizer(1.0), warmup=0.44, total_steps=9), 9) == pytest.approx(expected)


def test_without_warm_up_it_is_torch_s_cosine():
    ours, theirs = optimizer(0.3), optimizer(0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=9, eta_min=0.03)
    expected = rates(scheduler, 10)
    assert rates(WarmupCosineLR(ours, warmup=0.0, final=0.1, total_steps=10), 10) == pytest.approx(expected)


def test_every_group_keeps_its_own_peak():
    scheduler = WarmupCosineLR(optimizer(1.0, 0.1), total_steps=40, final=0.25)
    assert scheduler.get_last_lr() == pytest.approx([1 / 3, 0.1 / 3])
    second = rates(scheduler, 40, group=1)
    assert max(second) == pytest.approx(0.1)
    assert second[-1] == pytest.approx(0.025)


def test_after_the_last_step_it_stays():
    seen = rates(WarmupCosineLR(optimizer(2.0), final=0.1, total_steps=5), 9)
    assert seen[4:] == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_very_short_runs_stay_in_range(total_steps, warmup):
    seen = rates(WarmupCosineLR(optimizer(1.0), warmup, total_steps=total_steps), total_steps)
    assert all(0 <= rate <= 1 for rate in seen)
    assert seen[0] > 0


def test_a_resumed_schedule_goes_on_as_if_uninterrupted():
    whole = rates(WarmupCosineLR(optimizer(1.0, 0.1), total_steps=20), 20)
    first = WarmupCosineLR(optimizer(1.0, 0.1), total_steps=20)
    seen = rates(first, 8)
    file = io.BytesIO()
    torch.save([first.state_dict(), first.optimizer.state_dict()], file)
    file.seek(0)
    schedule, weights = torch.load(file, weights_only=True)
    second = WarmupCosineLR(optimizer(1.0, 0.1), total_steps=20)
    second.optimizer.load_state_dict(weights)
    second.load_state_dict(schedule)
    assert seen + rates(second, 12) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "does not know total_steps"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 9, "warmup": 1.0}, r"warmup is 1\.0"),
        ({"total_steps": 9, "final": -0.1}, r"final is -0\.1"),
    ],
    ids=str,
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosineLR(optimizer(1.0), **arguments)
