"""What an architecture costs: an expectation that alphas can make smaller, and a limit for what is found."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_automl.models.genotype import Genotype
from lightning_automl.models.limited_derivation import CellChoices, cheapest, strongest_within
from lightning_automl.models.operation_costs import (
    check_space,
    counted,
    latencies,
    load_latencies,
    measure_latencies,
)
from lightning_automl.rundir import UserError

Quantity = Literal["flops", "parameters", "latency"]

_UNITS: dict[str, str] = {"flops": "operations", "parameters": "parameters", "latency": "milliseconds"}
#: Costs are whole numbers, so that sums are exact and no precision of the run rounds them; latencies are nanoseconds.
_PER_UNIT = {"flops": 1, "parameters": 1, "latency": 1_000_000}


class ArchitectureCost(nn.Module):
    """Parameters, operations or time of the networks that a search may find: a penalty, a limit, or both.

    The penalty is ``weight * E / target``, added to the loss of the architecture, where ``E`` is the expected cost:
    that of a genotype whose edges and operations are drawn in proportion to their strengths ``s``. A node that keeps
    ``m`` of its edges costs ``m * sum_eo s_eo c_eo / sum_eo s_eo`` with the cost ``c_eo`` of operation ``o`` on edge
    ``e``, over its edges and those operations that a genotype may have. (``none`` is left out where it is never chosen:
    else alphas would flee to it, which makes no found network cheaper.) Where each node keeps all edges, and strengths
    add up to 1 on each, it is the sum of Cai, Zhu and Han, *ProxylessNAS*, ICLR 2019, https://arxiv.org/abs/1812.00332
    (section 3.3).

    The limit holds for every genotype: when the strongest one costs more, the operations are chosen whose strengths add
    up to the most within the limit.

    **What is counted** is the network that ``model.network(genotype)`` builds, of the size of the supernet; for another
    number of cells or channels another limit is right.

    * ``parameters``: those of that network, exactly; it has no auxiliary head.
    * ``flops``: floating-point operations of one image, exactly those of
      :func:`~lightning_automl.models.cost.flop_count`: convolutions and matrix products, a multiplication and its
      addition counted as **two**. Papers count multiply-adds (MAdds, MACs, often called FLOPs as well): their limit of
      600 million for mobile devices is ``limit: 1.2e9`` here.
    * ``latency``: milliseconds of one image, the sum of a table's, from a file or measured at the start. It is a model:
      operations are timed by themselves, so that it knows nothing of caches, of launches that overlap, or of what else
      the machine does. For ten random genotypes of :class:`~lightning_automl.models.DartsSpace` (8 cells, 16 channels,
      32 x 32 pixels; one thread of a CPU, processor time) the sum was 0.88 to 1.03 times what the whole network took,
      and for ten of :class:`~lightning_automl.models.NasBench201Space` 0.84 to 1.35 times; the orders of both agreed
      with rank correlations of 0.88 to 0.99. On a busy machine, which interrupts long passes more often than short
      ones, whole networks took 2 to 6 times the sum: measure on an idle one. On a GPU it was not tried.

    The table of costs is in the checkpoint, so that a resumed run goes on with the same numbers.

    Args:
        of: What is counted.
        weight: Of the penalty, 0 or more; 0 leaves it out.
        target: Cost that the penalty is measured in: with this expected cost it is ``weight``. None: the mean of the
            space, that of equal strengths.
        limit: The most that a genotype may cost: operations, parameters or milliseconds. None: anything.
        table: File of latencies, see :func:`~lightning_automl.models.operation_costs.save_latencies`; None: measured by
            the first process for all. Only for ``latency``.

    Attributes:
        unit: What costs are counted in.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> cost = ArchitectureCost("flops", limit=4e6)
        >>> cost.prepare(model, (1, 8, 8))  # doctest: +SKIP
        >>> cost.of_genotype(model, cost.within_limit(model)) <= 4e6  # doctest: +SKIP
        True
    """

    rest: Tensor
    image_shape: Tensor

    def __init__(
        self,
        of: Quantity = "flops",
        weight: float = 0.0,
        target: float | None = None,
        limit: float | None = None,
        table: str | None = None,
    ) -> None:
        super().__init__()
        if of not in get_args(Quantity):
            raise UserError(f"unknown cost of {of!r}; known: {', '.join(get_args(Quantity))}")
        if not 0 <= weight < float("inf"):
            raise UserError(f"weight is {weight}; it is a number from 0 on")
        for name, value in (("target", target), ("limit", limit)):
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}; it is a number of {_UNITS[of]} above 0, or null")
        if table is not None and of != "latency":
            raise UserError(f"table is given, but {of} are counted; leave it out, or set of to latency")
        self.of = of
        self.weight = weight
        self.target = target
        self.limit = limit
        self.table = table
        self.unit = _UNITS[of]
        #: The latencies as they were read or measured in this process, for :func:`save_latencies`.
        self.latencies: dict[str, Any] | None = None
        self._kinds: tuple[str, ...] = ()
        self._scale = 1.0  # whole units that the penalty is measured in

    def prepare(self, model: Any, image_shape: tuple[int, int, int], device: torch.device | None = None) -> None:
        """Find out what each operation on each edge costs, and check that the limit can be kept.

        All processes of a run have to call it. What a checkpoint has brought is kept.

        Args:
            model: The supernet.
            image_shape: ``(channels, height, width)`` of the images.
            device: Where latencies are measured; None: where the first parameter of the supernet is.

        Raises:
            UserError: If the space does not say what its operations are, the table of latencies is not one of this
                space, or no genotype keeps within the limit.
        """
        check_space(model)
        if not self._has_costs(model, image_shape):
            if self.of == "latency":
                name = f"the table {self.table}" if self.table else "the table of latencies"
                tables, rest = latencies(model, image_shape, self._latencies(model, image_shape, device), name)
            else:
                tables, rest = counted(model, image_shape, self.of)
            for kind, table in tables.items():
                self.register_buffer(f"{kind}_costs", table)
            self.register_buffer("rest", torch.tensor(rest))
            self.register_buffer("image_shape", torch.tensor(image_shape))
        self._kinds = tuple(model.edges)
        genotype: Genotype = model.genotype()
        may_be_none = _may_be_none(model)
        for kind in self._kinds:
            edges = model.edges[kind]
            targets = sorted(set(edges.targets))
            member = torch.tensor([[end == target for end in edges.targets] for target in targets])
            kept = torch.tensor([len(node) for node in genotype.nodes(kind)])  # type: ignore[arg-type]
            allowed = torch.tensor([name != "none" or may_be_none for name in model.operations])
            device_of_costs = self._costs(kind).device
            for name, values in (("member", member), ("kept", kept), ("allowed", allowed)):
                self.register_buffer(f"{kind}_{name}", values.to(device_of_costs), persistent=False)
        equal = {kind: torch.ones_like(self._costs(kind), dtype=torch.float64) for kind in self._kinds}
        per_unit = _PER_UNIT[self.of]
        self._scale = self.target * per_unit if self.target is not None else max(float(self._expected(equal, 1.0)), 1.0)
        self._check_limit(model)

    def _latencies(self, model: Any, image_shape: tuple[int, int, int], device: torch.device | None) -> dict[str, Any]:
        if self.table is not None:
            self.latencies = load_latencies(self.table)
            return self.latencies
        if device is None:
            device = next(model.parameters()).device
        if not (dist.is_available() and dist.is_initialized()):
            self.latencies = measure_latencies(model, image_shape, device=device)
            return self.latencies
        measured: list[Any] = [None]
        try:
            if dist.get_rank() == 0:
                measured = [measure_latencies(model, image_shape, device=device)]
        finally:  # the others wait, also when it failed
            dist.broadcast_object_list(measured, 0)
        if measured[0] is None:
            raise RuntimeError("the first process could not measure latencies; its message says why")
        self.latencies = measured[0]
        return measured[0]  # type: ignore[no-any-return]

    def _has_costs(self, model: Any, image_shape: tuple[int, int, int]) -> bool:
        """Whether a checkpoint, or an earlier call, has brought the costs of such images."""
        if self.known != image_shape:
            return False
        shapes = {kind: (len(edges.sources), len(model.operations)) for kind, edges in model.edges.items()}
        return all(
            hasattr(self, f"{kind}_costs") and self._costs(kind).shape == shape for kind, shape in shapes.items()
        )

    def _costs(self, kind: str) -> Tensor:
        costs: Tensor = getattr(self, f"{kind}_costs")
        return costs

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # The table of a checkpoint is taken up before, or instead of, any call of prepare.
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and (name in ("rest", "image_shape") or name.endswith("_costs")):
                self.register_buffer(name, torch.zeros_like(value, device=getattr(self, name, value).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_costs(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Take up the table that a checkpoint holds, if it holds one, before the checkpoint as a whole is loaded."""
        self._load_from_state_dict(state_dict, prefix, {}, False, [], [], [])

    @property
    def known(self) -> tuple[int, int, int] | None:
        """``(channels, height, width)`` of the images whose costs are known, by :meth:`prepare` or a checkpoint."""
        if not hasattr(self, "image_shape"):
            return None
        channels, height, width = self.image_shape.tolist()
        return channels, height, width

    def expected(self, model: Any) -> Tensor:
        """The expected cost, a scalar in ``unit``, differentiable in alphas."""
        return self._expected(self._strengths(model), 1.0 / _PER_UNIT[self.of])

    def penalty(self, model: Any) -> Tensor:
        """What is added to the loss of the architecture: a scalar, 0 with the weight 0."""
        if not self.weight:
            return torch.zeros((), device=self._device())
        return self.weight * self._expected(self._strengths(model), 1.0 / self._scale)

    def _expected(self, strengths: Mapping[str, Tensor], scale: float) -> Tensor:
        total: Tensor | float = 0.0
        dtype = torch.float32
        for kind, given in strengths.items():
            dtype = torch.promote_types(given.dtype, torch.float32)
            # Of a number of bits that costs of 10^12 do not overflow; and a product of few numbers, not a matrix
            # product, which autocast would do in bfloat16.
            member, allowed = getattr(self, f"{kind}_member"), getattr(self, f"{kind}_allowed")
            counted = given.to(dtype) * allowed
            costs = (counted * (self._costs(kind).to(dtype) * scale)).sum(1)
            weights = counted.sum(1)
            tiny = torch.finfo(dtype).tiny
            of_nodes = (member * costs).sum(1) / (member * weights).sum(1).clamp_min(tiny)
            total = total + (getattr(self, f"{kind}_kept") * of_nodes).sum()
        return total + self.rest.to(dtype) * scale

    def _strengths(self, model: Any) -> Mapping[str, Tensor]:
        if not self._kinds:
            raise RuntimeError("costs are not known yet; call prepare first")
        strengths: Mapping[str, Tensor] = model.strengths()
        return strengths

    def _device(self) -> torch.device:
        return self.rest.device if hasattr(self, "rest") else torch.device("cpu")

    def of_genotype(self, model: Any, genotype: Genotype) -> float:
        """The cost of ``model.network(genotype)``, in ``unit``.

        Raises:
            UserError: If the genotype has an edge or an operation that the space does not have.
        """
        return self._of_genotype(model, genotype) / _PER_UNIT[self.of]

    def _of_genotype(self, model: Any, genotype: Genotype) -> int:
        if not hasattr(self, "rest"):
            raise RuntimeError("costs are not known yet; call prepare first")
        total = int(self.rest)
        for kind, edges in model.edges.items():
            costs = self._costs(kind).tolist()
            numbers = {pair: edge for edge, pair in enumerate(zip(edges.sources, edges.targets, strict=True))}
            for target, node in enumerate(genotype.nodes(kind), edges.inputs):
                for name, source in node:
                    if (source, target) not in numbers or name not in model.operations:
                        raise UserError(
                            f"the genotype has {name} from node {source} to node {target}, which "
                            f"{type(model).__name__} does not have; give a genotype of this space"
                        )
                    total += costs[numbers[source, target]][model.operations.index(name)]
        return total

    def within_limit(self, model: Any) -> Genotype:
        """The genotype of the supernet, or, if it costs more than the limit, the strongest one that does not.

        Raises:
            UserError: If there is none.
        """
        genotype: Genotype = model.genotype()
        if self._fits(model, genotype):
            return genotype
        choice = strongest_within(self._choices(model), self._budget())
        if choice is None:
            self._check_limit(model)
            raise UserError("no genotype keeps within the limit; give a higher one")
        chosen = choice.edges()
        forbidden = {}
        for kind in self._kinds:
            table = torch.ones(self._costs(kind).shape, dtype=torch.bool)
            for (of_kind, edge), operation in chosen.items():
                if of_kind == kind:
                    table[edge, operation] = False
            forbidden[kind] = table
        genotype = model.genotype(forbidden=forbidden)
        if not self._fits(model, genotype):
            raise RuntimeError(
                f"{type(model).__name__} has chosen operations that were forbidden to keep within the limit"
            )
        return genotype

    def _fits(self, model: Any, genotype: Genotype) -> bool:
        return self.limit is None or self.of_genotype(model, genotype) <= self.limit

    def _budget(self) -> int:
        """What edges may cost together, such that the sum with the rest is no more than the limit."""
        assert self.limit is not None
        most = math.ceil(self.limit * _PER_UNIT[self.of])  # the product may be a little below the whole number it is
        while most / _PER_UNIT[self.of] > self.limit:
            most -= 1
        return most - int(self.rest)

    def _choices(self, model: Any) -> dict[str, CellChoices]:
        skip = model.operations.index("skip_connect") if "skip_connect" in model.operations else None
        strengths = model.strengths()
        return {
            kind: CellChoices(
                model.edges[kind],
                self._costs(kind).tolist(),
                strengths[kind].detach().cpu().double().tolist(),
                getattr(self, f"{kind}_allowed").tolist(),
                dict(zip(sorted(set(model.edges[kind].targets)), getattr(self, f"{kind}_kept").tolist(), strict=True)),
                skip,
                getattr(model, "max_skips", None),
            )
            for kind in self._kinds
        }

    def _check_limit(self, model: Any) -> None:
        if self.limit is None:
            return
        least = cheapest(self._choices(model))
        if least is None:
            return  # the space itself says so when it derives
        rest, smallest = int(self.rest), least.cost + int(self.rest)
        if smallest / _PER_UNIT[self.of] > self.limit:
            raise UserError(
                f"limit is {self._words(self.limit)}, but the cheapest architecture of this space costs "
                f"{self._words(smallest / _PER_UNIT[self.of])} ({self._words(rest / _PER_UNIT[self.of])} without what "
                "is on its edges); raise the limit, or give the space fewer channels or cells"
            )

    def _words(self, value: float) -> str:
        if self.of == "latency":
            return f"{value:.4g} milliseconds"
        for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
            if value >= size:
                return f"{value / size:.4g} {word} {self.unit}"
        return f"{value:.4g} {self.unit}"


def _may_be_none(model: Any) -> bool:
    """Whether a genotype of the space may have ``none``: it is asked for one that has nothing else."""
    if "none" not in model.operations:
        return False
    number = model.operations.index("none")
    forbidden = {}
    for kind, edges in model.edges.items():
        table = torch.ones(len(edges.sources), len(model.operations), dtype=torch.bool)
        table[:, number] = False
        forbidden[kind] = table
    try:
        model.genotype(forbidden=forbidden)
    except UserError:
        return False
    return True
