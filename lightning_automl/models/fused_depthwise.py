"""Depthwise convolutions of several edges at once, with gradients in the form that CPUs are fast at.

PyTorch's CPU kernels (oneDNN 3.12) have no fast gradient of a depthwise convolution with gaps, nor of depthwise weights
that are more than three pixels wide: both are five to ten times as slow as their neighbours. The first is avoided by
:func:`phases`, the second by pairs of columns (:func:`_wide_weight_gradient`). All of it is exact.

Letters: ``N`` images, ``C`` channels, ``E`` edges that leave one state, each with a kernel of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Stride, padding and dilation, each of rows and of columns.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def depthwise(features: Tensor, weight: Tensor, geometry: Geometry, copies: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own kernels.

    What autograd would keep for the gradients is the ``E`` copies of the features; this keeps the features alone. It
    cannot be differentiated twice.

    Args:
        features: ``(N, C, height, width)``.
        weight: ``(E * C, 1, kernel, kernel)``, edge by edge.
        geometry: Of all kernels.
        copies: ``side_by_side(features, E)``, if there already.

    Returns:
        ``(N, E * C, height', width')``.
    """
    features = features.to(weight.dtype)
    if copies is None:
        copies = side_by_side(features.detach(), len(weight) // features.shape[1])
    # Two nodes for two gradients: autograd then leaves out the one that is not asked for. A single node would not know,
    # and an architecture step needs none of the weights.
    carrier = _Weights.apply(weight, features.detach(), geometry)
    out: Tensor = _Features.apply(features, carrier, weight.detach(), copies.to(weight.dtype), geometry)
    return out


def side_by_side(features: Tensor, edges: int) -> Tensor:
    """Copies of ``(N, C, height, width)`` along the channels, ``(N, edges * C, height, width)``."""
    return features if edges == 1 else torch.cat([features] * edges, 1)  # a fifth of the time of Tensor.repeat


def phases(features: Tensor) -> Tensor:
    """Part an image of even sides into four by odd and even rows and columns, ``(4 * N, C, height / 2, width / 2)``.

    A convolution of dilation 2 never mixes the four, and is one of dilation 1 in each of them.
    """
    batch, channels, height, width = features.shape
    parted = features.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels)
    return parted.permute(2, 4, 0, 1, 3, 5).reshape(4 * batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)


def joined(parted: Tensor) -> Tensor:
    """The image of which these are the :func:`phases`."""
    batch, channels, height, width = len(parted) // 4, *parted.shape[1:]
    image = parted.permute(0, 2, 3, 1).reshape(2, 2, batch, height, width, channels)
    return image.permute(2, 3, 0, 4, 1, 5).reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class _Features(torch.autograd.Function):
    """The convolution and its gradient for the features; the gradient for the weights goes on through the carrier."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, carrier: Tensor, weight: Tensor, copies: Tensor, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.channels, ctx.copies = geometry, features.shape[1], copies.shape
        return F.conv2d(copies, weight, None, *geometry, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, gradient, None, None, None
        (weight,) = ctx.saved_tensors
        # only the shape of the convolved features counts
        shape = torch.empty(ctx.copies, dtype=gradient.dtype, device=gradient.device, memory_format=layout_of(gradient))
        copies = _gradient(gradient, shape, weight, ctx.geometry, of_weight=False)
        first, *others = torch.split(copies, ctx.channels, 1)
        if others:
            first = first + others[0]
        for other in others[1:]:
            first += other
        return first, gradient, None, None, None


class _Weights(torch.autograd.Function):
    """Gives a tensor that only carries the convolution's gradient; it has its shape and no memory of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, features: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(features)
        ctx.geometry, ctx.shape = geometry, weight.shape
        sides = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in zip(
                features.shape[2:], weight.shape[2:], *geometry, strict=True
            )
        ]
        return weight.new_empty(1).expand(len(features), len(weight), *sides)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        weight = gradient.new_empty(ctx.shape)
        stride, padding, dilation = ctx.geometry
        width = features.shape[3]
        if (
            features.device.type == "cpu"
            and (weight.shape[3], padding[1], stride, dilation) == (5, 2, (1, 1), (1, 1))
            and width % 2 == 0
            and width >= 8  # narrower ones have too little in each of the two calls
        ):
            return _wide_weight_gradient(gradient, features, weight, padding[0]), None, None
        copies = side_by_side(features, len(weight) // features.shape[1])
        return _gradient(gradient, copies, weight, ctx.geometry, of_weight=True), None, None


def _wide_weight_gradient(gradient: Tensor, features: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Gradient of kernels five columns wide by two of three columns.

    With two neighbouring columns taken as two channels, so that there are half as many columns, the even columns of a
    kernel connect equal halves of a pair and the odd ones unequal halves; both are at most three pairs apart.
    """
    channels, edges = len(weight), len(weight) // features.shape[1]
    narrow = weight.new_empty(2 * channels, 1, weight.shape[2], 3)
    geometry = (1, 1), (padding, 1), (1, 1)
    batch, _, height, width = gradient.shape
    pairs = gradient.permute(0, 2, 3, 1).reshape(batch, height, width // 2, 2 * channels).permute(0, 3, 1, 2)
    even, odd = [features[..., 0::2]] * edges, [features[..., 1::2]] * edges
    equal = _gradient(pairs, torch.cat(even + odd, 1), narrow, geometry, of_weight=True)
    unequal = _gradient(pairs, torch.cat(odd + even, 1), narrow, geometry, of_weight=True)
    found = torch.empty_like(weight)
    torch.add(equal[:channels], equal[channels:], out=found[..., 0::2])
    torch.add(unequal[:channels, ..., :2], unequal[channels:, ..., 1:], out=found[..., 1::2])
    return found


def _gradient(gradient: Tensor, features: Tensor, weight: Tensor, geometry: Geometry, of_weight: bool) -> Tensor:
    wanted = [not of_weight, of_weight, False]
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, features, weight, None, *geometry, False, [0, 0], len(weight), wanted
    )[int(of_weight)]
    return found


def layout_of(features: Tensor) -> torch.memory_format:
    """Channels_last where features are in it, else the usual layout."""
    last = features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
