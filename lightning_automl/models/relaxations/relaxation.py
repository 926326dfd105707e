"""What a relaxation is: how the operations of a cell's edges are mixed while an architecture is searched."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_automl.models.derivation import Edges, strongest
from lightning_automl.models.genotype import Edge


class Mixture(NamedTuple):
    """The weights of one kind of cell in one forward pass; ``E`` edges, ``O`` operations.

    An edge gives ``edges * (sum over o of operations_o * o(x) + skip * auxiliary(x))``; with partial channels the
    sum is over operations of the first channels, joined with the others before the auxiliary skip is added.
    """

    #: What each operation's output is multiplied by, ``(E, O)``.
    operations: Tensor
    #: What each edge is multiplied by, ``(E,)``; ``None`` is 1.
    edges: Tensor | None = None
    #: The one operation of each edge that runs; ``None``: all run.
    chosen: tuple[int, ...] | None = None
    #: Weight of the auxiliary skip of every edge.
    skip: float = 0.0


class Relaxation(nn.Module, ABC):
    """Turns architecture parameters into the weights of operations, and at the end into a choice.

    A relaxation is a slot of a space: a new one is a subclass with ``mixture``, and whichever other method is not as
    below. It keeps no architecture parameters; the space does, one set a kind of cell, made by ``initial``.

    Attributes:
        partial: Only the first ``channels / partial`` channels of a state go through the operations (PC-DARTS).
        auxiliary_skip: Each edge has a skip of its own beside the operations (DARTS-).
    """

    partial: int = 1
    auxiliary_skip: bool = False
    _seed: int | None = None
    _drawn: int = 0

    def initial(self, edges: Edges, operations: Sequence[str]) -> dict[str, Tensor]:
        """Values with which the architecture parameters of one kind of cell start.

        Args:
            edges: The ``E`` edges of the cell.
            operations: The names of the ``O`` operations of every edge. A relaxation that cannot have one of them,
                such as ``none``, raises a UserError here.

        Returns:
            By name; here ``alpha`` ``(E, O)``, drawn from N(0, 1e-3²) as in the released code of DARTS.
        """
        return {"alpha": 1e-3 * torch.randn(len(edges.sources), len(operations))}

    @abstractmethod
    def mixture(self, parameters: Mapping[str, Tensor], edges: Edges) -> Mixture:
        """Weights for one forward pass, differentiable in the parameters; called once a kind of cell and pass."""

    def strengths(self, parameters: Mapping[str, Tensor], edges: Edges) -> Tensor:
        """How much each operation counts, ``(E, O)``, differentiable and without sampling.

        The genotype, the expected cost and the pictures are made of it. Here: softmax of ``alpha`` over operations.
        """
        return parameters["alpha"].softmax(-1)

    def derive(
        self, parameters: Mapping[str, Tensor], edges: Edges, operations: Sequence[str], **options: Any
    ) -> tuple[tuple[Edge, ...], ...]:
        """The edges to keep of each node, strongest first.

        Args:
            parameters: Architecture parameters of one kind of cell.
            edges: The edges of the cell.
            operations: The names of the operations of every edge.
            options: What the space asks for, see :func:`~lightning_automl.models.derivation.strongest`.
        """
        return strongest(self.strengths(parameters, edges).detach(), edges, operations, **options)

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar that is added to the loss of the architecture for each kind of cell, or ``None``."""
        return None

    def at(self, epoch: int, epochs: int) -> None:
        """Set what follows a schedule to its value in ``epoch`` of ``epochs``; a function of the two alone."""

    def draw(self, seed: int) -> None:
        """Make the noise of the next forward passes a function of ``seed``; all ranks give the same one."""
        self._seed = seed
        self._drawn = 0

    def next_seed(self) -> int:
        """A seed for noise, which is another at each call: of what ``draw`` was given, else of torch's own state.

        A relaxation that samples seeds with it, so that all ranks and a resumed run draw the same.
        """
        if self._seed is None:
            return int(torch.randint(2**62, ()))
        self._drawn += 1
        return (self._seed * 1_000_003 + self._drawn) % 2**63


def share(epoch: int, last: int) -> float:
    """Position of ``epoch`` on the way to ``last``, in [0, 1]; 0 when there is no way."""
    return min(max(epoch / last, 0.0), 1.0) if last > 0 else 0.0
