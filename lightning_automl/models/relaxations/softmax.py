"""The relaxation of DARTS: a softmax over the operations of an edge."""

from collections.abc import Mapping

from torch import Tensor

from lightning_automl.models.derivation import Edges
from lightning_automl.models.relaxations.relaxation import Mixture, Relaxation


class SoftmaxRelaxation(Relaxation):
    """Every operation runs, weighted by the softmax of its edge's alphas.

    Liu, Simonyan and Yang, *DARTS: Differentiable Architecture Search*, ICLR 2019, https://arxiv.org/abs/1806.09055
    (equation 2).
    """

    def mixture(self, parameters: Mapping[str, Tensor], edges: Edges) -> Mixture:
        """Softmax of ``alpha`` ``(E, O)`` over operations."""
        return Mixture(parameters["alpha"].softmax(-1))
