"""Networks in which an architecture is searched, and the search space of DARTS."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_automl.models.derivation import Edges, cell_edges
from lightning_automl.models.genotype import Genotype
from lightning_automl.models.genotype_network import SMALLEST, GenotypeNetwork, check_size
from lightning_automl.models.layers import Norm, check_counts, check_images, norm_layer
from lightning_automl.models.nasbench201 import NasBench201Network
from lightning_automl.models.ops import DARTS_OPERATIONS, OPS, operation
from lightning_automl.models.relaxations import Mixture, Relaxation, SoftmaxRelaxation
from lightning_automl.models.search_cell import MixedOp, SearchCell, mix
from lightning_automl.rundir import UserError

__all__ = ["CellSpace", "DartsSpace", "MixedOp", "SearchCell", "Supernet", "copy_shared_weights", "mix"]


class Supernet(nn.Module, ABC):
    """A network with all candidate operations, whose architecture is described by parameters.

    A space of your own is a subclass with ``alphas``, ``genotype`` and the usual ``forward``; operations and wiring
    are its own matter. What :class:`CellSpace` has beyond that (``strengths``, ``edges``, ``mixed_ops``, …) lets tasks
    and callbacks do more with it: expected cost, pictures, limits.
    """

    @abstractmethod
    def alphas(self) -> list[nn.Parameter]:
        """All architecture parameters, which the weight optimiser never sees."""

    def weights(self) -> list[nn.Parameter]:
        """What the weight optimiser trains: all other parameters that require a gradient.

        Raises:
            UserError: If there are no alphas, or some are no parameters of the network: they would be neither trained
                nor saved with it.
        """
        alphas = {id(parameter) for parameter in self.alphas()}
        if not alphas or not alphas <= {id(parameter) for parameter in self.parameters()}:
            raise UserError(
                f"alphas() of {type(self).__name__} has to give one or more nn.Parameter that are attributes of the "
                "network, the same ones at every call"
            )
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in alphas]

    @abstractmethod
    def genotype(self) -> Genotype:
        """The architecture that the parameters stand for now."""


def check_operations(operations: Sequence[str]) -> None:
    """Raise a UserError if edges with these operations leave nothing to choose."""
    for name in operations:
        operation(name)
    twice = sorted({name for name in operations if list(operations).count(name) > 1})
    if twice:
        raise UserError(f"operations has {', '.join(twice)} twice; name each operation once")
    if len(operations) < 2 or set(operations) == {"none"}:
        raise UserError(
            f"operations is {list(operations)}, which leaves nothing to choose; give two or more of {', '.join(OPS)}"
        )


class CellSpace(Supernet):
    """What spaces of cells share: parameters by kind of cell, the relaxation's slot, and what is derived from them.

    A subclass builds its network, with ``cells`` that have a ``kind``, ``edges`` and a ``wiring`` (others may stand
    between them), and asks ``mixtures()`` once a forward pass.

    Args:
        edges: The wiring of each kind of cell.
        operations: Names of the operations of every edge.
        relaxation: How they are mixed; ``None`` is a new :class:`SoftmaxRelaxation`.

    Attributes:
        architecture: The architecture parameters, by kind and name.
    """

    cells: nn.ModuleList

    def __init__(self, edges: Mapping[str, Edges], operations: Sequence[str], relaxation: Relaxation | None) -> None:
        super().__init__()
        check_operations(operations)
        self.edges = dict(edges)
        self.operations = tuple(operations)
        if not isinstance(relaxation, Relaxation | None):
            raise UserError(f"relaxation is {relaxation!r}; give a Relaxation, such as PartialChannels(k=4), or none")
        self.relaxation = SoftmaxRelaxation() if relaxation is None else relaxation
        self.architecture = nn.ModuleDict(
            {
                kind: nn.ParameterDict(self.relaxation.initial(wiring, self.operations))
                for kind, wiring in self.edges.items()
            }
        )

    def alphas(self) -> list[nn.Parameter]:
        """All architecture parameters, betas included."""
        return list(self.architecture.parameters())

    def parameters_of(self, kind: str) -> dict[str, Tensor]:
        """The architecture parameters of one kind of cell by name."""
        parameters: Any = self.architecture[kind]
        return dict(parameters.items())

    def mixtures(self) -> dict[str, Mixture]:
        """The weights of one forward pass, the same for all cells of a kind."""
        return {kind: self.relaxation.mixture(self.parameters_of(kind), wiring) for kind, wiring in self.edges.items()}

    def strengths(self) -> dict[str, Tensor]:
        """How much each operation counts ``(E, O)``, by kind of cell, differentiable."""
        return {
            kind: self.relaxation.strengths(self.parameters_of(kind), wiring) for kind, wiring in self.edges.items()
        }

    def penalty(self) -> Tensor | None:
        """The relaxation's penalties of all kinds of cells, or ``None``."""
        penalties = [self.relaxation.penalty(self.parameters_of(kind)) for kind in self.edges]
        present = [penalty for penalty in penalties if penalty is not None]
        return torch.stack(present).sum() if present else None

    def mixed_ops(self) -> Iterator[tuple[str, int, int, MixedOp]]:
        """Kind of cell, number of cell, number of edge, and what is on it."""
        cell: Any
        for number, cell in enumerate(self.cells):
            for edge, mixed in enumerate(getattr(cell, "edges", ())):
                yield cell.kind, number, edge, mixed

    def derive(self, forbidden: Mapping[str, Tensor] | None = None, **options: Any) -> dict[str, Any]:
        """The chosen edges of each kind of cell, see :func:`~lightning_automl.models.derivation.strongest`."""
        return {
            kind: self.relaxation.derive(
                self.parameters_of(kind), wiring, self.operations, forbidden=(forbidden or {}).get(kind), **options
            )
            for kind, wiring in self.edges.items()
        }


