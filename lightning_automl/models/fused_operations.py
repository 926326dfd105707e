"""One operation on all edges that leave a state, computed side by side, for :mod:`~lightning_automl.models.fused_cell`.

Letters: ``N`` images, ``C`` channels, ``E`` edges that leave the state.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.models.fused_depthwise import Geometry, depthwise, layout_of, phases, side_by_side
from lightning_automl.models.fused_norms import Norms
from lightning_automl.models.ops import (
    DepthwiseConv,
    DilatedConv,
    FactorizedConv,
    FactorizedReduce,
    ReluConvNorm,
    SeparableConv,
)


class Stage(NamedTuple):
    """ReLU, convolutions, norm: of one edge, or each a tuple of ``E``."""

    convolutions: tuple[Any, ...]
    norm: Any


#: Features of so many numbers are not kept for the way back if they are a mere product, which is made again: a third of
#: the memory would go into these. Smaller ones do not pay for the calls.
LARGE = 2**19

#: The operations that are stages one after the other.
STAGES: dict[type[nn.Module], Callable[..., list[Stage]]] = {
    ReluConvNorm: lambda op: [Stage((op.conv,), op.norm)],
    DepthwiseConv: lambda op: [Stage((op.depthwise,), op.norm)],
    DilatedConv: lambda op: [Stage((op.depthwise, op.pointwise), op.norm)],
    FactorizedConv: lambda op: [Stage((op.row, op.column), op.norm)],
    SeparableConv: lambda op: [
        Stage((op.depthwise1, op.pointwise1), op.norm1),
        Stage((op.depthwise2, op.pointwise2), op.norm2),
    ],
    # two convolutions side by side, not one after the other: see _reduced
    FactorizedReduce: lambda op: [Stage((op.conv1, op.conv2), op.norm)],
}


def stages_of(modules: Sequence[nn.Module]) -> list[Stage] | None:
    """The stages of ``E`` operations side by side, or ``None`` if these are no stages, or not the same but for weights.

    Only plain convolutions are, without an adapter's change and without hooks.
    """
    if len({type(module) for module in modules}) > 1 or type(modules[0]) not in STAGES:
        return None
    found = []
    for stages in zip(*(STAGES[type(module)](module) for module in modules), strict=True):
        convolutions = tuple(zip(*(stage.convolutions for stage in stages), strict=True))
        if not all(_alike(group) for group in convolutions):
            return None
        found.append(Stage(convolutions, tuple(stage.norm for stage in stages)))
    return found


_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _alike(convolutions: Sequence[Any]) -> bool:
    """Whether these are plain convolutions without bias and hooks, equal but for their weights."""
    if any(type(each) is not nn.Conv2d or each._forward_hooks or each._forward_pre_hooks for each in convolutions):
        return False
    # not getattr, which is slow on modules, and this is asked for each convolution in each pass
    settings = [[vars(convolution)[name] for name in _SETTINGS] for convolution in convolutions]
    biased = any(convolution._parameters["bias"] is not None for convolution in convolutions)
    return not biased and settings[0][-1] == "zeros" and settings.count(settings[0]) == len(settings)


class Weights:
    """The weights of all convolutions of a cell, put side by side by one call forward and one backward.

    Args:
        groups: Each ``E`` convolutions that will be one.
        device: Where, ``cpu`` or another type; under its autocast they are cast.
    """

    def __init__(self, groups: Sequence[Sequence[Any]], device: str) -> None:
        self._parts: dict[int, Tensor] = {}
        if not groups:
            return
        together = torch.cat([convolution.weight.flatten() for group in groups for convolution in group])
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            together = together.to(torch.get_autocast_dtype(device))
        parts = torch.split(together, [len(group) * group[0].weight.numel() for group in groups])
        self._parts = {
            id(group): part.view(-1, *group[0].weight.shape[1:]) for group, part in zip(groups, parts, strict=True)
        }

    def of(self, group: Sequence[Any]) -> Tensor:
        """``(E * outputs, inputs, kernel, kernel)``."""
        return self._parts[id(group)]


class State:
    """A state, and what several operations make of it first.

    Args:
        features: ``(N, C, height, width)``.
        edges: How many leave it.
    """

    def __init__(self, features: Tensor, edges: int) -> None:
        self.features = features
        self.edges = edges
        self._copies: dict[str, Tensor] = {}

    @cached_property
    def relu(self) -> Tensor:
        """Not below 0."""
        return F.relu(self.features)

    @cached_property
    def halved(self) -> Tensor:
        """Every other row and column of it."""
        return self.relu[:, :, ::2, ::2].contiguous(memory_format=layout_of(self.relu))

    @cached_property
    def phases(self) -> Tensor:
        """See :func:`~lightning_automl.models.fused_depthwise.phases`."""
        return phases(self.relu)

    def copies(self, of: str) -> Tensor:
        """``E`` copies of one of these side by side, outside of the graph."""
        if of not in self._copies:
            self._copies[of] = side_by_side(getattr(self, of).detach(), self.edges)
        return self._copies[of]

    def depthwise(self, group: Sequence[Any], weight: Tensor, apart: bool) -> tuple[Tensor, bool]:
        """A depthwise convolution of the ReLU for each edge.

        Args:
            group: ``E`` convolutions.
            weight: Theirs.
            apart: Whether what follows does not mind :func:`~lightning_automl.models.fused_depthwise.phases`.

        Returns:
            ``(N, E * C, height', width')`` and whether it is in phases.
        """
        stride, padding, dilation = geometry = _geometry(group[0])
        kernel = group[0].kernel_size
        view = "relu"
        if dilation == (2, 2) and padding == (kernel[0] // 2 * 2, kernel[1] // 2 * 2):
            # Every pixel that is used lies on the grid of the others: gaps become none.
            even = self.features.shape[2] % 2 == 0 and self.features.shape[3] % 2 == 0
            if stride == (2, 2):
                view = "halved"
            elif stride == (1, 1) and apart and even and self.features.device.type == "cpu":
                view = "phases"
            if view != "relu":
                geometry = (1, 1), (kernel[0] // 2, kernel[1] // 2), (1, 1)
        return depthwise(getattr(self, view), weight, geometry, self.copies(view)), view == "phases"


def applied(
    state: State, stages: Sequence[Stage], scale: Tensor, weights: Weights, norms: Norms
) -> tuple[Tensor, bool]:
    """An operation on all edges.

    Args:
        state: Where they begin.
        stages: What :func:`stages_of` gave.
        scale: What the outputs are multiplied by, ``(E * C,)``.
        weights: Of the cell.
        norms: Of the cell.

    Returns:
        ``(N, E * C, height', width')`` and whether it is in :func:`~lightning_automl.models.fused_depthwise.phases`.
    """
    features, parted = state.relu, False
    for number, stage in enumerate(stages):
        if number > 0:
            features = F.relu_(features)  # nothing else keeps what a norm gives
        again = None
        for position, group in enumerate(stage.convolutions):
            weight, first = weights.of(group), group[0]
            alone = number == position == 0  # the edges still have all the same
            if first.groups == first.in_channels == first.out_channels:
                if alone:
                    features, parted = state.depthwise(group, weight, apart=_pointwise_from_here(stages))
                else:
                    features = depthwise(features, weight, _geometry(first))
            elif alone and first.groups == 1:
                features = F.conv2d(features, weight, None, *_geometry(first))
            else:
                features = side_by_side(features, len(group)) if alone else features
                arguments = weight.detach(), None, *_geometry(first), first.groups * len(group)
                if first.kernel_size == (1, 1) and features.numel() >= LARGE:
                    again = partial(F.conv2d, features.detach(), *arguments)
                features = F.conv2d(features, weight, *arguments[1:])
        features = norms.apply(features, stage.norm, scale if number == len(stages) - 1 else None, again)
    return features, parted


def reduced(features: Tensor, stages: Sequence[Stage], scale: Tensor, weights: Weights, norms: Norms) -> Tensor:
    """:class:`~lightning_automl.models.ops.FactorizedReduce` of the ReLU on all edges, ``(N, E * C, height', width')``.

    The two convolutions become one of the pixels that each sees, joined along the channels.
    """
    ((group1, group2), own) = stages[0]
    height, width = features.shape[2:]
    if height % 2 or width % 2:
        features = F.pad(features, (0, width % 2, 0, height % 2))
    seen = torch.cat([features[:, :, ::2, ::2], features[:, :, 1::2, 1::2]], 1)
    channels = features.shape[1]
    half1 = F.pad(weights.of(group1).flatten(1), (0, channels)).view(len(group1), -1, 2 * channels)
    half2 = F.pad(weights.of(group2).flatten(1), (channels, 0)).view(len(group2), -1, 2 * channels)
    weight = torch.cat([half1, half2], 1).view(-1, 2 * channels, 1, 1)
    return norms.apply(F.conv2d(seen.to(weight.dtype), weight), own, scale)


def _pointwise_from_here(stages: Sequence[Stage]) -> bool:
    """Whether nothing after the first convolution looks at more than one pixel, or at one image."""
    others = [group[0].kernel_size for stage in stages for group in stage.convolutions][1:]
    batch = all(isinstance(norm, nn.BatchNorm2d | nn.Identity) for stage in stages for norm in stage.norm)
    return batch and set(others) <= {(1, 1)}


def _geometry(convolution: Any) -> Geometry:
    return convolution.stride, convolution.padding, convolution.dilation
