"""What becomes of pixels: formulas on the levels 0 to 255, as PIL has them.

Every formula takes levels ``(images, channels, height, width)`` as float32 and one strength an image; those for float
images are the same, with levels that are no whole numbers.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_automl.augment.draws import uniform

Strengths = NDArray[np.float64]


def grey(levels: Tensor) -> Tensor:
    """Luminance ``(images, 1, height, width)`` of three channels (ITU-R 601, as PIL's mode L); else their mean."""
    if levels.shape[1] == 3:
        red, green, blue = levels.unbind(1)
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) / 65536).floor().unsqueeze(1)
    return levels.mean(1, keepdim=True)


def _column(numbers: NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(torch.float32).to(like.device, non_blocking=True).view(-1, 1, 1, 1)


def _blend(degenerate: Tensor, levels: Tensor, strength: Strengths) -> Tensor:
    """From the degenerate image (factor 0) through the image (1) and beyond it: PIL's ``Image.blend``."""
    return degenerate + _column(1 + strength, levels) * (levels - degenerate)


def brightness(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Blend with black."""
    return levels * _column(1 + strength, levels)


def contrast(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Blend with the mean of the grey image, rounded."""
    mean = (grey(levels).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()
    return _blend(mean, levels, strength)


def color(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blend(grey(levels), levels, strength)


def invert(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Bright becomes dark."""
    return 255 - levels


def solarize(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Invert what is at or above the threshold ``256 - strength``."""
    return torch.where(levels >= _column(256 - strength, levels), 255 - levels, levels)


def posterize(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Set the lowest ``strength`` bits, rounded, to zero."""
    step = _column(2.0 ** np.round(strength), levels)
    return (levels.round() / step).floor() * step


def autocontrast(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Stretch each channel so that its darkest pixel is 0 and its brightest 255."""
    levels = levels.round().double()
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    scale = torch.where(high > low, 255 / (high - low).clamp(min=1), 1)
    offset = torch.where(high > low, -low * scale, 0)
    return (levels * scale + offset).trunc().float()


def equalize(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Spread the levels of each channel so that their histogram is flat (PIL's ``ImageOps.equalize``)."""
    values = levels.round().long().flatten(2)
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=levels.device)
    histogram.scatter_add_(2, values, torch.ones((), dtype=torch.long, device=levels.device).expand_as(values))
    last = histogram.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - last) // 255
    table = (histogram.cumsum(2) - histogram + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table, torch.arange(256, device=levels.device))
    return table.gather(2, values).view(levels.shape).float()


def gamma(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Raise levels, as shares of 255, to the power of ``1 + strength``; rounded for uint8 images."""
    return (levels / 255).pow(_column(1 + strength, levels)) * 255


def noise(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Add to every value a normal number with a standard deviation of ``strength * 255``."""
    # uniform numbers are multiples of 2**-24 in [0, 1); in the middle of their intervals the logarithms are finite
    drawn: Tensor = torch.special.ndtri(uniform(seeds, levels[0].numel()) + 2.0**-25)
    return levels + drawn.view(levels.shape) * _column(255 * strength, levels)


def sharpness(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Blend with the smoothed image; pixels at the border stay as they are."""
    if min(levels.shape[2:]) < 3:
        return levels
    inner = levels[:, :, 1:-1, 1:-1]
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    smooth = levels.clone()
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _blend(smooth, levels, strength)


def blur(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Smooth by a Gaussian with a standard deviation of ``strength`` pixels."""
    smoothed: list[Tensor] = []
    for along in (levels.shape[2], levels.shape[3]):
        places = torch.arange(along, device=levels.device, dtype=torch.float32)
        weights = torch.exp(-(places - places[:, None]).square() / (2 * _column(strength, levels).square()))
        smoothed.append(weights / weights.sum(-1, keepdim=True))
    along_y, along_x = smoothed
    return along_y @ levels @ along_x.mT


def cutout(levels: Tensor, strength: Strengths, seeds: Tensor) -> Tensor:
    """Fill a square, its side ``strength`` times the width, around any pixel, with grey; clipped at the border."""
    height, width = levels.shape[2:]
    side = _column(np.round(strength * width), levels)
    places = uniform(seeds, 2)
    top = ((places[:, 0] * height).floor().view(-1, 1, 1, 1)) - (side / 2).floor()
    left = ((places[:, 1] * width).floor().view(-1, 1, 1, 1)) - (side / 2).floor()
    rows = torch.arange(height, device=levels.device).view(-1, 1)
    columns = torch.arange(width, device=levels.device)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    filling = (125.0, 123.0, 114.0) if levels.shape[1] == 3 else (124.0,)
    return torch.where(inside, torch.tensor(filling, device=levels.device).view(1, -1, 1, 1), levels)


#: The formula of each operation.
FORMULAS: dict[str, Callable[[Tensor, Strengths, Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "color": color,
    "invert": invert,
    "solarize": solarize,
    "posterize": posterize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "gamma": gamma,
    "noise": noise,
    "sharpness": sharpness,
    "blur": blur,
    "cutout": cutout,
}

#: Operations whose results are rounded for uint8 images; PIL cuts off the digits of all others.
ROUNDED = ("gamma", "noise", "blur")