class DartsSpace(CellSpace):
    """The search space of DARTS: a stack of cells in which every node may see all before it.

    Liu, Simonyan and Yang, ICLR 2019, https://arxiv.org/abs/1806.09055 (section 2.1); the cells at a third and two
    thirds of the depth are reductions, which double the channels.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a square image, or height and width, for a check only; any size of 4 or more will do.
        channels: Channels of a node in the first cells.
        cells: Cells in all, 3 or more.
        nodes: Nodes of a cell beside its two inputs.
        stem_multiplier: Channels of the stem in multiples of ``channels``.
        operations: Names of the candidates of every edge.
        relaxation: How they are mixed; ``None`` is a new :class:`SoftmaxRelaxation`.
        norm: ``batch``, ``group`` or ``sync_batch``.
        affine: Whether norms inside cells scale and shift; DARTS's do not while it searches.
        max_skips: At most so many ``skip_connect`` in a derived cell of either kind.
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
        cells: int = 8,
        nodes: int = 4,
        stem_multiplier: int = 3,
        operations: Sequence[str] = DARTS_OPERATIONS,
        relaxation: Relaxation | None = None,
        norm: Norm = "batch",
        affine: bool = False,
        max_skips: int | None = None,
        fused: bool = True,
    ) -> None:
        check_counts(num_classes=num_classes, in_channels=in_channels, channels=channels)
        check_counts(3, cells=cells)
        check_counts(nodes=nodes, stem_multiplier=stem_multiplier)
        check_counts(0, max_skips=0 if max_skips is None else max_skips)
        if channels % 2:
            raise UserError(f"channels is {channels}; it must be even, as half of them come from every other pixel")
        if image_size is not None:
            check_size(image_size, SMALLEST)
        wiring = cell_edges(2, nodes)
        super().__init__({"normal": wiring, "reduce": wiring}, operations, relaxation)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.channels = channels
        self.nodes = nodes
        self.stem_multiplier = stem_multiplier
        self.norm = norm
        self.max_skips = max_skips

        def make_norm(channels: int) -> nn.Module:
            return norm_layer(norm, channels, affine=affine)

        width = stem_multiplier * channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), norm_layer(norm, width))
        inputs, halve = (width, width), False
        self.cells = nn.ModuleList()
        for index in range(cells):
            reduction = index in (cells // 3, 2 * cells // 3)
            channels = 2 * channels if reduction else channels
            self.cells.append(
                SearchCell(
                    inputs, channels, wiring, self.operations, self.relaxation, make_norm, reduction, halve, fused
                )
            )
            inputs, halve = (inputs[1], nodes * channels), reduction
        self.classifier = nn.Linear(inputs[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels)
        check_size((images.shape[2], images.shape[3]), SMALLEST)
        mixtures = self.mixtures()
        state0 = state1 = self.stem(images)
        cell: Any
        for cell in self.cells:
            state0, state1 = state1, cell(state0, state1, mixtures[cell.kind])
        logits: Tensor = self.classifier(state1.mean((2, 3)))
        return logits

    def genotype(self, forbidden: Mapping[str, Tensor] | None = None) -> Genotype:
        """The two strongest edges into every node, and the strongest operation on each.

        Args:
            forbidden: By kind of cell, which operations may not be chosen, bool ``(E, O)``.
        """
        chosen = self.derive(forbidden, max_skips=self.max_skips)
        concat = tuple(range(2, 2 + self.nodes))
        return Genotype(chosen["normal"], concat, chosen["reduce"], concat, operations=self.operations)

    def network(self, genotype: Genotype | None = None, **options: Any) -> GenotypeNetwork:
        """The network of a genotype, of the same size; untrained.

        Args:
            genotype: ``None`` is the current one.
            options: Other arguments of :class:`~lightning_automl.models.genotype_network.GenotypeNetwork`;
                ``affine=False, pool_norm=True`` gives what the search computes for that genotype.
        """
        arguments: dict[str, Any] = {
            "channels": self.channels,
            "cells": len(self.cells),
            "stem_multiplier": self.stem_multiplier,
            "norm": self.norm,
        }
        return GenotypeNetwork(
            self.num_classes, self.in_channels, genotype=genotype or self.genotype(), **arguments | options
        )


def copy_shared_weights(supernet: CellSpace, network: GenotypeNetwork | NasBench201Network) -> None:
    """Give the network of a genotype the weights and statistics that it has in the space.

    What the space does not have, such as the scales of norms or an auxiliary head, keeps its values.

    Args:
        supernet: A space.
        network: What its ``network`` built, of any genotype.
    """
    for name, module in network.named_children():
        if name != "cells" and hasattr(supernet, name):
            module.load_state_dict(getattr(supernet, name).state_dict(), strict=False)
    cell: Any
    source: Any
    for cell, source in zip(network.cells, supernet.cells, strict=True):
        if not hasattr(cell, "wires"):
            cell.load_state_dict(source.state_dict())
            continue
        for name, module in cell.named_children():
            if name != "operations":
                module.load_state_dict(getattr(source, name).state_dict(), strict=False)
        edges = {pair: edge for edge, pair in enumerate(zip(source.wiring.sources, source.wiring.targets, strict=True))}
        for wire, module in zip(cell.wires, cell.operations, strict=True):
            mixed = source.edges[edges[wire.source, wire.target]]
            module.load_state_dict(mixed.operations[wire.operation].state_dict(), strict=False)
