"""Low rank: compress a trained network by truncated singular value decompositions of its layers."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_automl.adapters.factorisation import (
    Form,
    LowRankConv2d,
    LowRankLinear,
    Spectrum,
    check_form,
    factorised,
    spectrum_of,
)
from lightning_automl.adapters.folding import (
    LAYERS,
    NORMS,
    Call,
    agree,
    evaluating,
    fold,
    fold_batchnorm,
    replace_module,
    trace,
)
from lightning_automl.rundir import UnsupportedError, UserError

#: Why a layer is left alone that came out of a factorisation.
_FACTOR = "it is a factor already"

#: Share of the squared singular values that is kept when nothing else is said.
ENERGY = 0.95


class _Configuration:
    """A parent that is no dataclass: jsonargparse 4.53 else mixes up dataclasses and classes with a ``class_path``."""


@dataclass
class LowRankConfig(_Configuration):
    """How a trained network is compressed: which layers, and to which ranks.

    One of ``energy``, ``flops`` and ``rank`` decides; without any, ``energy`` is 0.95. A layer is left alone where its
    factors would have as many parameters or operations as it has.

    Args:
        energy: In (0, 1]: each layer gets the smallest rank that keeps this share of its squared singular values.
        flops: In (0, 1): the network keeps at most this share of its operations. Ranks are those with the least sum of
            the layers' lost shares of squared singular values, up to what a Lagrange multiplier can reach.
        rank: The same rank for all.
        form: ``channel`` (k x k to r channels, then 1 x 1) or ``spatial`` (k x 1, then 1 x k) for convolutions.
        target_modules: ``auto`` (all but the layers that see the images and those that make the logits), ``conv``,
            ``linear`` or ``attention`` (of these, those of a kind), a regular expression that matches whole names, or a
            list of names or of their last parts.
        fold_batchnorm: Whether batch norms behind layers are made a part of them first.
        ranks: Ranks by the names of layers; then nothing is chosen. A report's ``plan`` has them.
        folded: Names of layers by those of the batch norms that are folded into them, likewise.

    Raises:
        UserError: If a value is outside its range, or several decide.
    """

    energy: float | None = None
    flops: float | None = None
    rank: int | None = None
    form: Form = "channel"
    target_modules: str | list[str] = "auto"
    fold_batchnorm: bool = True
    ranks: dict[str, int] | None = None
    folded: dict[str, str] | None = None

    def __post_init__(self) -> None:
        check_form(self.form)
        given = [name for name in ("energy", "flops", "rank") if getattr(self, name) is not None]
        if len(given) > 1 and self.ranks is None:
            raise UserError(f"{' and '.join(given)} are given, each of which decides about the ranks; give one of them")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy is {self.energy}; it is a share in (0, 1] of the squared singular values")
        if self.flops is not None and not 0 < self.flops < 1:
            raise UserError(f"flops is {self.flops}; it is a share in (0, 1) of the operations")
        for name, rank in [("rank", self.rank), *(self.ranks or {}).items()]:
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise UserError(f"{name} is {rank!r}; a rank is a whole number from 1")


@dataclass(frozen=True)
class LowRankLayer:
    """What became of a layer.

    Attributes:
        name: Its name in the network.
        kind: Its class.
        shape: Of its weight.
        rank: That it got, or None where it was left alone.
        full_rank: The largest possible.
        energy: Share of the squared singular values that is kept.
        error: Frobenius norm of what is lost, as a share of the weight's.
        parameters: Before and after.
        flops: Operations for one image, before and after.
        reason: Why it was left alone, or empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    full_rank: int
    energy: float
    error: float
    parameters: tuple[int, int]
    flops: tuple[int, int]
    reason: str = ""


@dataclass(frozen=True)
class LowRankReport:
    """What became of a network.

    Attributes:
        layers: Those that were looked at, in the order of execution.
        plan: Arguments of a :class:`LowRankConfig` that makes the same layers again from the same network with any
            weights, as before a checkpoint is loaded; numbers, texts and dictionaries only.
        parameters: Of the network, before and after.
        flops: Operations of the network for one image, before and after.
    """

    layers: list[LowRankLayer]
    plan: dict[str, Any]
    parameters: tuple[int, int]
    flops: tuple[int, int]

    def __str__(self) -> str:
        done = [layer for layer in self.layers if layer.rank is not None]
        before, after = self.parameters
        lines = [
            f"low rank: {len(done)} of {len(self.layers)} layers factorised, {len(self.plan['folded'])} batch norms "
            f"folded; parameters {before:,} to {after:,} ({after / max(1, before):.1%}), operations {self.flops[0]:,} "
            f"to {self.flops[1]:,} ({self.flops[1] / max(1, self.flops[0]):.1%})"
        ]
        for layer in self.layers:
            became = f"rank {layer.rank} of {layer.full_rank}, {layer.energy:.1%} of the energy"
            lines.append(f"  {layer.name} {list(layer.shape)}: {became if layer.rank is not None else layer.reason}")
        return "\n".join(lines)


