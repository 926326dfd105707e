"""What becomes of pixels: formulas on the levels 0 to 255, as PIL has them.

An operation has one *amount* an image, the number that its formula needs (a factor, a threshold, …), made from the
strength by :func:`amounts`. Amounts are float32, as PIL's are where it matters.

Operations of :data:`POINTWISE` change a channel's levels by a function of the level and of a statistic of the image.
For uint8 images the formula is evaluated once for each of the 256 levels, and pixels are looked up in that table; for
float images it is evaluated on the pixels. Those of :data:`FILTERS` need a pixel's place, channels or neighbours.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_automl.augment.draws import uniform

_FACTOR: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda strengths: 1 + strengths  # noqa: E731

#: What the formulas take, of signed strengths; the strength itself where an operation is not listed.
_AMOUNTS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "brightness": _FACTOR,
    "contrast": _FACTOR,
    "color": _FACTOR,
    "sharpness": _FACTOR,
    "gamma": _FACTOR,
    "solarize": lambda strengths: 256 - strengths,
    "solarize_add": np.floor,
    "posterize": lambda strengths: np.exp2(np.round(strengths)),
    "noise": lambda strengths: 255 * strengths,
}


def amounts(name: str, strengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the formula of an operation takes, for signed strengths ``(images,)``."""
    return _AMOUNTS[name](strengths) if name in _AMOUNTS else strengths


def brightness(levels: Tensor, factor: Tensor, statistic: Tensor) -> Tensor:
    """Blend with black."""
    return levels * factor


def contrast(levels: Tensor, factor: Tensor, mean: Tensor) -> Tensor:
    """Blend with the mean of the grey image."""
    return (levels - mean).mul_(factor).add_(mean)


def invert(levels: Tensor, amount: Tensor, statistic: Tensor) -> Tensor:
    """Bright becomes dark."""
    return 255 - levels


def solarize(levels: Tensor, threshold: Tensor, statistic: Tensor) -> Tensor:
    """Invert what is at or above the threshold, by the nearest level."""
    return torch.where(levels.round() >= threshold, 255 - levels, levels)


def solarize_add(levels: Tensor, addition: Tensor, statistic: Tensor) -> Tensor:
    """Brighten what is below 128."""
    return torch.where(levels.round() < 128, levels + addition, levels)


def posterize(levels: Tensor, step: Tensor, statistic: Tensor) -> Tensor:
    """Set the lowest bits to zero: round down to a multiple of the step."""
    return (levels / step).floor_().mul_(step)


def gamma(levels: Tensor, exponent: Tensor, statistic: Tensor) -> Tensor:
    """Raise levels, as shares of 255, to a power; rounded for uint8 images."""
    return (levels / 255).pow(exponent).mul_(255)


def autocontrast(levels: Tensor, amount: Tensor, extremes: Tensor) -> Tensor:
    """Stretch each channel so that its darkest pixel is 0 and its brightest 255, unless they are equal."""
    # PIL computes in double precision and cuts off the digits, so 254.99… for 255 is 254 there, and is to be here
    # (`255 / tensor` would be 255 times the reciprocal, which is not the same)
    low, high = extremes.to(_exact(levels.device)).unbind(2)
    flat = low == high
    low, high = low.masked_fill(flat, 0), high.masked_fill(flat, 255)
    scale = torch.full_like(low, 255).div_(high.sub_(low)).unsqueeze(2)
    return levels.to(scale.dtype).mul(scale).sub_(low.unsqueeze(2).mul_(scale)).trunc_()


def equalize(levels: Tensor, amount: Tensor, table: Tensor) -> Tensor:
    """Spread the levels of each channel so that they are used equally often; ``levels`` are all 256."""
    return table


def grey_mean(images: Tensor) -> Tensor:
    """Mean ``(images, 1, 1)`` of the grey image, rounded, of uint8 images or of levels."""
    luminance = grey(images.to(torch.float32))
    pixels = luminance.shape[2] * luminance.shape[3]
    # row by row, since whole numbers are exact in float32 up to 2**24 only
    sums = luminance.sum(3).round_().long().sum(2)
    return (2 * sums + pixels).div_(2 * pixels, rounding_mode="floor").to(torch.float32).unsqueeze(2)


def extremes(images: Tensor) -> Tensor:
    """Darkest and brightest level ``(images, channels, 2)`` of uint8 images."""
    pixels = images.flatten(2)
    return torch.stack([pixels.amin(2), pixels.amax(2)], dim=2)


def equalizing(images: Tensor) -> Tensor:
    """What becomes of each level when the channel is equalized ``(images, channels, 256)``, of uint8 images.

    As PIL's ``ImageOps.equalize``: the brightest level that is there does not count, and where less than 255 pixels
    are left nothing changes.
    """
    values = images.flatten(2)
    brightest = values.amax(2, keepdim=True).long()
    values = values.long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, values, torch.ones(1, dtype=torch.int32, device=images.device).expand_as(values))
    step = (values.shape[2] - counts.gather(2, brightest)).div_(255, rounding_mode="floor")
    below = counts.cumsum(2, dtype=torch.int32).sub_(counts)  # of float numbers a GPU has no deterministic sum
    # Quotients of whole numbers up to 2**24 are never rounded up to the next one in float32.
    table = below.add_(step // 2).to(torch.float32).div_(step.clamp(min=1)).floor_()
    spread = (step > 0).to(torch.float32)
    levels = torch.arange(256, dtype=torch.float32, device=images.device)
    return table.mul_(spread).add_(levels * (1 - spread))


#: Formula of levels ``(images, channels, any)``, amounts ``(images, 1, 1)`` and a statistic.
POINTWISE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "invert": invert,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "posterize": posterize,
    "gamma": gamma,
    "autocontrast": autocontrast,
    "equalize": equalize,
}

