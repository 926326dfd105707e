"""Layers and checks that several networks share."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.rundir import UserError

Activation = Literal["relu", "gelu", "silu", "elu", "leaky_relu", "tanh"]
Norm = Literal["batch", "sync_batch", "group", "none"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
}


def activation_layer(name: Activation) -> nn.Module:
    """Build an activation.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; known: {', '.join(_ACTIVATIONS)}")
    # Not in place: hooks on the layer before, such as those of adapters and histograms, keep what they saw.
    return _ACTIVATIONS[name]()


def norm_layer(name: Norm, channels: int, affine: bool = True) -> nn.Module:
    """Build a normalisation of images ``(batch, channels, height, width)``.

    ``sync_batch`` is :class:`SyncBatchNorm2d`. ``group`` is group normalisation (Wu and He 2018,
    https://arxiv.org/abs/1803.08494), which does not depend on the other images of the batch. The paper has 32 groups
    for 64 channels and more; the networks here are narrower, so there are 8, or as many as divide the channels.

    Args:
        name: Which one.
        channels: Channels of the images.
        affine: Whether each channel then has a scale and a shift to learn.

    Raises:
        UserError: If the name is unknown.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels, affine=affine)
    if name == "sync_batch":
        return SyncBatchNorm2d(channels, affine=affine)
    if name == "group":
        groups = next(groups for groups in (8, 7, 6, 5, 4, 3, 2, 1) if channels % groups == 0)
        return nn.GroupNorm(groups, channels, affine=affine)
    if name == "none":
        return nn.Identity()
    raise UserError(f"unknown norm {name!r}; known: {', '.join(get_args(Norm))}")


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all ranks, so that many ranks are one process with the joint batch.

    Unlike ``nn.SyncBatchNorm`` it also works on CPUs (gloo) and in float64, can be differentiated twice, and weighs
    ranks by their images. In evaluation, and without a process group, it is plain batch normalisation. In training
    every rank has to call it, as often and in the same order as the others, and has to go backward likewise.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images ``(batch, channels, height, width)``, in their own dtype, by statistics in float32 or 64."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(images)
        self._check_input_dim(images)
        exact = images if images.dtype == torch.float64 else images.float()
        mean, variance, count = _joint_statistics(exact)
        if self.track_running_stats:
            self._track(mean.detach(), (variance * (count / (count - 1).clamp(min=1))).detach())
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        # One product and sum, so that no centred copy of the images is kept for the way back.
        return torch.addcmul(shift[:, None, None], exact, scale[:, None, None]).to(images.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of this batch, as ``nn.BatchNorm2d`` does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.num_batches_tracked.to(mean).reciprocal() if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            running.mul_(1 - share).add_(value * share)


class _Statistics(torch.autograd.Function):
    """Mean and (biased) variance ``(channels,)`` of images, as ``torch.var_mean``, which is up to nine times slower.

    (On a CPU and channels_last, forward and backward.) Nothing but the images is kept for the way back, and that is
    made of what can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = images.mean((0, 2, 3))
        variance = (images - mean[:, None, None]).square_().mean((0, 2, 3))
        ctx.save_for_backward(images, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        images, mean = ctx.saved_tensors
        count = images.numel() // images.shape[1]
        slope = of_variance * (2 / count)
        return torch.addcmul((of_mean / count - slope * mean)[:, None, None], images, slope[:, None, None])


def _joint_statistics(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance ``(channels,)`` of all ranks' images, differentiable, and of how many values, ``()``.

    Each rank puts its mean, its variance and its count into a row of its own; one sum over ranks hands all rows to all.
    They are joined as Chan, Golub and LeVeque 1979 do, which loses nothing where the mean is large against the
    deviation, as the mean of squares would.
    """
    from torch.distributed.nn.functional import all_reduce  # not in every build of torch

    count = images.numel() // images.shape[1]
    if count:
        own_mean, own_variance = _Statistics.apply(images)
    else:  # a rank without images takes part all the same
        own_mean = own_variance = images.sum((0, 2, 3))
    row = torch.cat([own_mean, own_variance, own_mean.new_full((1,), count)])
    rows = row.new_zeros(dist.get_world_size(), row.numel())
    rows[dist.get_rank()] = row
    rows = all_reduce(rows)  # type: ignore[no-untyped-call]
    means, variances, counts = rows[:, : len(own_mean)], rows[:, len(own_mean) : -1], rows[:, -1:]
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean, variance, total


def check_images(images: Tensor, channels: int, size: tuple[int, int] | None = None) -> None:
    """Raise a UserError if images ``(batch, channels, height, width)`` are not what a network was built for."""
    if images.ndim != 4:
        raise UserError(
            f"images have the shape {tuple(images.shape)}; the network takes (batch, channels, height, width)"
        )
    if images.shape[1] != channels:
        raise UserError(
            f"images have {images.shape[1]} channels, but the network was built for {channels}; "
            f"set its in_channels to {images.shape[1]}"
        )
    height, width = images.shape[2:]
    if size is not None and (height, width) != size:
        raise UserError(
            f"images have {height} x {width} pixels, but the network was built for {size[0]} x {size[1]}; "
            f"set its image_size to [{height}, {width}]"
        )


def channel_normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]] | None:
    """Check the mean and standard deviation of each channel with which weights were trained.

    Returns:
        Both as lists of ``channels`` numbers, or ``None`` when neither is given.

    Raises:
        UserError: If only one is given, the numbers are not one a channel, or a standard deviation is not above 0.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UserError(f"{'mean' if mean is None else 'std'} is missing; give both mean and std, or neither")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UserError(f"{name} has {len(values)} numbers for {channels} channels; give one a channel")
    if min(std) <= 0:
        raise UserError(f"std is {list(std)}; standard deviations are above 0")
    return list(mean), list(std)


def check_counts(least: int = 1, **counts: int) -> None:
    """Raise a UserError if one of the arguments, by its name, is less than ``least``."""
    for name, value in counts.items():
        if value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more")


def check_probability(name: str, value: float) -> None:
    """Raise a UserError if ``value`` is no probability in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"{name} is {value}; it is a probability in [0, 1)")


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images ``(batch, channels, height, width)``, float, bilinearly; those of that size come back as is.

    Args:
        images: Images of any size, in either memory format, which is kept.
        size: Height and width, in pixels.
    """
    height, width = images.shape[2:]
    if (height, width) == size:
        return images
    # A smaller image is averaged over all pixels that it stands for; a larger one would only be slower to make so.
    shrinks = height > size[0] or width > size[1]
    # in float32, since CPUs have no antialiasing for bfloat16
    return F.interpolate(images.float(), size, mode="bilinear", antialias=shrinks).to(images.dtype)
