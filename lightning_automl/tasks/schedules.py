"""Learning-rate schedules over the whole run."""

from math import cos, pi

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_automl.rundir import UserError


class WarmupCosineLR(LRScheduler):
    """A linear rise, then half a cosine down; steps after every batch.

    Loshchilov and Hutter, *SGDR*, ICLR 2017, https://arxiv.org/abs/1608.03983 (equation 5, without restarts), after the
    gradual warm-up of Goyal et al. 2017, https://arxiv.org/abs/1706.02677 (section 2.2). With ``W`` steps of warm-up,
    step ``t`` (from 0) of it has ``(t + 1) / (W + 1)`` of the learning rate, step ``W`` all of it, and the last step of
    the run ``final`` of it; so does every step after that.

    Args:
        optimizer: Each of its parameter groups keeps its own learning rate as the peak.
        warmup: Share of the steps for the rise, in [0, 1); ``W`` is rounded to whole steps.
        final: Learning rate of the last step, as a share in [0, 1] of the peak.
        total_steps: Optimizer steps of the run; the task fills it in.

    Raises:
        UserError: If a value is outside its range, or ``total_steps`` is missing.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.05, final: float = 0.0, total_steps: int | None = None
    ) -> None:
        if total_steps is None:
            raise UserError(
                "WarmupCosineLR does not know total_steps; as the scheduler of a task it is told, elsewhere give the "
                "number of optimizer steps of the run"
            )
        if total_steps < 1:
            raise UserError(f"total_steps is {total_steps}; a run has 1 step or more")
        if not 0 <= warmup < 1:
            raise UserError(f"warmup is {warmup}; it is a share of the steps in [0, 1)")
        if not 0 <= final <= 1:
            raise UserError(f"final is {final}; it is a share of the learning rate in [0, 1]")
        self.warmup_steps = round(warmup * total_steps)
        self.last_step = total_steps - 1
        self.final = final
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group at the step that comes next."""
        share = self.share(self.last_epoch)
        return [base * share for base in self.base_lrs]

    def share(self, step: int) -> float:
        """The share of the peak learning rate at ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.last_step - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + cos(pi * progress)) / 2
