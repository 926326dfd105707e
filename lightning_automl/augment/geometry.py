"""Where pixels come from: affine maps, elastic displacements, and reading images there.

A map says for each place of the result where it is read in the image. Coordinates are in pixels from the top-left
corner, so that the centre of the first pixel is at (0.5, 0.5), as in PIL.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_automl.augment.draws import uniform

Interpolation = Literal["nearest", "bilinear"]
Matrices = NDArray[np.float64]
Numbers = tuple[float | NDArray[Any], ...]


def _shear_x(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    return 1, strength, 0, 0, 1, 0


def _shear_y(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    return 1, 0, 0, strength, 1, 0


def _translate_x(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    return 1, 0, -strength * width, 0, 1, 0


def _translate_y(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    return 1, 0, 0, 0, 1, -strength * height


def _rotate(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    radians = -np.deg2rad(strength)
    # rounded as PIL does, so that quarters of a turn have no sine of 6e-17
    cosine, sine = np.round(np.cos(radians), 15), np.round(np.sin(radians), 15)
    x, y = width / 2, height / 2
    return cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y


def _zoom(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    scale = 1 / (1 + strength)
    return scale, 0, (1 - scale) * width / 2, 0, scale, (1 - scale) * height / 2


def _horizontal_flip(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    return -1, 0, width, 0, 1, 0


def _vertical_flip(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    return 1, 0, 0, 0, -1, height


def _quarter_turn(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    turns = 1 + (uniform(seeds, 1)[:, 0] * 3).long().numpy()
    return _rotate(90.0 * turns, seeds, height, width)


def _crop(strength: Matrices, seeds: Tensor, height: int, width: int) -> Numbers:
    places = uniform(seeds, 2).double().numpy()
    largest = np.floor(strength[:, None] * (width, height) + 1e-6)  # not 1 pixel less since 0.1 * 30 < 3
    shifts = np.floor(places * (2 * largest + 1)) - largest
    return 1, 0, shifts[:, 0], 0, 1, shifts[:, 1]


#: Numbers of the affine map of each operation, row by row: in PIL's order, of strengths ``(images,)`` and seeds.
AFFINE: dict[str, Callable[[Matrices, Tensor, int, int], Numbers]] = {
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "zoom": _zoom,
    "horizontal_flip": _horizontal_flip,
    "vertical_flip": _vertical_flip,
    "quarter_turn": _quarter_turn,
    "crop": _crop,
}


#: The map that leaves everything where it is.
IDENTITY: Matrices = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def affine_matrices(name: str, strengths: Matrices, seeds: Tensor, height: int, width: int) -> Matrices:
    """Maps ``(images, 2, 3)`` from places of the result to places of the image.

    Positive strengths move the image right or down and turn it counter-clockwise; a sheared image is read the more to
    the right the lower the row is, as with PIL's ``AFFINE``.

    Args:
        name: One of :data:`AFFINE`.
        strengths: Signed strengths ``(images,)``, float64.
        seeds: What the operation draws from ``(images,)``.
        height: Of the images, in pixels.
        width: Likewise.
    """
    matrices = np.empty((len(strengths), 6))
    for place, number in enumerate(AFFINE[name](strengths, seeds, height, width)):
        matrices[:, place] = number
    return matrices.reshape(-1, 2, 3)


def composed(outer: Matrices, inner: Matrices) -> Matrices:
    """Maps ``(images, 2, 3)`` that do ``inner`` to a place, then ``outer``."""
    product = outer[:, :, :2] @ inner
    product[:, :, 2] += outer[:, :, 2]
    return product


def displacements(strengths: Matrices, seeds: Tensor, height: int, width: int) -> Tensor:
    """Smooth random fields ``(images, 2, height, width)``: how far right and down each place is read, in pixels.

    Simard, Steinkraus and Platt, *Best practices for convolutional neural networks*, 2003 (section 2.1): uniform
    numbers in (-1, 1), smoothed by a Gaussian. Its standard deviation is 4 % of the width, at least 4 pixels. Two
    points depart from the paper: the field is scaled so that its largest displacement is ``strength`` times the width,
    since the smoothing alone would make it smaller by a factor that depends on the image's size; and it is scaled down
    where it would fold the image, that is, where the Jacobian determinant of the map is not positive everywhere.

    Args:
        strengths: ``(images,)``, largest displacement as a share of the width.
        seeds: ``(images,)``, on the device where the fields are needed.
        height: In pixels.
        width: In pixels.
    """
    deviation = max(4.0, 0.04 * width)
    fields = uniform(seeds, 2 * height * width).view(-1, 2, height, width) * 2 - 1
    along_y, along_x = (gaussian_matrix(size, deviation, seeds.device) for size in (height, width))
    with torch.autocast(seeds.device.type, enabled=False):
        fields = along_y @ fields @ along_x.T
    largest = fields.flatten(1).abs().amax(1).clamp_(min=1e-12)
    alpha = torch.from_numpy(strengths * width).float().to(seeds.device, non_blocking=True)
    fields = fields * (alpha / largest).view(-1, 1, 1, 1)
    if height < 2 or width < 2:
        return fields
    # Between four pixels the determinant is largest or smallest at one of them. At scale t it is 1 + b t + c t^2 there,
    # and its first root is the inverse of the larger root of s^2 + b s + c.
    right, down = fields.diff(dim=3), fields.diff(dim=2)
    steepest = torch.zeros(len(fields), device=fields.device)
    for above in (right[:, :, :-1], right[:, :, 1:]):
        for beside in (down[..., :-1], down[..., 1:]):
            b = above[:, 0] + beside[:, 1]
            c = above[:, 0] * beside[:, 1] - above[:, 1] * beside[:, 0]
            discriminant = b.square() - 4 * c
            roots = torch.where(discriminant < 0, 0, (discriminant.clamp(min=0).sqrt() - b) / 2)
            steepest = torch.maximum(steepest, roots.flatten(1).amax(1))
    scale = (0.9 / steepest.clamp(min=1e-12)).clamp(max=1)
    return fields * scale.view(-1, 1, 1, 1)


def gaussian_matrix(size: int, deviation: float, device: torch.device) -> Tensor:
    """Matrix ``(size, size)`` that smooths a line of pixels; at the ends the weights inside are scaled to sum to 1."""
    places = torch.arange(size, device=device, dtype=torch.float32)
    weights = torch.exp(-(places - places[:, None]).square() / (2 * deviation**2))
    return weights / weights.sum(1, keepdim=True)


def resample(
    images: Tensor, matrices: Matrices, fill: Tensor, interpolation: Interpolation, displaced: Tensor | None = None
) -> Tensor:
    """Read images at the places that a map gives for each pixel of the result.

    Args:
        images: ``(images, channels, height, width)``.
        matrices: ``(images, 2, 3)``, float64, from the result's places to the images'.
        fill: ``(channels,)``, what is outside of the images.
        interpolation: ``nearest`` takes the pixel that a place is in, by the same fixed-point numbers as PIL.
        displaced: Places ``(images, 2, height, width)`` that the matrices are applied to, in place of the pixels'
            centres.
    """
    height, width = images.shape[2:]
    device = images.device
    if displaced is None and interpolation == "nearest":
        return _read(images, *_fixed_point(matrices, height, width, device), fill)
    numbers = torch.from_numpy(matrices).float().to(device, non_blocking=True)[..., None, None]
    if displaced is None:
        displaced = centres(height, width, device)[None]
    x, y = (
        (numbers[:, axis, 0] * displaced[:, 0]).add_(numbers[:, axis, 1] * displaced[:, 1]).add_(numbers[:, axis, 2])
        for axis in (0, 1)
    )
    if interpolation == "nearest":
        # clamped before they become whole numbers, which have no infinity
        x, y = x.floor_().clamp_(-1, width).to(torch.int32), y.floor_().clamp_(-1, height).to(torch.int32)
        return _read(images, x.add_(1), y.add_(1), fill)
    # PIL fills where a place is outside, and does not mix the fill into the pixels at the border
    outside = ((x < 0) | (x >= width)) | ((y < 0) | (y >= height))
    grid = torch.stack([x.mul_(2 / width).sub_(1), y.mul_(2 / height).sub_(1)], dim=-1)
    read = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    read = torch.where(outside[:, None], fill.view(1, -1, 1, 1).float(), read)
    return (read.round_() if images.dtype == torch.uint8 else read).to(images.dtype)


def _fixed_point(matrices: Matrices, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Column and row ``(images, height, width)`` that each pixel is in, plus 1; 0 and below, or beyond: outside.

    By PIL's ``affine_fixed`` (src/libImaging/Geometry.c): with 16 binary digits after the point.
    """
    numbers = matrices.copy()
    # the place of the first pixel's centre, and a pixel more for the border that is outside
    numbers[:, :, 2] += numbers[:, :, 0] * 0.5 + numbers[:, :, 1] * 0.5
    numbers = np.floor(numbers * 65536 + 0.5)
    numbers[:, :, 2] += 65536
    largest = np.abs(numbers) @ (width, height, 1.0)
    dtype = torch.int32 if largest.max() < 2**31 else torch.int64
    fixed = torch.from_numpy(numbers).to(dtype).to(device, non_blocking=True)
    along_x = fixed[:, :, 0:1] * torch.arange(width, dtype=dtype, device=device) + fixed[:, :, 2:]
    along_y = fixed[:, :, 1:2] * torch.arange(height, dtype=dtype, device=device)
    x, y = (
        (along_y[:, axis, :, None] + along_x[:, axis, None]).bitwise_right_shift_(16).clamp_(0, size + 1)
        for axis, size in ((0, width), (1, height))
    )
    return x, y


