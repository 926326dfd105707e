"""The fast form of a cell of a search: the same function of the same parameters as one ``MixedOp`` an edge.

1. What the edges that leave one state share is computed once: ReLU, pools with their norms.
2. Every other operation is computed for all edges that leave a state together, side by side along the channels: one
   grouped convolution in place of ``E`` convolutions, one batch norm in place of ``E``. The weights of a cell are put
   together by one call.
3. The weight of an operation is the scale of its last norm, so that weighting needs no pass over the outputs, and its
   gradient comes with the norm's.
4. Depthwise convolutions keep what they convolve once, not ``E`` times, and their gradients take the forms that CPUs
   are fast at (:mod:`~lightning_automl.models.fused_depthwise`). On CPUs everything is channels_last.
5. ``none`` is not computed.

Operations and norms that are not known here, such as a user's own, run through their modules edge by edge, as do
operations one of whose convolutions has a hook. Hooks on other modules inside known operations do not run.

Letters: ``N`` images, ``C`` channels, ``E`` edges that leave a state, ``O`` operations, ``T`` terms that edges share.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.models.derivation import Edges
from lightning_automl.models.fused_depthwise import joined, layout_of, side_by_side
from lightning_automl.models.fused_norms import Norms, equal
from lightning_automl.models.fused_operations import State, Weights, applied, reduced, stages_of
from lightning_automl.models.ops import FactorizedReduce, Zero
from lightning_automl.models.relaxations import Mixture

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def fused_mix(states: Sequence[Tensor], edges: nn.ModuleList, wiring: Edges, mixture: Mixture) -> list[Tensor]:
    """All nodes of a cell, computed fast: the same as :func:`~lightning_automl.models.search_cell.mix`.

    Args:
        states: The input nodes.
        edges: A ``MixedOp`` for each edge.
        wiring: Sources and targets of the edges.
        mixture: Weights of operations and edges; all operations run.

    Returns:
        All nodes, the given ones first.
    """
    device = states[0].device.type
    bundles = {source: _Bundle(edges, wiring, source) for source in set(wiring.sources)}
    weights = Weights([group for bundle in bundles.values() for group in bundle.convolutions()], device)
    norms = Norms()
    operations = mixture.operations if mixture.edges is None else mixture.operations * mixture.edges[:, None]
    rows = torch.split(operations, 1)
    factors = None if mixture.edges is None else torch.split(mixture.edges, 1)
    sums = [_Sum() for _ in range(max(wiring.targets) + 1)]
    nodes: list[Tensor] = []
    for number, arrived in enumerate(sums):
        features = states[number] if number < wiring.inputs else arrived.total()
        layout = torch.channels_last if device == "cpu" else layout_of(features)
        nodes.append(features.contiguous(memory_format=layout))
        if number in bundles:
            bundle = bundles[number]
            # put in order by cat: an index would have to go to the device
            own = torch.cat([rows[edge] for edge in bundle.numbers])
            factor = None if factors is None else torch.cat([factors[edge] for edge in bundle.numbers])
            bundle.send(nodes[number], own, factor, mixture.skip, weights, norms, [sums[t] for t in bundle.targets])
    norms.remember()
    return nodes


class _Sum:
    """What has arrived at a node.

    Attributes:
        terms: Weighted outputs of operations.
        parted: The same in :func:`~lightning_automl.models.fused_depthwise.phases`.
        bypass: Channels that went past the operations, to be joined with their sum.
        skips: Auxiliary skips, of all channels.
        partial: One channel in so many went through the operations.
    """

    def __init__(self) -> None:
        self.terms: list[Tensor] = []
        self.parted: list[Tensor] = []
        self.bypass: list[Tensor] = []
        self.skips: list[Tensor] = []
        self.partial = 1

    def total(self) -> Tensor:
        """The node, ``(N, C, height, width)``."""
        if self.parted:
            self.terms.append(joined(_added(self.parted)))
        total = _added(self.terms)
        if self.bypass:
            joint = torch.cat([total, _added(self.bypass).to(total.dtype)], 1)
            total = F.channel_shuffle(joint, self.partial)
        return _added([total, *self.skips])


def _added(terms: list[Tensor]) -> Tensor:
    if len(terms) == 1:
        return terms[0]
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total


class _Bundle:
    """The ``E`` edges that leave one state.

    Args:
        edges: All edges of the cell.
        wiring: Theirs.
        source: The state's number.

    Attributes:
        numbers: Those of the edges.
        targets: Where they end.
        operations: Each operation as its ``E`` modules, with its stages if it has some.
    """

    def __init__(self, edges: nn.ModuleList, wiring: Edges, source: int) -> None:
        self.numbers = [number for number, start in enumerate(wiring.sources) if start == source]
        self.targets = [wiring.targets[number] for number in self.numbers]
        self.mixed: list[Any] = [edges[number] for number in self.numbers]
        modules = zip(*(mixed.operations.values() for mixed in self.mixed), strict=True)
        self.operations = [(each, stages_of(each)) for each in modules]
        self.auxiliary = tuple(mixed.auxiliary for mixed in self.mixed)

    def convolutions(self) -> list[Sequence[Any]]:
        """The convolutions that are computed side by side."""
        everything = [stages for _, stages in self.operations]
        return [group for stages in everything if stages for stage in stages for group in stage.convolutions]

    def send(
        self,
        features: Tensor,
        mixing: Tensor,
        factor: Tensor | None,
        skip: float,
        weights: Weights,
        norms: Norms,
        sums: Sequence[_Sum],
    ) -> None:
        """Add what the edges make of the state to their targets.

        Args:
            features: The state ``(N, C, height, width)``.
            mixing: What each operation is multiplied by, ``(E, O)``.
            factor: What each edge is multiplied by, ``(E,)``; it is in ``mixing`` already.
            skip: Weight of the auxiliary skips.
            weights: Of the cell.
            norms: Of the cell.
            sums: The targets' sums.
        """
        one = self.mixed[0]
        selected = features
        if one.partial > 1:
            selected = features[:, : one.channels // one.partial]
            bypass = features[:, one.channels // one.partial :]
            if one.stride == 2:
                bypass = F.max_pool2d(bypass, 2, ceil_mode=True)
            for edge, arrived in enumerate(sums):
                arrived.partial = one.partial
                arrived.bypass.append(bypass if factor is None else bypass * factor[edge])
        self._operate(selected.contiguous(memory_format=layout_of(features)), mixing, weights, norms, sums)
        if skip and self.auxiliary[0] is not None:
            for edge, (module, arrived) in enumerate(zip(self.auxiliary, sums, strict=True)):
                arrived.skips.append(module(features) * (skip if factor is None else skip * factor[edge]))

    def _operate(self, features: Tensor, mixing: Tensor, weights: Weights, norms: Norms, sums: Sequence[_Sum]) -> None:
        """Add what the operations make of the selected channels ``(N, C, height, width)``."""
        edges, channels = len(sums), features.shape[1]
        state = State(features, edges)
        columns = mixing.t().unbind()
        scales = mixing.t()[:, :, None].expand(-1, -1, channels).contiguous().flatten(1).unbind()  # O of (E * C,)
        terms: list[Tensor] = []  # each (N, E * C, height', width')
        parted: list[Tensor] = []
        shared: list[tuple[Tensor, Tensor]] = []
        for (modules, stages), column, scale in zip(self.operations, columns, scales, strict=True):
            kinds = {type(module) for module in modules}
            pool, own = _pool_and_norms(modules)
            if stages is not None and kinds == {FactorizedReduce}:
                terms.append(reduced(state.relu, stages, scale, weights, norms))
            elif stages is not None:
                out, apart = applied(state, stages, scale, weights, norms)
                (parted if apart else terms).append(out)
            elif kinds == {nn.Identity}:
                shared.append((features, column))
            elif pool is not None and equal(own):
                shared.append((norms.apply(pool(features), own), column))
            elif pool is not None:
                terms.append(norms.apply(side_by_side(pool(features), edges), own, scale))
            elif kinds != {Zero}:
                for module, weight, arrived in zip(modules, column.unbind(), sums, strict=True):
                    arrived.terms.append(module(features) * weight)
        for arrived, own_terms, own_parted, own_shared in zip(
            sums, _split(terms, edges), _split(parted, edges), _weighted(shared, edges), strict=True
        ):
            arrived.terms += own_terms + own_shared
            arrived.parted += own_parted
        if all(type(module) is Zero for modules, _ in self.operations for module in modules):
            for arrived in sums:
                arrived.terms.append(self.operations[0][0][0](features))


def _pool_and_norms(modules: Sequence[Any]) -> tuple[nn.Module | None, Sequence[nn.Module]]:
    """The pool that ``E`` operations are, and the norms behind it."""
    if all(type(module) in _POOLS for module in modules):
        return modules[0], [nn.Identity()] * len(modules)
    if all(type(module) is nn.Sequential and len(module) == 2 and type(module[0]) in _POOLS for module in modules):
        return modules[0][0], [module[1] for module in modules]
    return None, ()


def _split(terms: list[Tensor], edges: int) -> list[list[Tensor]]:
    """The sum of terms ``(N, E * C, height, width)``, as a list for each edge: empty if there is no term."""
    if not terms:
        return [[] for _ in range(edges)]
    total = terms[0]
    for term in terms[1:]:
        total += term  # in place: these are outputs of norms, which nobody keeps
    return [[part] for part in total.chunk(edges, 1)]


def _weighted(shared: list[tuple[Tensor, Tensor]], edges: int) -> list[list[Tensor]]:
    """The sum of ``T`` terms ``(N, C, height, width)``, for each edge with its own weights ``(E,)``."""
    if not shared:
        return [[] for _ in range(edges)]
    last = layout_of(shared[0][0]) is torch.channels_last
    rows = torch.stack([term.permute(0, 2, 3, 1) if last else term for term, _ in shared])
    mixed = torch.stack([column for _, column in shared], 1) @ rows.flatten(1)
    found = mixed.view(edges, *rows.shape[1:])
    return [[part.permute(0, 3, 1, 2) if last else part] for part in found.unbind()]
