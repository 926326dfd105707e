"""The relaxation of GDAS: one operation of each edge, sampled so that its weight is differentiable."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_automl.models.derivation import Edges
from lightning_automl.models.relaxations.relaxation import Mixture, Relaxation, share
from lightning_automl.rundir import UserError


class GumbelSoftmax(Relaxation):
    """In each forward pass one sampled operation of each edge runs; all cells of a kind run the same ones.

    Dong and Yang, *Searching for a Robust Neural Architecture in Four GPU Hours*, CVPR 2019,
    https://arxiv.org/abs/1910.04465 (equations 3 to 6): with ``p = softmax((log softmax(alpha) + G) / tau)`` and
    Gumbel noise ``G`` the weights are ``onehot(argmax p)`` in value and have the gradient of ``p``. Only the chosen
    operation's output enters the loss, as in the paper; the released code adds the weights of the others to the
    feature map as numbers, which puts a term without meaning into the gradient and is left out.

    In evaluation mode the operation of the largest alpha runs, without noise. An exported network computes all
    operations, as it cannot choose by a value.

    Args:
        tau: Temperature in the first epoch, above 0.
        tau_end: Temperature in the last epoch, above 0; linear in between.

    Raises:
        UserError: If a temperature is not above 0.
    """

    #: The temperature of this epoch, in checkpoints too.
    temperature: Tensor

    def __init__(self, tau: float = 10.0, tau_end: float = 0.1) -> None:
        super().__init__()
        for name, value in (("tau", tau), ("tau_end", tau_end)):
            if not value > 0:
                raise UserError(f"{name} is {value}; a temperature must be above 0")
        self.tau = tau
        self.tau_end = tau_end
        self.register_buffer("temperature", torch.tensor(float(tau)))

    def at(self, epoch: int, epochs: int) -> None:
        """Let the temperature go linearly from ``tau`` in epoch 0 to ``tau_end`` in the last one.

        It rises again when a search goes on with more epochs.
        """
        self.temperature.fill_(self.tau + (self.tau_end - self.tau) * share(epoch, epochs - 1))

    def mixture(self, parameters: Mapping[str, Tensor], edges: Edges) -> Mixture:
        """One-hot weights ``(E, O)`` with the gradient of the soft sample."""
        alpha = parameters["alpha"]
        if self.training:
            soft = ((alpha.log_softmax(-1) + self._noise(alpha)) / self.temperature.to(alpha.dtype)).softmax(-1)
        else:
            soft = alpha.softmax(-1)
        chosen = soft.detach().argmax(-1)
        # In this order the value is exactly one-hot: soft - soft is 0.
        weights = torch.zeros_like(soft).scatter_(-1, chosen[:, None], 1.0) + (soft - soft.detach())
        return Mixture(weights, chosen=None if torch.compiler.is_exporting() else tuple(chosen.tolist()))

    def _noise(self, alpha: Tensor) -> Tensor:
        """Gumbel noise, drawn on the CPU in float64, so that it is the same on every device and in every precision."""
        generator = torch.Generator().manual_seed(self.next_seed())
        exponential = torch.empty(alpha.shape, dtype=torch.float64).exponential_(generator=generator)
        return -exponential.clamp_min(1e-300).log().to(alpha.dtype).to(alpha.device)