@dataclass
class _Candidate:
    """A layer that may be factorised, with what each rank would lose and cost."""

    name: str
    layer: nn.Linear | nn.Conv2d
    spectrum: Spectrum
    parameters: int  # of a rank
    flops: int  # of a rank
    base_flops: int

    @property
    def base_parameters(self) -> int:
        return self.layer.weight.numel()

    @property
    def largest(self) -> int:
        """The largest rank that saves both parameters and operations; 0 where none does."""
        most = (self.base_parameters - 1) // self.parameters
        if self.base_flops:
            most = min(most, (self.base_flops - 1) // self.flops)
        return min(most, len(self.spectrum.sigma))


def low_rank_network(
    network: nn.Module, config: LowRankConfig, image: Tensor | None = None
) -> tuple[nn.Module, LowRankReport]:
    """Compress a trained network by truncated singular value decompositions of its layers.

    Batch norms are folded first, then the ranks are chosen, and each layer that is made smaller by its rank is
    replaced by two. A layer is left alone where its factors would not save, where it is not called (its weight may be
    used otherwise), shares its weight, has groups, or computes more than its weight says (which is tried).

    Args:
        network: It stays as it is.
        config: How.
        image: Images ``(batch, channels, height, width)`` that the network takes; random ones will do. With ``ranks``
            and ``folded`` in the configuration it may be left out, and operations are then not counted.

    Returns:
        A compressed copy, in the modes of the original, and what became of it.

    Raises:
        UserError: If no layer can be made smaller, a name or a rank cannot be, the budget cannot be reached, or a
            weight is not finite; each says what would do.

    Example:
        >>> small, report = low_rank_network(network, LowRankConfig(energy=0.9), images)  # doctest: +SKIP
        >>> network.load_state_dict(...)  # doctest: +SKIP
        >>> again, _ = low_rank_network(network, LowRankConfig(**report.plan))  # doctest: +SKIP
    """
    if hasattr(network, "get_base_model"):
        raise UserError("the network carries adapters; merge them first (merged_network), then compress it")
    before = sum(parameter.numel() for parameter in network.parameters())
    if image is not None:
        image = image.to(next((parameter.device for parameter in network.parameters()), image.device))
    if config.ranks is not None:
        return _exactly(network, config, config.ranks, image, before)
    if image is None:
        raise UserError("an image is needed to choose layers and ranks; give images that the network takes")
    flops = _flops(network, image)
    copied, folded = fold_batchnorm(network, image) if config.fold_batchnorm else (deepcopy(network), {})
    calls, _ = trace(copied, image)
    names = _targets(copied, config, image)
    candidates, rows = [], []
    for name in names:
        found = _candidate(copied, name, config.form, [call for call in calls if call.name == name])
        if isinstance(found, _Candidate):
            candidates.append(found)
        else:
            rows.append(found)
    if not any(each.largest for each in candidates):
        raise UserError(_nothing(candidates, rows, config))
    ranks = _chosen(candidates, config, flops)
    for each in candidates:
        rank = ranks[each.name]
        rows.append(_row(each, rank, _reason(each, config) if rank is None else ""))
        if rank is not None:
            replace_module(copied, each.name, factorised(each.layer, rank, each.spectrum))
    done = {name: rank for name, rank in ranks.items() if rank is not None}
    if not done:
        raise UserError(_nothing(candidates, rows, config))
    order = {name: place for place, name in enumerate(names)}
    after = sum(parameter.numel() for parameter in copied.parameters())
    rows.sort(key=lambda row: order[row.name])
    return copied, LowRankReport(rows, _plan(config, done, folded), (before, after), (flops, _flops(copied, image)))


def _exactly(
    network: nn.Module, config: LowRankConfig, ranks: dict[str, int], image: Tensor | None, before: int
) -> tuple[nn.Module, LowRankReport]:
    """The network with given ranks, whatever its weights are."""
    copied = deepcopy(network)
    folded = dict(config.folded or {})
    modules = dict(network.named_modules())
    for name in (*folded, *folded.values(), *ranks):
        wanted = NORMS if name in folded else LAYERS
        if not isinstance(modules.get(name), wanted):
            raise UserError(
                f"the network has no {' or '.join(kind.__name__ for kind in wanted)} called {name!r}; ranks and folded "
                "are those of another network"
            )
    for norm, layer in folded.items():
        fold(copied, layer, norm)
    if config.folded is None and config.fold_batchnorm:
        if image is None:
            raise UserError("an image is needed to find batch norms; give images that the network takes, or folded")
        copied, folded = fold_batchnorm(copied, image)
    rows = []
    for name, rank in ranks.items():
        found = _candidate(copied, name, config.form, None)
        if not isinstance(found, _Candidate):
            raise UserError(f"{name} cannot be factorised: {found.reason}; leave it out of ranks")
        most = len(found.spectrum.sigma)
        if rank > most:
            raise UserError(f"ranks has {rank} for {name}, whose largest rank is {most}; give {most} or less")
        rows.append(_row(found, rank, ""))
        replace_module(copied, name, factorised(found.layer, rank, found.spectrum))
    after = sum(parameter.numel() for parameter in copied.parameters())
    flops = (0, 0) if image is None else (_flops(network, image), _flops(copied, image))
    return copied, LowRankReport(rows, _plan(config, ranks, folded), (before, after), flops)


def _plan(config: LowRankConfig, ranks: dict[str, int], folded: dict[str, str]) -> dict[str, Any]:
    return {"form": config.form, "ranks": dict(ranks), "folded": dict(folded)}


def _flops(network: nn.Module, image: Tensor) -> int:
    with evaluating(network), FlopCounterMode(display=False) as counter:
        network(image[:1])
    return int(counter.get_total_flops())


def _targets(network: nn.Module, config: LowRankConfig, image: Tensor) -> list[str]:
    """Names of the layers that are looked at, in the order of execution."""
    # Only here, since they import peft, which takes a second and reading a plan back does without.
    from lightning_automl.adapters.anatomy import anatomy, plain_modules
    from lightning_automl.adapters.targets import CHOICES, resolve_targets

    found = anatomy(network, image[:1])
    wanted = config.target_modules
    by_itself = isinstance(wanted, str) and wanted in CHOICES
    modules = plain_modules(network)
    own_names = {id(module): name for name, module in network.named_modules()}  # where it carries adapters, others
    names = []
    for name in resolve_targets(network, wanted, 1, found):
        if isinstance(modules[name], LAYERS):
            names.append(own_names[id(modules[name])])
        elif not by_itself:
            raise UnsupportedError(
                f"{name} is a {type(modules[name]).__name__}; linear layers and convolutions without adapters can be "
                "factorised; leave it out"
            )
    return names


def _candidate(network: nn.Module, name: str, form: Form, calls: list[Call] | None) -> _Candidate | LowRankLayer:
    """The layer with its spectrum, or the row that says why it is left alone; without calls these are not known."""
    layer = network.get_submodule(name)
    assert isinstance(layer, LAYERS)
    reason = _refusal(network, name, layer)
    if not reason and calls is not None and not calls:
        reason = "its weight is used without calling it"
    calls = calls or []
    if not reason:
        try:
            spectrum = spectrum_of(layer, form)
        except UserError:
            raise UserError(
                f"the weight of {name} holds numbers that are not finite; it cannot be factorised"
            ) from None
        if calls and not _is_linear_in_weight(layer, spectrum, calls[0].given):
            reason = "it computes more than its weight says"
        else:
            base_flops = sum(_layer_flops(layer, call.given) for call in calls)
            one = factorised(layer, 1, spectrum)
            flops = sum(_layer_flops(one, call.given) for call in calls)
            parameters = one.first.weight.numel() + one.last.weight.numel()
            return _Candidate(name, layer, spectrum, parameters, flops, base_flops)
    weight = layer.weight.numel()
    return LowRankLayer(
        name,
        type(layer).__name__,
        tuple(layer.weight.shape),
        None,
        min(layer.weight.shape[0], weight // layer.weight.shape[0]),
        1.0,
        0.0,
        (weight, weight),
        (0, 0),
        reason,
    )


def _refusal(network: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> str:
    parent = network.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, LowRankLinear | LowRankConv2d):
        return _FACTOR
    if isinstance(parent, nn.MultiheadAttention):
        return "its weight is used without calling it"
    if "weight" not in layer._parameters:
        return "its weight is computed from others"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"it has {layer.groups} groups"
    owners = [
        module
        for _, module in network.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is layer.weight
    ]
    return "it shares its weight" if len(owners) > 1 else ""


def _layer_flops(layer: nn.Module, given: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(given[:1])
    return int(counter.get_total_flops())


def _is_linear_in_weight(layer: nn.Linear | nn.Conv2d, spectrum: Spectrum, given: Tensor) -> bool:
    """Whether the factors give what the layer gives with their product as its weight, at half the largest rank."""
    if type(layer) in LAYERS:
        return True
    factors = factorised(layer, max(1, len(spectrum.sigma) // 2), spectrum)
    with torch.no_grad():
        expected = torch.func.functional_call(layer, {"weight": factors.weight}, (given[:1],))
        try:
            outputs = factors(given[:1])
        except RuntimeError:  # a weight of another size does not go with the rest of it
            return False
        return outputs.shape == expected.shape and agree(expected, outputs, 1e-4)


def _row(each: _Candidate, rank: int | None, reason: str) -> LowRankLayer:
    energies = each.spectrum.sigma.square()
    lost = 0.0 if rank is None else float(energies[rank:].sum() / energies.sum().clamp_min(1e-300))
    return LowRankLayer(
        each.name,
        type(each.layer).__name__,
        tuple(each.layer.weight.shape),
        rank,
        len(each.spectrum.sigma),
        1.0 - lost,
        lost**0.5,
        (each.base_parameters, each.base_parameters if rank is None else rank * each.parameters),
        (each.base_flops, each.base_flops if rank is None else rank * each.flops),
        reason,
    )


def _chosen(candidates: list[_Candidate], config: LowRankConfig, flops: int) -> dict[str, int | None]:
    if config.flops is not None:
        return _by_budget(candidates, config.flops, flops)
    ranks: dict[str, int | None] = {}
    for each in candidates:
        rank = _wanted(each, config)
        ranks[each.name] = rank if rank <= each.largest else None
    return ranks


def _wanted(each: _Candidate, config: LowRankConfig) -> int:
    if config.rank is not None:
        return config.rank
    enough = each.spectrum.kept() >= (ENERGY if config.energy is None else config.energy) - 1e-12
    return int(enough.int().argmax()) + 1


def _by_budget(candidates: list[_Candidate], share: float, flops: int) -> dict[str, int | None]:
    """Minimise the sum of lost energies + price x operations, layer by layer, at the lowest price within the budget."""
    tables = []
    for each in candidates:
        ranks = torch.arange(1, each.largest + 1)
        lost = torch.cat([torch.zeros(1).double(), 1 - each.spectrum.kept()[: each.largest].cpu()])
        costs = torch.cat([torch.tensor([each.base_flops]), ranks * each.flops]).double()
        tables.append((lost, costs))
    others = flops - sum(each.base_flops for each in candidates)

    def at(price: float) -> tuple[list[int], float]:
        picked = [int((lost + price * costs).argmin()) for lost, costs in tables]
        return picked, others + sum(float(costs[pick]) for pick, (_, costs) in zip(picked, tables, strict=True))

    low, high = 0.0, 2.0  # a price at which a single operation is worth more than any energy
    picked, least = at(high)
    if least > share * flops:
        raise UserError(
            f"flops is {share:g}, but with rank 1 everywhere {least / flops:.3f} of the operations are left; give more "
            "than that, or more target_modules"
        )
    for _ in range(100):
        price = (low * high) ** 0.5 if low else high / 16
        tried, total = at(price)
        if total <= share * flops:
            picked, high = tried, price
        else:
            low = price
        if not low and price < 1e-30:
            break
    return {each.name: pick or None for each, pick in zip(candidates, picked, strict=True)}


def _reason(each: _Candidate, config: LowRankConfig) -> str:
    if config.flops is not None:
        return "the budget is met without it"
    return f"rank {_wanted(each, config)} would not save (at most {each.largest} does)"


def _nothing(candidates: list[_Candidate], rows: list[LowRankLayer], config: LowRankConfig) -> str:
    able = [each for each in candidates if each.largest]
    if not able:
        first = {row.reason: row.name for row in reversed(rows)}  # the first layer of each reason
        reasons = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[::-1])
        if set(first) == {_FACTOR}:
            return "the network is made of factors already; compress the network that it was made from"
        advice = "leave it as it is" if config.target_modules == "auto" else "give other target_modules"
        return f"no layer can be made smaller ({reasons or 'none without an adapter was found'}); {advice}"
    if config.rank is not None:
        most = max(each.largest for each in able)
        return f"rank {config.rank} makes no layer smaller; give {most} or less"
    best = max(float(each.spectrum.kept()[each.largest - 1]) for each in able)
    energy = ENERGY if config.energy is None else config.energy
    return f"with an energy of {energy:g} no layer gets smaller; give {int(best * 1000) / 1000:g} or less"