def centres(height: int, width: int, device: torch.device) -> Tensor:
    """Places ``(2, height, width)`` of the pixels' centres: x, then y."""
    rows = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    columns = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])


def at(fields: Tensor, places: Tensor) -> Tensor:
    """Values of fields ``(images, 2, height, width)`` at places of the same shape, interpolated."""
    height, width = fields.shape[2:]
    grid = torch.stack([places[:, 0] * (2 / width) - 1, places[:, 1] * (2 / height) - 1], dim=-1)
    return F.grid_sample(fields, grid, mode="bilinear", padding_mode="border", align_corners=False)


def moved(matrices: Matrices, places: Tensor) -> Tensor:
    """Places ``(images or 1, 2, height, width)`` under the maps ``(images, 2, 3)``."""
    numbers = torch.from_numpy(matrices).float().to(places.device, non_blocking=True)
    numbers = numbers[..., None, None]
    return numbers[:, :, 0] * places[:, :1] + numbers[:, :, 1] * places[:, 1:] + numbers[:, :, 2]


def _read(images: Tensor, x: Tensor, y: Tensor, fill: Tensor) -> Tensor:
    """``images[i, :, y[i] - 1, x[i] - 1]``, the fill for rows and columns just outside; ``x`` and ``y`` are used up."""
    count, channels, height, width = images.shape
    padded = images.new_empty(count, channels, height + 2, width + 2).copy_(fill.view(1, -1, 1, 1))
    padded[:, :, 1:-1, 1:-1] = images
    places = y.mul_(width + 2).add_(x).view(count, 1, -1).long()
    return padded.flatten(2).gather(2, places.expand(-1, channels, -1)).view(images.shape)
