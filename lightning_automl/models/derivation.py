"""From the strengths of all operations on all edges of a cell to the few that stay."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_automl.models.genotype import Edge
from lightning_automl.rundir import UserError


class Edges(NamedTuple):
    """The edges of a cell before anything is chosen, targets ascending and, of one target, sources ascending.

    Attributes:
        sources: Number of the node where each edge begins.
        targets: Number of the node where it ends.
        inputs: The nodes below this number are inputs of the cell.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    inputs: int


def cell_edges(inputs: int, nodes: int) -> Edges:
    """All edges of a cell whose nodes each see every node before them.

    Liu, Simonyan and Yang, *DARTS*, ICLR 2019, https://arxiv.org/abs/1806.09055 (section 2.1): 2 inputs and 4 nodes
    have 2 + 3 + 4 + 5 = 14 edges.

    Args:
        inputs: Input nodes, at least 1; they have the numbers 0 to ``inputs - 1``.
        nodes: Nodes that are computed, at least 1.

    Raises:
        UserError: If there is no input or no node.
    """
    for name, value in (("inputs", inputs), ("nodes", nodes)):
        if value < 1:
            raise UserError(f"{name} is {value}; a cell has at least 1")
    pairs = [(source, target) for target in range(inputs, inputs + nodes) for source in range(target)]
    return Edges(tuple(source for source, _ in pairs), tuple(target for _, target in pairs), inputs)


def strongest(
    strengths: Tensor,
    edges: Edges,
    operations: Sequence[str],
    *,
    edges_per_node: int | None = 2,
    max_skips: int | None = None,
    forbidden: Tensor | None = None,
    keep_none: bool = False,
) -> tuple[tuple[Edge, ...], ...]:
    """Keep the strongest edges of each node, each with its strongest operation.

    Liu, Simonyan and Yang, *DARTS*, ICLR 2019, https://arxiv.org/abs/1806.09055 (section 2.4). The operation ``none``
    takes part in the softmax that gives the strengths, but is never chosen, as in the authors' code. Of equal strengths
    the lower source wins, on one edge the operation that comes first.

    A limit on skip connections is that of Chen et al., *Progressive DARTS*, ICCV 2019,
    https://arxiv.org/abs/1904.12760 (section 3.3): the weakest one too many is taken out and the cell derived again,
    so that another operation of its edge or another edge takes its place.

    Args:
        strengths: ``(E, O)``, on any device, larger is stronger.
        edges: The ``E`` edges.
        operations: Names of the ``O`` operations.
        edges_per_node: How many edges of a node stay (all, when it has fewer); None: all of them.
        max_skips: At most so many ``skip_connect`` in the cell; None: any number.
        forbidden: ``(E, O)``, bool: what may not be chosen.
        keep_none: Whether ``none`` may be chosen, as in NAS-Bench-201, where every edge stays.

    Returns:
        For each node its edges, the strongest first.

    Raises:
        UserError: If shapes do not fit, or what is forbidden leaves too few edges.
        RuntimeError: If a strength is not finite.
    """
    names = list(operations)
    shape = (len(edges.sources), len(names))
    if tuple(strengths.shape) != shape:
        raise UserError(
            f"strengths have the shape {tuple(strengths.shape)}, but {shape[0]} edges and {shape[1]} operations make "
            f"{shape}; give one strength an edge and operation"
        )
    if forbidden is not None and tuple(forbidden.shape) != shape:
        raise UserError(f"forbidden has the shape {tuple(forbidden.shape)} instead of {shape}, as the strengths")
    for name, value, least in (("edges_per_node", edges_per_node, 1), ("max_skips", max_skips, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; give at least {least}, or null for any number")
    table = strengths.detach().to("cpu", torch.float64)
    if not table.isfinite().all():
        raise RuntimeError("a strength is not finite: the architecture parameters have diverged")
    allowed = torch.ones(shape, dtype=torch.bool) if forbidden is None else ~forbidden.detach().cpu().bool()
    if not keep_none and "none" in names:
        allowed[:, names.index("none")] = False
    values: list[list[float]] = table.tolist()
    candidates: list[list[bool]] = allowed.tolist()

    while True:
        cell = _derive(values, candidates, edges, edges_per_node)
        chosen = [(edge, best) for node in cell for edge, best in node]
        skips = [(edge, best) for edge, best in chosen if names[best] == "skip_connect"]
        if max_skips is None or len(skips) <= max_skips:
            break
        # of equals the last edge goes
        edge, best = min(skips, key=lambda pair: (values[pair[0]][pair[1]], -pair[0]))
        candidates[edge][best] = False
    return tuple(tuple((names[best], edges.sources[edge]) for edge, best in node) for node in cell)


def _derive(
    values: list[list[float]], candidates: list[list[bool]], edges: Edges, edges_per_node: int | None
) -> list[list[tuple[int, int]]]:
    """For each node the chosen (edge, operation), as indices, the strongest first."""
    nodes = []
    for target in sorted(set(edges.targets)):
        incoming = [edge for edge, end in enumerate(edges.targets) if end == target]
        best: list[tuple[int, int]] = []
        for edge in incoming:
            known = [index for index, is_allowed in enumerate(candidates[edge]) if is_allowed]
            if known:
                best.append((edge, max(known, key=values[edge].__getitem__)))  # of equals the first
        best.sort(key=lambda pair: -values[pair[0]][pair[1]])  # stable: of equals the lower source
        needed = len(incoming) if edges_per_node is None else min(edges_per_node, len(incoming))
        if len(best) < needed:
            raise UserError(
                f"what is forbidden (also by max_skips) leaves node {target} with {len(best)} of its {needed} edges; "
                "allow more operations or more skip connections"
            )
        nodes.append(best[:needed])
    return nodes
