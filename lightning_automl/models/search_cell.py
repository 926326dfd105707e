"""Cells of a search: every edge is a mixture of operations."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.models.derivation import Edges
from lightning_automl.models.fused_cell import fused_mix
from lightning_automl.models.genotype_network import build_operation
from lightning_automl.models.ops import FactorizedReduce, MakeNorm, ReluConvNorm
from lightning_automl.models.relaxations import Mixture, Relaxation
from lightning_automl.rundir import UserError


class MixedOp(nn.Module):
    """One edge of a cell: all its operations, weighted and summed.

    Liu, Simonyan and Yang, ICLR 2019, https://arxiv.org/abs/1806.09055 (equation 2); with partial channels Xu et al.,
    ICLR 2020, https://arxiv.org/abs/1907.05737 (equation 1); with an auxiliary skip Chu et al., ICLR 2021,
    https://arxiv.org/abs/2009.01027 (equation 3).

    Args:
        operations: Names of operations.
        channels: Channels of the state, which are also those of the output.
        stride: 1, or 2 to halve the image.
        norm: Makes a norm of so many channels.
        partial: Only the first ``channels / partial`` channels go through the operations.
        auxiliary: Whether the edge has a skip beside its operations.
        pool_norm: Whether a norm follows pools, whose scale differs from that of the other operations.

    Raises:
        UserError: If the channels cannot be parted.
    """

    def __init__(
        self,
        operations: Sequence[str],
        channels: int,
        stride: int,
        norm: MakeNorm,
        partial: int = 1,
        auxiliary: bool = False,
        pool_norm: bool = True,
    ) -> None:
        super().__init__()
        if channels % partial:
            raise UserError(
                f"one channel in {partial} is to go through the operations, but {channels} channels are not divisible "
                f"by {partial}; change channels or k"
            )
        self.channels = channels
        self.stride = stride
        self.partial = partial
        self.operations = nn.ModuleDict(
            {name: build_operation(name, channels // partial, stride, norm, pool_norm) for name in operations}
        )
        self.auxiliary: nn.Module | None = None
        if auxiliary:
            self.auxiliary = nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, norm)

    def forward(
        self,
        features: Tensor,
        weights: Tensor,
        edge: Tensor | None = None,
        skip: float = 0.0,
        chosen: int | None = None,
    ) -> Tensor:
        """Map ``(batch, channels, height, width)`` to the same, or to half the size, rounded up.

        Args:
            features: The state at which the edge starts.
            weights: One number an operation, ``(O,)``.
            edge: What the edge is multiplied by, a scalar; ``None`` is 1.
            skip: Weight of the auxiliary skip.
            chosen: The one operation that runs; ``None``: all run.
        """
        selected = features[:, : self.channels // self.partial]
        pairs = list(zip(weights.unbind(), self.operations.values(), strict=True))
        if chosen is not None:
            pairs = [pairs[chosen]]
        mixed: Tensor = reduce(torch.add, (weight * module(selected) for weight, module in pairs))
        if self.partial > 1:
            bypass = features[:, self.channels // self.partial :]
            if self.stride == 2:
                bypass = F.max_pool2d(bypass, 2, ceil_mode=True)
            mixed = F.channel_shuffle(torch.cat([mixed, bypass.to(mixed.dtype)], 1), self.partial)
        if self.auxiliary is not None and skip:
            mixed = mixed + skip * self.auxiliary(features)
        return mixed if edge is None else edge * mixed


class SearchCell(nn.Module):
    """A cell with a mixture of operations on every edge.

    Args:
        inputs: Channels of the outputs of the cell before the last one, and of the last one.
        channels: Channels of every node of this cell.
        wiring: The cell's edges.
        operations: Names of the operations of every edge.
        relaxation: Says whether channels are partial and whether edges have an auxiliary skip.
        norm: Makes a norm of so many channels.
        reduction: Whether edges from the inputs halve the image.
        halve: Whether the cell before was a reduction, so that the first input is twice as large as the second.
        fused: Compute all edges together, see :func:`~lightning_automl.models.fused_cell.fused_mix`.
    """

    def __init__(
        self,
        inputs: tuple[int, int],
        channels: int,
        wiring: Edges,
        operations: Sequence[str],
        relaxation: Relaxation,
        norm: MakeNorm,
        reduction: bool = False,
        halve: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.wiring = wiring
        self.reduction = reduction
        self.kind = "reduce" if reduction else "normal"
        self.fused = fused
        self.preprocess0 = (
            FactorizedReduce(inputs[0], channels, norm) if halve else ReluConvNorm(inputs[0], channels, 1, 1, norm)
        )
        self.preprocess1 = ReluConvNorm(inputs[1], channels, 1, 1, norm)
        self.edges = nn.ModuleList(
            MixedOp(
                operations,
                channels,
                2 if reduction and source < wiring.inputs else 1,
                norm,
                relaxation.partial,
                relaxation.auxiliary_skip,
            )
            for source in wiring.sources
        )

    def forward(self, state0: Tensor, state1: Tensor, mixture: Mixture) -> Tensor:
        """Map the outputs of the two cells before to ``(batch, nodes * channels, height, width)``."""
        state0, state1 = self.preprocess0(state0), self.preprocess1(state1)
        states = cell_nodes(self, [state0, state1], mixture)
        return torch.cat(states[self.wiring.inputs :], 1)


def cell_nodes(cell: Any, states: Sequence[Tensor], mixture: Mixture) -> list[Tensor]:
    """All nodes of a cell, the inputs first: computed fast if the cell is ``fused`` and not one operation is chosen.

    What is compiled or exported is the readable form: a compiler does its own fusing, and cannot keep apart the
    statistics that the fast form has in one tensor; and an exported network's number of images can be left open.
    """
    nodes = fused_mix if cell.fused and mixture.chosen is None and not torch.compiler.is_compiling() else mix
    return nodes(states, cell.edges, cell.wiring, mixture)


def mix(states: Sequence[Tensor], edges: nn.ModuleList, wiring: Edges, mixture: Mixture) -> list[Tensor]:
    """The readable form of a cell: one :class:`MixedOp` an edge, and the sum of the edges into a node.

    Args:
        states: The input nodes.
        edges: A MixedOp for each of the ``E`` edges.
        wiring: Their sources and targets.
        mixture: Their weights.

    Returns:
        All nodes, the given ones first.
    """
    nodes = list(states)
    ones = [None] * len(edges)
    chosen = mixture.chosen or ones
    scales = ones if mixture.edges is None else mixture.edges.unbind()
    for edge, weights in enumerate(mixture.operations.unbind()):
        source, target = wiring.sources[edge], wiring.targets[edge]
        output = edges[edge](nodes[source], weights, scales[edge], mixture.skip, chosen[edge])
        if target == len(nodes):
            nodes.append(output)
        else:
            nodes[target] = nodes[target] + output
    return nodes
