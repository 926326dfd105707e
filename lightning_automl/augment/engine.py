"""Apply drawn operations to a batch: all decisions are made before, on the CPU; few passes over pixels follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_automl.augment import geometry, pixels
from lightning_automl.augment.geometry import Interpolation
from lightning_automl.augment.ops import OPS, operation
from lightning_automl.rundir import UserError

_NAMES = tuple(OPS)
_IDENTITY = _NAMES.index("identity")
_QUARTER_TURN = _NAMES.index("quarter_turn")
_COLOR = _NAMES.index("color")
_HAS_STRENGTH = np.array([OPS[name].strongest is not None for name in _NAMES])

# Operations in the order in which a round does them: nothing, tables, filters, pairing, and all that moves pixels.
_RANKED = (
    "identity",
    *pixels.POINTWISE,
    *pixels.FILTERS,
    "sample_pairing",
    *(name for name in _NAMES if OPS[name].kind == "geometric"),
)
_RANK = np.array([_RANKED.index(name) for name in _NAMES])
_FIRST_FILTER = 1 + len(pixels.POINTWISE)
_FIRST_GEOMETRIC = _RANKED.index("sample_pairing") + 1
_ELASTIC = _RANKED.index("elastic")

_BLOCK = 2**19  # numbers that are worked on at once on a CPU


class ImageTypeError(UserError, TypeError):
    """Images of a dtype that operations do not take; from Python also a ``TypeError``."""


@dataclass
class Plan:
    """What is done to each image of a batch, in order; on the CPU, so that applying it never waits for a device.

    Applied twice, a plan gives the same images: what an operation draws itself (places, noise) follows from ``seeds``.

    Args:
        operations: Places in ``tuple(OPS)``, int64 ``(images, length)``; the identity's where nothing is to be done.
        strengths: Signed, in each operation's unit, float ``(images, length)``.
        seeds: int64 ``(images, length)`` in [0, 2**31).
    """

    operations: Tensor
    strengths: Tensor
    seeds: Tensor

    @classmethod
    def draw(cls, operations: Tensor, strengths: Tensor, generator: torch.Generator | None = None) -> "Plan":
        """A plan with seeds from ``generator``, or from torch's default one.

        Raises:
            RuntimeError: If the generator is not on the CPU.
        """
        if generator is not None and generator.device.type != "cpu":
            raise RuntimeError(
                f"the generator is on {generator.device}; plans are drawn on the CPU, by torch.Generator()"
            )
        return cls(operations, strengths, torch.randint(2**31, operations.shape, generator=generator))

    def __len__(self) -> int:
        return len(self.operations)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> "Plan":
        """The plan of some of the images."""
        return Plan(self.operations[rows], self.strengths[rows], self.seeds[rows])


@torch.no_grad()
def apply(
    images: Tensor,
    plan: Plan,
    *,
    interpolation: Interpolation = "nearest",
    fill: float | Sequence[float] | None = None,
) -> Tensor:
    """Do to each image what the plan says.

    Consecutive geometric operations of an image are composed, and its pixels are read once for all of them; only two
    elastic deformations are two resamplings.

    Args:
        images: uint8, or float in [0, 1]: ``(batch, channels, height, width)``, or one ``(channels, height, width)``;
            any memory format and device. They are not changed.
        plan: For as many images.
        interpolation: How geometric operations read pixels.
        fill: What comes in from outside: a level (0 to 255 for uint8, 0 to 1 for float), or one a channel; 0 if None.

    Returns:
        Images of the same shape, dtype, device and memory format.

    Raises:
        UserError: If the shape, the range or the fill does not fit; of a wrong dtype it is an :class:`ImageTypeError`.
    """
    _check_images(images)
    if images.ndim == 3:
        return apply(images[None], plan, interpolation=interpolation, fill=fill)[0]
    _check(images, plan, interpolation)
    filling = _filling(images, fill)
    steps = _steps(plan, images.shape[1])
    if steps.ranks.shape[1] == 1 or images.numel() == 0:
        return images.clone()
    # Each round does the next operation of every image. Before it, images that need the same are moved next to each
    # other, so that the round works in place on views of one tensor; `rows` says where in the batch each one belongs.
    batch, rows, position = images, np.arange(len(images)), np.zeros(len(images), dtype=np.int64)
    heads = steps.ranks[:, 0]
    while heads.any():
        order = np.argsort(heads, kind="stable")
        batch, rows, position = _chosen(batch, order), rows[order], position[order]
        runs = _runs(heads[order])
        here = rows, np.minimum(position, steps.strengths.shape[1] - 1)
        strengths, seeds = steps.strengths[here], steps.seeds[here]
        still = [run for run in runs if run.rank < _FIRST_GEOMETRIC]
        _change(batch, images, still, rows, strengths, seeds)
        for run in still:
            position[run.first : run.last] += 1
        if len(still) < len(runs):
            some = slice(runs[len(still)].first, None)
            route = _route(rows[some], position[some], steps, images.shape[2], images.shape[3])
            _move(batch[some], route, filling, interpolation)
        heads = steps.ranks[rows, position]
    return _chosen(batch, np.argsort(rows), like=images)


def apply_operation(
    name: str,
    images: Tensor,
    strength: float | Tensor | NDArray[np.float64] = 0.0,
    *,
    generator: torch.Generator | None = None,
    interpolation: Interpolation = "nearest",
    fill: float | Sequence[float] | None = None,
) -> Tensor:
    """Do one operation to all images, with given strengths.

    Args:
        name: One of :data:`~lightning_automl.augment.ops.OPS`.
        images: As for :func:`apply`.
        strength: Signed, in the operation's unit: one number or one an image; does not count where there is none.
        generator: Draws what the operation draws itself; on the CPU, torch's default one if None.
        interpolation: As for :func:`apply`.
        fill: As for :func:`apply`.

    Raises:
        UserError: As :func:`apply`; if there is no such operation; if a strength is not a number, or negative where the
            operation has no sign.
        RuntimeError: If the generator is not on the CPU.
    """
    known = operation(name)
    _check_images(images)
    count = 1 if images.ndim == 3 else len(images)
    strengths = torch.as_tensor(strength, dtype=torch.float64).cpu()
    if strengths.ndim > 1 or strengths.numel() not in (1, count):
        raise UserError(f"there are {strengths.numel()} strengths and {count} images; give one, or one an image")
    strengths = strengths.expand(count)
    if not bool(strengths.isfinite().all()) or (not known.signed and bool((strengths < 0).any())):
        raise UserError(f"the strength of {name} is {strength}; give {'a number' if known.signed else '0 or more'}")
    operations = torch.full((count, 1), _NAMES.index(name))
    plan = Plan.draw(operations, strengths[:, None], generator)
    return apply(images, plan, interpolation=interpolation, fill=fill)


def _check_images(images: Tensor) -> None:
    if images.ndim not in (3, 4):
        raise UserError(
            f"images have the shape {tuple(images.shape)}; operations take (batch, channels, height, width), or one "
            "image (channels, height, width)"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ImageTypeError(f"images are {images.dtype}; operations take uint8, or float in [0, 1]")


def _check(images: Tensor, plan: Plan, interpolation: str) -> None:
    if interpolation not in get_args(Interpolation):
        known = " or ".join(get_args(Interpolation))
        raise UserError(f"interpolation is {interpolation!r}; give {known}")
    if len(plan) != len(images):
        raise UserError(f"the plan is for {len(plan)} images and there are {len(images)}; draw one for this batch")
    # on another device the check would wait for it
    if images.is_floating_point() and images.device.type == "cpu" and images.numel():
        low, high = (float(value) for value in images.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise UserError(f"float images are in [{low:.4g}, {high:.4g}]; operations take values in [0, 1]")
    if images.shape[2] != images.shape[3] and bool((plan.operations == _QUARTER_TURN).any()):
        raise UserError(
            f"quarter_turn needs square images and these have {images.shape[2]} x {images.shape[3]} pixels; "
            "leave it out or use rotate"
        )


def _filling(images: Tensor, fill: float | Sequence[float] | None) -> Tensor:
    if fill is None:
        return images.new_zeros(images.shape[1])
    values = [float(fill)] if isinstance(fill, int | float) else [float(v) for v in fill]
    channels = images.shape[1]
    if len(values) not in (1, channels):
        raise UserError(f"fill has {len(values)} values and the images have {channels} channels; give one, or one each")
    highest = 255 if images.dtype == torch.uint8 else 1
    if not all(0 <= value <= highest for value in values):
        raise UserError(f"fill is {fill}; {images.dtype} images have values from 0 to {highest}")
    return torch.tensor(values).to(images.dtype).expand(channels).to(images.device, non_blocking=True)


class _Run(NamedTuple):
    """Images that get the same operation now: ``first`` to ``last``, exclusive; ``rank`` is it in ``_RANKED``."""

    rank: int
    first: int
    last: int


def _runs(ranks: NDArray[np.int64]) -> list[_Run]:
    """The runs of sorted ranks, without those that get nothing."""
    counts = np.bincount(ranks, minlength=len(_RANKED)).tolist()
    ends = list(accumulate(counts))
    return [_Run(rank, ends[rank] - count, ends[rank]) for rank, count in enumerate(counts) if count and rank]


def _blocks(first: int, last: int, images: Tensor) -> list[slice]:
    """Slices of images, some hundred thousand numbers each, so that what is made of them stays in a core's cache.

    At 224 x 224 that saves a third of the time; on a GPU one block is best.
    """
    _, channels, height, width = images.shape
    step = max(1, _BLOCK // (channels * height * width))
    if last - first <= step or images.device.type != "cpu":
        return [slice(first, last)] if last > first else []
    return [slice(start, min(start + step, last)) for start in range(first, last, step)]


class _Steps(NamedTuple):
    """A plan without what changes nothing: places in ``_RANKED`` ``(images, length + 1)``, with 0 after the last."""

    ranks: NDArray[np.int64]
    strengths: NDArray[np.float64]
    seeds: NDArray[np.int64]


def _steps(plan: Plan, channels: int) -> _Steps:
    operations, seeds = plan.operations.numpy(), plan.seeds.numpy()
    strengths = plan.strengths.double().numpy()
    nothing = (operations == _IDENTITY) | (_HAS_STRENGTH[operations] & (strengths == 0))
    if channels != 3:
        nothing |= operations == _COLOR
    ranks = np.where(nothing, 0, _RANK[operations])
    if operations.shape[1] > 1 and nothing.any():  # what is to be done comes first
        order = np.argsort(nothing, axis=1, kind="stable")
        ranks, strengths, seeds = (np.take_along_axis(array, order, axis=1) for array in (ranks, strengths, seeds))
    length = int(np.flatnonzero(ranks.any(axis=0)).max(initial=-1)) + 1
    end = np.zeros((len(ranks), 1), dtype=np.int64)
    return _Steps(np.concatenate([ranks[:, :length], end], axis=1), strengths, seeds)


def _on(device: torch.device, numbers: NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
    # these are a few kilobytes: the copy is queued, and nothing waits for the device
    return torch.from_numpy(numbers).to(dtype).to(device, non_blocking=True)


def _chosen(images: Tensor, places: NDArray[np.int64], like: Tensor | None = None) -> Tensor:
    """The images of these places, with a plane a channel, or in the memory format of ``like``."""
    index = _on(images.device, places)
    if _is_channels_last(images):  # whole images are copied at once
        return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2).contiguous()
    images = images.index_select(0, index)
    if like is None or not _is_channels_last(like):
        return images
    return torch.stack(images.unbind(1), -1).permute(0, 3, 1, 2)  # twice as fast as `contiguous(memory_format=…)`


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _change(
    batch: Tensor,
    originals: Tensor,
    runs: list[_Run],
    rows: NDArray[np.int64],
    strengths: NDArray[np.float64],
    seeds: NDArray[np.int64],
) -> None:
    """Do, in place, the operations that move no pixel."""
    if not runs:
        return
    values = np.empty(len(rows), dtype=np.float32)
    for rank, first, last in runs:
        values[first:last] = pixels.amounts(_RANKED[rank], strengths[first:last])
    amounts = _on(batch.device, values).view(-1, 1, 1)
    tables = [run for run in runs if run.rank < _FIRST_FILTER] if batch.dtype == torch.uint8 else []
    if tables:
        _look_up(batch, tables, amounts)
    for rank, first, last in runs[len(tables) :]:
        name = _RANKED[rank]
        drawn = _on(batch.device, seeds) if name in pixels.DRAWING else None
        for some in _blocks(first, last, batch):
            part, amount = batch[some], amounts[some]
            if name == "sample_pairing":
                partners = (rows[some] + 1 + seeds[some] % max(1, len(rows) - 1)) % len(rows)
                others, levels = _levels(_chosen(originals, partners)), _levels(part)
                _store(part, others.sub_(levels).mul_(amount.unsqueeze(1)).add_(levels), name)
            elif name in pixels.EIGHT_BITS:
                levels = _bytes(part.float().mul_(255).add_(0.5).clamp_(0, 255))
                _look_up(levels, [_Run(rank, 0, len(levels))], amount)
                part.copy_(levels.float().div_(255))
            elif name in pixels.POINTWISE:
                levels = _levels(part)
                statistic = pixels.STATISTICS[name](levels) if name in pixels.STATISTICS else levels
                _store(part, pixels.POINTWISE[name](levels.flatten(2), amount, statistic).view(part.shape), name)
            else:
                own = amounts if drawn is None else drawn
                _store(part, pixels.FILTERS[name](_levels(part), amount.unsqueeze(1), own[some]), name)


def _look_up(images: Tensor, runs: list[_Run], amounts: Tensor) -> None:
    """Replace, in place, the levels of uint8 images by those in tables made by the formulas."""
    start, end = runs[0].first, runs[-1].last
    levels = torch.arange(256, dtype=torch.float32, device=images.device).view(1, 1, -1)
    tables = torch.empty(end - start, images.shape[1], 256, device=images.device)
    for rank, first, last in runs:
        name, table = _RANKED[rank], tables[first - start : last - start]
        statistic = levels
        if name in pixels.STATISTICS:
            measured = [pixels.STATISTICS[name](images[some]) for some in _blocks(first, last, images)]
            statistic = measured[0] if len(measured) == 1 else torch.cat(measured)
        table.copy_(pixels.POINTWISE[name](levels, amounts[first:last], statistic))
        if name in pixels.ROUNDED:
            table.add_(0.5)
    entries = _bytes(tables.clamp_(0, 255))
    for some in _blocks(start, end, images):
        values = images[some].flatten(2)
        torch.gather(entries[some.start - start : some.stop - start], 2, values.long(), out=values)


def _levels(images: Tensor) -> Tensor:
    return images.float() if images.dtype == torch.uint8 else images.float().mul_(255)


def _store(part: Tensor, levels: Tensor, name: str) -> None:
    if part.dtype != torch.uint8:
        part.copy_(levels.div_(255).clamp_(0, 1))
        return
    part.copy_(_bytes((levels.add_(0.5) if name in pixels.ROUNDED else levels).clamp_(0, 255)))


def _bytes(levels: Tensor) -> Tensor:
    return levels.short().to(torch.uint8)  # three times as fast as directly, which is not vectorised (torch 2.14)


class _Route(NamedTuple):
    """How the result's places become places of the images: ``outer @ displaced(inner @ place)``.

    ``outer`` is the whole route of images that are not deformed; their ``amounts`` are 0.
    """

    outer: NDArray[np.float64]
    inner: NDArray[np.float64]
    amounts: NDArray[np.float64]
    seeds: NDArray[np.int64]


def _route(rows: NDArray[np.int64], position: NDArray[np.int64], steps: _Steps, height: int, width: int) -> _Route:
    """Compose the geometric operations that come next for each image, up to the first that is not; moves positions.

    ``rows`` are sorted by their next operation.
    """
    count = len(rows)
    route = _Route(np.empty((count, 2, 3)), np.empty((count, 2, 3)), np.zeros(count), np.zeros(count, dtype=np.int64))
    route.outer[:] = route.inner[:] = geometry.IDENTITY

    def extend(rank: int, here: slice | NDArray[np.int64], *, first: bool) -> None:
        of = rows[here], position[here]
        strengths, seeds = steps.strengths[of], steps.seeds[of]
        if rank == _ELASTIC:
            route.amounts[here], route.seeds[here] = strengths, seeds
            return
        drawn = torch.from_numpy(seeds)
        matrices = geometry.affine_matrices(_RANKED[rank], strengths, drawn, height, width)
        if first:
            route.outer[here] = matrices
            return
        deformed = (route.amounts[here] > 0)[:, None, None]
        inner, outer = route.inner[here], route.outer[here]
        route.inner[here] = np.where(deformed, geometry.composed(inner, matrices), inner)
        route.outer[here] = np.where(deformed, outer, geometry.composed(outer, matrices))

    for run in _runs(steps.ranks[rows, position]):
        extend(run.rank, slice(run.first, run.last), first=True)
    position += 1
    active = np.arange(count)
    while True:
        heads = steps.ranks[rows[active], position[active]]
        # a second elastic deformation waits for the next resampling
        more = (heads >= _FIRST_GEOMETRIC) & ~((heads == _ELASTIC) & (route.amounts[active] > 0))
        active, heads = active[more], heads[more]
        if not len(active):
            return route
        for rank in np.unique(heads).tolist():
            extend(rank, active[heads == rank], first=False)
        position[active] += 1


def _move(images: Tensor, route: _Route, filling: Tensor, interpolation: Interpolation) -> None:
    """Read, in place, the pixels at the ends of the routes."""
    height, width = images.shape[2:]
    if not route.amounts.any():
        for some in _blocks(0, images.shape[0], images):
            images[some] = geometry.resample(images[some], route.outer[some], filling, interpolation)
        return
    straight, deformed = np.flatnonzero(route.amounts == 0), np.flatnonzero(route.amounts)
    for some in _blocks(0, len(straight), images):
        here = straight[some]
        part = geometry.resample(_chosen(images, here), route.outer[here], filling, interpolation)
        images.index_copy_(0, _on(images.device, here), part)
    middles = geometry.centres(height, width, images.device)[None]
    for some in _blocks(0, len(deformed), images):
        here = deformed[some]
        field = geometry.displacements(route.amounts[here], _on(images.device, route.seeds[here]), height, width)
        places = geometry.moved(route.inner[here], middles)
        places = places + geometry.at(field, places)
        part = geometry.resample(_chosen(images, here), route.outer[here], filling, interpolation, places)
        images.index_copy_(0, _on(images.device, here), part)
