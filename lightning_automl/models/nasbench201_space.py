"""The search space of NAS-Bench-201."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_automl.models.derivation import Edges, cell_edges
from lightning_automl.models.genotype import Genotype
from lightning_automl.models.genotype_network import check_size
from lightning_automl.models.layers import Norm, check_counts, check_images, norm_layer
from lightning_automl.models.nasbench201 import SMALLEST, NasBench201Network, ResidualReduction, stacked
from lightning_automl.models.ops import NASBENCH201_OPERATIONS, MakeNorm
from lightning_automl.models.relaxations import Mixture, Relaxation
from lightning_automl.models.search_cell import MixedOp, cell_nodes
from lightning_automl.models.supernet import CellSpace

#: Nodes of a cell beside its input.
NODES = 3


class NasBench201Space(CellSpace):
    """The space of NAS-Bench-201: one kind of cell with six edges, all of which stay.

    Dong and Yang, *NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search*, ICLR 2020,
    https://arxiv.org/abs/2001.00326 (figure 1); the network around the cells is that of
    :class:`~lightning_automl.models.nasbench201.NasBench201Network`. On every edge the operation with the largest
    strength is chosen, ``none`` included (section 5 of the paper), and pools have no norm of their own.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a square image, or height and width, for a check only; any size of 4 or more will do.
        channels: Channels of the first stage.
        cells_per_stage: Cells of each of the three stages.
        operations: Names of the candidates of every edge.
        relaxation: How they are mixed; ``None`` is a new
            :class:`~lightning_automl.models.relaxations.SoftmaxRelaxation`.
        norm: ``batch``, ``group`` or ``sync_batch``.
        affine: Whether norms inside cells scale and shift.
        fused: Compute all edges of a cell together, which gives the same and is faster.

    Raises:
        UserError: If an argument cannot be.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        channels: int = 16,
        cells_per_stage: int = 5,
        operations: Sequence[str] = NASBENCH201_OPERATIONS,
        relaxation: Relaxation | None = None,
        norm: Norm = "batch",
        affine: bool = False,
        fused: bool = True,
    ) -> None:
        check_counts(
            num_classes=num_classes, in_channels=in_channels, channels=channels, cells_per_stage=cells_per_stage
        )
        if image_size is not None:
            check_size(image_size, SMALLEST)
        wiring = cell_edges(1, NODES)
        super().__init__({"normal": wiring}, operations, relaxation)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.channels = channels
        self.cells_per_stage = cells_per_stage
        self.norm_name = norm
        make_norm: MakeNorm = partial(norm_layer, norm)
        cell_norm: MakeNorm = partial(norm_layer, norm, affine=affine)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), make_norm(channels))
        self.cells = stacked(
            lambda width: NasBench201SearchCell(width, wiring, self.operations, self.relaxation, cell_norm, fused),
            channels,
            cells_per_stage,
            make_norm,
        )
        self.norm = make_norm(4 * channels)
        self.classifier = nn.Linear(4 * channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels)
        check_size((images.shape[2], images.shape[3]), SMALLEST)
        mixture = self.mixtures()["normal"]
        features = self.stem(images)
        for cell in self.cells:
            features = cell(features) if isinstance(cell, ResidualReduction) else cell(features, mixture)
        features = torch.relu(self.norm(features))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits

    def genotype(self, forbidden: Mapping[str, Tensor] | None = None) -> Genotype:
        """The strongest operation of every edge.

        Args:
            forbidden: Under ``normal``, which operations may not be chosen, bool ``(6, O)``.
        """
        normal = self.derive(forbidden, edges_per_node=None, keep_none=True)["normal"]
        return Genotype(normal, (NODES,), inputs=1, operations=self.operations)

    def network(self, genotype: Genotype | None = None, **options: Any) -> NasBench201Network:
        """The network of a genotype, of the same size; untrained.

        Args:
            genotype: ``None`` is the current one.
            options: Other arguments of :class:`~lightning_automl.models.nasbench201.NasBench201Network`;
                ``affine=False`` gives what the search computes for that genotype.
        """
        arguments: dict[str, Any] = {
            "channels": self.channels,
            "cells_per_stage": self.cells_per_stage,
            "norm": self.norm_name,
        }
        return NasBench201Network(
            self.num_classes, self.in_channels, genotype=genotype or self.genotype(), **arguments | options
        )


class NasBench201SearchCell(nn.Module):
    """A cell with a mixture of operations on every edge, whose output is its last node.

    Args:
        channels: Channels of every node.
        wiring: The cell's edges.
        operations: Names of the operations of every edge.
        relaxation: Says whether channels are partial and whether edges have an auxiliary skip.
        norm: Makes a norm of so many channels.
        fused: Compute all edges together, see :func:`~lightning_automl.models.fused_cell.fused_mix`.
    """

    kind = "normal"

    def __init__(
        self,
        channels: int,
        wiring: Edges,
        operations: Sequence[str],
        relaxation: Relaxation,
        norm: MakeNorm,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.wiring = wiring
        self.fused = fused
        self.edges = nn.ModuleList(
            MixedOp(operations, channels, 1, norm, relaxation.partial, relaxation.auxiliary_skip, pool_norm=False)
            for _ in wiring.sources
        )

    def forward(self, features: Tensor, mixture: Mixture) -> Tensor:
        """Map ``(batch, channels, height, width)`` to the same shape."""
        return cell_nodes(self, [features], mixture)[-1]
