"""The relaxation of DARTS-: a second skip beside the operations, which fades away."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_automl.models.derivation import Edges
from lightning_automl.models.relaxations.relaxation import Mixture, Relaxation, share
from lightning_automl.rundir import UserError

Schedule = Literal["linear", "cosine"]


class AuxiliarySkip(Relaxation):
    """DARTS's mixture plus ``beta`` times a skip of the edge's own, so that ``skip_connect`` need not help training.

    Chu et al., *DARTS-: Robustly Stepping out of Performance Collapse Without Indicators*, ICLR 2021,
    https://arxiv.org/abs/2009.01027 (equation 3). The auxiliary skip is a factorised reduction where the stride is 2;
    it is no candidate, and the genotype does not depend on it.

    Args:
        beta: Weight of the auxiliary skip in epoch 0, 0 or more.
        schedule: ``linear`` or ``cosine``: how it goes to 0, which it would reach after the last epoch.

    Raises:
        UserError: If ``beta`` is negative or the schedule unknown.
    """

    auxiliary_skip = True
    #: The weight in this epoch, in checkpoints too.
    current: Tensor

    def __init__(self, beta: float = 1.0, schedule: Schedule = "linear") -> None:
        super().__init__()
        if not beta >= 0:
            raise UserError(f"beta is {beta}; the weight of the auxiliary skip must be 0 or more")
        if schedule not in get_args(Schedule):
            raise UserError(f"unknown schedule {schedule!r}; known: {', '.join(get_args(Schedule))}")
        self.beta = beta
        self.schedule = schedule
        self.register_buffer("current", torch.tensor(float(beta)))
        self._weight = beta  # the same number; reading it from a device would wait for the device
        self.register_load_state_dict_post_hook(_read_weight)  # type: ignore[no-untyped-call]

    def at(self, epoch: int, epochs: int) -> None:
        """Let the weight go from ``beta`` in epoch 0 to 0 in epoch ``epochs``.

        It rises again when a search goes on with more epochs.
        """
        passed = share(epoch, epochs)
        left = 1 - passed if self.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
        self._weight = self.current.fill_(self.beta * left).item()

    def mixture(self, parameters: Mapping[str, Tensor], edges: Edges) -> Mixture:
        """Softmax of ``alpha`` over operations, beside the skip."""
        return Mixture(parameters["alpha"].softmax(-1), skip=self._weight)


def _read_weight(relaxation: AuxiliarySkip, keys: object) -> None:
    relaxation._weight = relaxation.current.item()
