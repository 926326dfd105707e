"""Norms of several edges side by side, for :mod:`~lightning_automl.models.fused_cell`.

Letters: ``N`` images, ``C`` channels, ``E`` edges.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.models.layers import SyncBatchNorm2d

#: A norm's channels, given zeros at once for so many: fewer calls than one for each norm.
_BLOCK = 4096


class Norms:
    """Applies the norms of one cell, and at the end moves their running statistics all at once."""

    def __init__(self) -> None:
        self._running: dict[float, list[Tensor]] = defaultdict(list)  # by momentum
        self._found: dict[float, list[Tensor]] = defaultdict(list)
        self._counts: list[Tensor] = []
        self._zeros: Tensor | None = None

    def apply(
        self,
        features: Tensor,
        norms: Sequence[Any],
        scale: Tensor | None = None,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Normalise by ``E`` norms side by side, then multiply by ``scale``.

        Args:
            features: ``(N, E * C, height, width)``; ``(N, C, height, width)`` if all norms are :func:`equal`.
            norms: ``E`` norms of ``C`` channels.
            scale: One number a channel of the features, passed on as the norm's weight: so it costs no pass of its own
                forward, and backward its gradient comes with the others.
            again: Computes the features once more. If given, they are not kept for the way back.
        """
        if again is not None and torch.is_grad_enabled():
            with computed_again(features, again):
                return self.apply(features, norms, scale)
        first = norms[0]
        if all(type(norm) is nn.Identity for norm in norms):
            return features if scale is None else features * scale[:, None, None]
        alike = _alike(norms)
        if alike and _is_batch_norm(first):
            return self._batch_norm(features, norms, *_affine(norms, scale))
        if alike and type(first) is nn.GroupNorm:
            groups = first.num_groups * (features.shape[1] // first.num_channels)
            return F.group_norm(features, groups, *_affine(norms, scale), first.eps)
        parts = [norm(part) for norm, part in zip(norms, features.chunk(len(norms), 1), strict=True)]
        out = torch.cat(parts, 1)
        return out if scale is None else out * scale[:, None, None]

    def _batch_norm(self, features: Tensor, norms: Sequence[Any], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        first = norms[0]
        mean = variance = None
        if first.running_mean is not None and not first.training:
            mean = torch.cat([norm.running_mean for norm in norms])
            variance = torch.cat([norm.running_var for norm in norms])
            return F.batch_norm(features, mean, variance, weight, bias, False, 0.0, first.eps)
        if first.running_mean is not None and first.track_running_stats:
            mean, variance = self._zero_statistics(features.shape[1], first.running_mean)
            times = len(norms) * first.num_features // features.shape[1]  # E if one stands for all
            for norm, own_mean, own_variance in zip(
                norms,
                torch.split(mean, first.num_features) * times,
                torch.split(variance, first.num_features) * times,
                strict=True,
            ):
                self._running[first.momentum] += [norm.running_mean, norm.running_var]
                self._found[first.momentum] += [own_mean, own_variance]
                self._counts.append(norm.num_batches_tracked)
        # Running statistics that start at 0 and move by all of the way become those of the batch.
        return F.batch_norm(features, mean, variance, weight, bias, True, 1.0, first.eps)

    def _zero_statistics(self, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._zeros is None or self._zeros.shape[1] < channels:
            self._zeros = torch.zeros(2, max(channels, _BLOCK), dtype=like.dtype, device=like.device)
        mean, variance = self._zeros[:, :channels]
        self._zeros = self._zeros[:, channels:]
        return mean, variance

    @torch.no_grad()
    def remember(self) -> None:
        """Move the running statistics of all batch norms that were applied, as each would have done itself."""
        for momentum, running in self._running.items():
            torch._foreach_lerp_(running, self._found[momentum], momentum)
        if self._counts:
            torch._foreach_add_(self._counts, 1)


@contextmanager
def computed_again(features: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Let autograd not keep these features in what follows, but compute them when it needs them."""
    address, shape = features.data_ptr(), features.shape  # and not the features, which would be kept by that

    def pack(tensor: Tensor) -> Tensor | None:
        return None if tensor.data_ptr() == address and tensor.shape == shape else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return again()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def equal(norms: Sequence[Any]) -> bool:
    """Whether norms without parameters give the same on the same features."""
    first = norms[0]
    if type(first) is nn.Identity:
        return _alike(norms)
    known = type(first) is nn.GroupNorm or _is_batch_norm(first)
    own = first._buffers.get("running_mean") is not None and not first.training
    return known and not own and first._parameters["weight"] is None and _alike(norms)


def _is_batch_norm(norm: nn.Module) -> bool:
    """Whether ``F.batch_norm`` is what it does: no subclass, no statistics of other ranks."""
    if type(norm) is SyncBatchNorm2d:
        return not (norm.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    return type(norm) is nn.BatchNorm2d and norm.momentum is not None


_SETTINGS = (
    "eps",
    "momentum",
    "training",
    "track_running_stats",
    "affine",
    "num_features",
    "num_groups",
    "num_channels",
)


def _alike(norms: Sequence[nn.Module]) -> bool:
    """Whether norms differ at most in what they have learned."""
    # not getattr, which is slow on modules, and this is asked for each norm in each pass
    settings = [(type(norm), *map(vars(norm).get, _SETTINGS)) for norm in norms]
    return settings.count(settings[0]) == len(settings)


def _affine(norms: Sequence[Any], scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of norms side by side, both times the scale."""
    if norms[0]._parameters["weight"] is None:
        return scale, None
    weight = torch.cat([norm.weight for norm in norms])
    bias = torch.cat([norm.bias for norm in norms])
    return (weight, bias) if scale is None else (weight * scale, bias * scale)
