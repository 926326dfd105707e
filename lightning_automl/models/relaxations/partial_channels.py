"""The relaxation of PC-DARTS: operations on a part of the channels, and weights of edges."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_automl.models.derivation import Edges
from lightning_automl.models.relaxations.relaxation import Mixture, Relaxation
from lightning_automl.rundir import UserError


class PartialChannels(Relaxation):
    """Operations see one channel in ``k``, the others pass by; the edges into a node compete by a softmax of betas.

    Xu et al., *PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search*, ICLR 2020,
    https://arxiv.org/abs/1907.05737 (equations 1 and 2). As in the released code the selected channels are the first
    ones, and a channel shuffle with ``k`` groups follows, so that others are the first at the next edge.

    Args:
        k: One channel in ``k`` is selected; it divides the channels of the space. With 1 all are.

    Raises:
        UserError: If ``k`` is below 1.
    """

    def __init__(self, k: int = 4) -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"k is {k}; one channel in k is selected, so it must be 1 or more")
        self.partial = k

    def initial(self, edges: Edges, operations: Sequence[str]) -> dict[str, Tensor]:
        """``alpha`` ``(E, O)`` and ``beta`` ``(E,)``, both from N(0, 1e-3²)."""
        return {**super().initial(edges, operations), "beta": 1e-3 * torch.randn(len(edges.sources))}

    def mixture(self, parameters: Mapping[str, Tensor], edges: Edges) -> Mixture:
        """Softmax of ``alpha`` over operations, and of ``beta`` over the edges into a node."""
        return Mixture(parameters["alpha"].softmax(-1), edge_weights(parameters["beta"], edges))

    def strengths(self, parameters: Mapping[str, Tensor], edges: Edges) -> Tensor:
        """The product of both, ``(E, O)``, by which the released code chooses."""
        return parameters["alpha"].softmax(-1) * edge_weights(parameters["beta"], edges)[:, None]


def edge_weights(beta: Tensor, edges: Edges) -> Tensor:
    """Softmax of ``beta`` ``(E,)`` over the edges into the same node, which follow each other."""
    fan_in = list(Counter(edges.targets).values())
    return torch.cat([part.softmax(0) for part in torch.split(beta, fan_in)])