#: Statistics that formulas need.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "contrast": grey_mean,
    "autocontrast": extremes,
    "equalize": equalizing,
}

#: Operations that are about 256 levels; float images are rounded to these for them.
EIGHT_BITS = ("posterize", "autocontrast", "equalize")

#: Operations whose results are rounded for uint8 images; PIL cuts off the digits of all others.
ROUNDED = ("gamma", "noise", "blur")


def grey(levels: Tensor) -> Tensor:
    """Luminance ``(images, 1, height, width)`` of three channels (ITU-R 601, as PIL's mode L); else their mean."""
    if levels.shape[1] == 3:
        red, green, blue = levels.unbind(1)
        # PIL's whole numbers, all below 2**24
        total = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000)
        return total.mul_(2.0**-16).floor_().unsqueeze(1)
    return levels.mean(1, keepdim=True)


def color(levels: Tensor, factor: Tensor, seeds: Tensor) -> Tensor:
    """Blend with the grey image."""
    luminance = grey(levels)
    return (levels - luminance).mul_(factor).add_(luminance)


def noise(levels: Tensor, deviation: Tensor, seeds: Tensor) -> Tensor:
    """Add to every value a normal number."""
    # uniform numbers are multiples of 2**-24 in [0, 1); the middle of their interval has a finite logarithm
    drawn: Tensor = torch.special.ndtri(uniform(seeds, levels[0].numel()).add_(2.0**-25))
    return drawn.view(levels.shape).mul_(deviation).add_(levels)


def sharpness(levels: Tensor, factor: Tensor, seeds: Tensor) -> Tensor:
    """Blend with the smoothed image; pixels at the border stay as they are."""
    if min(levels.shape[2:]) < 3:
        return levels
    # All neighbours in memory are added up, which for pixels at the border are not those in the image, since long
    # loops are faster than rows; the inner pixels are taken in the end.
    flat, width = levels.flatten(), levels.shape[3]
    rows = (flat[:-2] + flat[2:]).add_(flat[1:-1])
    total = (
        (rows[: -2 * width] + rows[2 * width :]).add_(rows[width:-width]).add_(flat[width + 1 : -width - 1], alpha=4)
    )
    smooth = torch.zeros_like(levels)
    # never at .5, so that PIL's division gives the same
    torch.floor(total.mul_(1 / 13).add_(0.5), out=smooth.view(-1)[width + 1 : -width - 1])
    blended = (levels - smooth).mul_(factor).add_(smooth)
    levels[:, :, 1:-1, 1:-1] = blended[:, :, 1:-1, 1:-1]
    return levels


def blur(levels: Tensor, deviation: Tensor, seeds: Tensor) -> Tensor:
    """Smooth by a Gaussian, with a standard deviation in pixels; at the borders by its part inside."""
    smoothing: list[Tensor] = []
    for size in levels.shape[2:]:
        places = torch.arange(size, device=levels.device, dtype=torch.float32)
        weights = torch.exp(-(places - places[:, None]).square() / (2 * deviation.square()))
        smoothing.append(weights / weights.sum(-1, keepdim=True))
    along_y, along_x = smoothing
    with torch.autocast(levels.device.type, enabled=False):
        return along_y @ levels @ along_x.mT


def cutout(levels: Tensor, share: Tensor, seeds: Tensor) -> Tensor:
    """Fill a square, its side a share of the width, around any pixel, with grey; clipped at the border.

    The grey is that of Fast AutoAugment's code, the mean of ImageNet's images.
    """
    height, width = levels.shape[2:]
    side = (share * width).round_()
    places = uniform(seeds, 2)
    top = (places[:, :1] * height).floor_().view(-1, 1, 1, 1) - (side / 2).floor_()
    left = (places[:, 1:] * width).floor_().view(-1, 1, 1, 1) - (side / 2).floor_()
    rows = torch.arange(height, device=levels.device).view(-1, 1)
    columns = torch.arange(width, device=levels.device)
    inside = ((rows >= top) & (rows < top + side)) & ((columns >= left) & (columns < left + side))
    filling = (125.0, 123.0, 114.0) if levels.shape[1] == 3 else (124.0,)
    grey_levels = torch.tensor(filling).to(levels.device, non_blocking=True).view(1, -1, 1, 1)
    return torch.where(inside, grey_levels, levels)


#: Formula of levels ``(images, channels, height, width)``, which it may use up, amounts ``(images, 1, 1, 1)`` and
#: seeds ``(images,)``.
FILTERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "color": color,
    "sharpness": sharpness,
    "noise": noise,
    "blur": blur,
    "cutout": cutout,
}


#: Those of them that draw, from the seeds.
DRAWING = ("noise", "cutout")


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which has no other
