"""Apply drawn operations to a batch: all decisions are made before, on the CPU; few passes over pixels follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_automl.augment import geometry, pixels
from lightning_automl.augment.geometry import Interpolation
from lightning_automl.augment.ops import OPS, operation
from lightning_automl.rundir import UserError

_NAMES = tuple(OPS)
_PLACE = {name: place for place, name in enumerate(_NAMES)}
_IDENTITY = _PLACE["identity"]
_GEOMETRIC = np.array([OPS[name].kind == "geometric" for name in _NAMES])
_HAS_STRENGTH = np.array([OPS[name].strongest is not None for name in _NAMES])


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
    if images.ndim == 3:
        return apply(images[None], plan, interpolation=interpolation, fill=fill)[0]
    _check(images, plan)
    filling = _filling(images, fill)
    operations, strengths, seeds = _compact(plan, images.shape[1])
    if operations.shape[1] == 0 or images.numel() == 0:
        return images.clone()
    result = images.clone()
    count = len(images)
    position = np.zeros(count, dtype=np.int64)
    padded = np.concatenate([operations, np.full((count, 1), _IDENTITY)], axis=1)
    while True:
        heads = padded[np.arange(count), position]
        waiting = np.unique(heads[heads != _IDENTITY])
        if not len(waiting):
            return result
        for place in waiting:
            name = _NAMES[place]
            if _GEOMETRIC[place]:
                continue
            rows = np.flatnonzero(heads == place)
            here = position[rows]
            chosen = torch.from_numpy(rows).to(images.device, non_blocking=True)
            part = result.index_select(0, chosen)
            drawn = torch.from_numpy(seeds[rows, here]).to(images.device, non_blocking=True)
            if name == "sample_pairing":
                changed = _paired(part, images, rows, strengths[rows, here], seeds[rows, here])
            else:
                changed = _formula(name, part, strengths[rows, here], drawn)
            result.index_copy_(0, chosen, changed)
            position[rows] += 1
        rows = np.flatnonzero(_GEOMETRIC[heads])
        if len(rows):
            chosen = torch.from_numpy(rows).to(images.device, non_blocking=True)
            moved = _moved(
                result.index_select(0, chosen), rows, position, padded, strengths, seeds, filling, interpolation
            )
            result.index_copy_(0, chosen, moved)


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
    count = 1 if images.ndim == 3 else len(images)
    strengths = torch.as_tensor(strength, dtype=torch.float64).cpu().expand(count)
    if not bool(strengths.isfinite().all()) or (not known.signed and bool((strengths < 0).any())):
        raise UserError(f"the strength of {name} is {strength}; give {'a number' if known.signed else '0 or more'}")
    operations = torch.full((count, 1), _PLACE[name])
    plan = Plan.draw(operations, strengths[:, None], generator)
    return apply(images, plan, interpolation=interpolation, fill=fill)


def _check(images: Tensor, plan: Plan) -> None:
    if images.ndim != 4:
        raise UserError(
            f"images have the shape {tuple(images.shape)}; operations take (batch, channels, height, width), or one "
            "image (channels, height, width)"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ImageTypeError(f"images are {images.dtype}; operations take uint8, or float in [0, 1]")
    if len(plan) != len(images):
        raise UserError(f"the plan is for {len(plan)} images and there are {len(images)}; draw one for this batch")
    # on another device the check would wait for it
    if images.is_floating_point() and images.device.type == "cpu" and images.numel():
        low, high = (float(value) for value in images.aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise UserError(f"float images are in [{low:.4g}, {high:.4g}]; operations take values in [0, 1]")
    turns = (plan.operations == _PLACE["quarter_turn"]).any()
    if images.shape[2] != images.shape[3] and bool(turns):
        raise UserError(
            f"quarter_turn needs square images and these have {images.shape[2]} x {images.shape[3]} pixels; "
            "leave it out or use rotate"
        )


def _filling(images: Tensor, fill: float | Sequence[float] | None) -> Tensor:
    values = [0.0] if fill is None else [float(fill)] if isinstance(fill, int | float) else [float(v) for v in fill]
    channels = images.shape[1]
    if len(values) not in (1, channels):
        raise UserError(f"fill has {len(values)} values and the images have {channels} channels; give one, or one each")
    highest = 255 if images.dtype == torch.uint8 else 1
    if not all(0 <= value <= highest for value in values):
        raise UserError(f"fill is {fill}; {images.dtype} images have values from 0 to {highest}")
    return torch.tensor(values).to(images.dtype).expand(channels).to(images.device, non_blocking=True)


def _compact(plan: Plan, channels: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """The plan as arrays, with what changes nothing at the end of each row."""
    operations, seeds = plan.operations.numpy(), plan.seeds.numpy()
    strengths = plan.strengths.double().numpy()
    nothing = (_HAS_STRENGTH[operations] & (strengths == 0)) | (operations == _IDENTITY)
    if channels != 3:
        nothing |= operations == _PLACE["color"]
    operations = np.where(nothing, _IDENTITY, operations)
    order = np.argsort(nothing, axis=1, kind="stable")
    length = int((~nothing).sum(1).max(initial=0))
    operations, strengths, seeds = (
        np.take_along_axis(array, order, axis=1)[:, :length] for array in (operations, strengths, seeds)
    )
    return operations, strengths, seeds


def _formula(name: str, images: Tensor, strengths: NDArray[np.float64], seeds: Tensor) -> Tensor:
    levels = images.float() if images.dtype == torch.uint8 else images.float() * 255
    levels = pixels.FORMULAS[name](levels, strengths, seeds).clamp(0, 255)
    if images.dtype != torch.uint8:
        return (levels / 255).to(images.dtype)
    return (levels + 0.5 if name in pixels.ROUNDED else levels).to(torch.uint8)


def _paired(
    images: Tensor,
    originals: Tensor,
    rows: NDArray[np.int64],
    strengths: NDArray[np.float64],
    seeds: NDArray[np.int64],
) -> Tensor:
    """Blend with the image, as it came in, of another row of the batch."""
    count = len(originals)
    partners = (rows + 1 + seeds % max(1, count - 1)) % count
    others = originals.index_select(0, torch.from_numpy(partners).to(originals.device, non_blocking=True)).float()
    weights = torch.from_numpy(strengths).float().to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    blended = images.float() + weights * (others - images.float())
    return blended.clamp(0, 255 if images.dtype == torch.uint8 else 1).to(images.dtype)


def _moved(
    images: Tensor,
    rows: NDArray[np.int64],
    position: NDArray[np.int64],
    operations: NDArray[np.int64],
    strengths: NDArray[np.float64],
    seeds: NDArray[np.int64],
    filling: Tensor,
    interpolation: Interpolation,
) -> Tensor:
    """Do the geometric operations that come next for each image, up to the first that is not, in one resampling."""
    height, width = images.shape[2:]
    identity = np.eye(3)
    # place in the image = matrices @ place in the result; with an elastic deformation, after @ (displaced by it, at
    # before @ place)
    matrices = np.tile(identity, (len(rows), 1, 1))
    outer = matrices.copy()
    deformed = np.zeros(len(rows), dtype=bool)
    amounts, fields = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    active = np.ones(len(rows), dtype=bool)
    while True:
        heads = operations[rows, position[rows]]
        again = (heads == _PLACE["elastic"]) & deformed
        active &= _GEOMETRIC[heads] & ~again
        if not active.any():
            break
        for place in np.unique(heads[active]):
            here = np.flatnonzero(active & (heads == place))
            of = rows[here], position[rows[here]]
            if _NAMES[place] == "elastic":
                deformed[here] = True
                amounts[here], fields[here] = strengths[of], seeds[of]
                outer[here], matrices[here] = matrices[here], identity
                continue
            drawn = torch.from_numpy(seeds[of])
            matrices[here] = matrices[here] @ geometry.affine_matrices(
                _NAMES[place], strengths[of], drawn, height, width
            )
        position[rows[active]] += 1
    result = torch.empty_like(images)
    for some, plain in ((np.flatnonzero(~deformed), True), (np.flatnonzero(deformed), False)):
        if not len(some):
            continue
        chosen = torch.from_numpy(some).to(images.device, non_blocking=True)
        part = images.index_select(0, chosen)
        if plain:
            result.index_copy_(0, chosen, geometry.resample(part, matrices[some], filling, interpolation))
            continue
        drawn = torch.from_numpy(fields[some]).to(images.device, non_blocking=True)
        field = geometry.displacements(amounts[some], drawn, height, width)
        places = geometry.moved(matrices[some], geometry.centres(height, width, images.device)[None])
        places = places + geometry.at(field, places)
        result.index_copy_(0, chosen, geometry.resample(part, outer[some], filling, interpolation, places))
    return result
