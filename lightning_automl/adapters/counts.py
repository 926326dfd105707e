"""How many parameters an adapter has, by formula: before a network is built, or without one.

Of a network with adapters, :func:`~lightning_automl.adapters.targets.adapter_parameters` counts those that are there.
"""

from dataclasses import dataclass
from typing import Literal

from lightning_automl.rundir import UserError


def lora_parameters(in_features: int, out_features: int, rank: int) -> int:
    """Parameters of the two factors of one linear layer: ``r (in + out)``.

    Hu et al., *LoRA*, ICLR 2022, https://arxiv.org/abs/2106.09685 (section 4.1).

    Raises:
        UserError: If a number is below 1.
    """
    _positive(in_features=in_features, out_features=out_features, rank=rank)
    return rank * (in_features + out_features)


@dataclass(frozen=True)
class AttentionCount:
    """Parameters of fine-tuning the attention of a transformer in full, and by low rank.

    Attributes:
        matrix: Of one projection ``width x width``.
        adapter_matrix: Of the adapter of one projection.
        full: Of all projections of all blocks; what full fine-tuning stores for each task.
        adapter: Of all adapters of one task.
        tasks: Number of tasks.
    """

    matrix: int
    adapter_matrix: int
    full: int
    adapter: int
    tasks: int

    @property
    def ratio(self) -> float:
        """How many times fewer parameters an adapter has: ``width / (2 rank)``."""
        return self.full / self.adapter

    @property
    def stored_by_adapters(self) -> int:
        """Parameters stored for all tasks: the projections once, an adapter a task."""
        return self.full + self.tasks * self.adapter

    @property
    def stored_in_full(self) -> int:
        """Parameters stored for all tasks by full fine-tuning."""
        return self.tasks * self.full


def attention_parameters(width: int, blocks: int, rank: int, matrices: int = 4, tasks: int = 1) -> AttentionCount:
    """Count the weights of the attention of a transformer and of its adapters, without biases.

    Neither the number of heads nor the vocabulary enters.

    Args:
        width: Features of a token; a projection has ``width x width`` weights.
        blocks: Number of transformer blocks.
        rank: Rank of the adapters.
        matrices: Adapted projections a block: 4 for query, key, value and output.
        tasks: Number of tasks whose weights are stored.

    Raises:
        UserError: If a number is below 1.
    """
    _positive(width=width, blocks=blocks, rank=rank, matrices=matrices, tasks=tasks)
    adapter_matrix = lora_parameters(width, width, rank)
    return AttentionCount(
        width**2, adapter_matrix, blocks * matrices * width**2, blocks * matrices * adapter_matrix, tasks
    )


def conv_lora_parameters(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    rank: int,
    groups: int = 1,
    form: Literal["composition", "weight", "matrix"] = "composition",
) -> int:
    """Parameters of a low-rank adapter of a convolution.

    Args:
        in_channels: Of the convolution.
        out_channels: Of the convolution.
        kernel_size: Side of a square kernel, or height and width.
        rank: Rank of the adapter.
        groups: Groups of the convolution.
        form: ``composition``, a convolution to ``rank`` channels and one of 1 x 1 pixels, or ``weight``, two factors of
            the weight as a matrix ``(out, in / groups * height * width)``: both ``r (out + in / groups * height *
            width)``, the first without groups. ``matrix`` is loralib's, two factors of a matrix ``(out * k, in * k)``,
            for square kernels
            only: ``r k^2 (in + out)``; with groups its second factor has ``out / groups * k`` rows.

    Raises:
        UserError: If a number is below 1, the groups do not divide the channels, or the form has no such kernel or
        groups.
    """
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    _positive(
        in_channels=in_channels, out_channels=out_channels, kernel_size=min(height, width), rank=rank, groups=groups
    )
    if in_channels % groups or out_channels % groups:
        raise UserError(
            f"groups is {groups}; it must divide in_channels, {in_channels}, and out_channels, {out_channels}"
        )
    if form == "matrix":
        if height != width:
            raise UserError(
                f"kernel_size is {height} x {width}, but the form matrix takes square kernels; use composition"
            )
        return rank * height**2 * (in_channels + out_channels // groups)
    if form == "composition" and groups > 1:
        raise UserError(f"groups is {groups}, but the form composition takes 1; use weight")
    if form not in ("composition", "weight"):
        raise UserError(f"unknown form {form!r}; known: composition, weight, matrix")
    return rank * (out_channels + in_channels // groups * height * width)


def conv_adapter_parameters(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int] = 3,
    compression: int = 8,
    scale_parameters: Literal["channel", "layer", "none"] = "channel",
) -> int:
    """Parameters of a convolutional adapter, with the biases of both of its convolutions, without a norm.

    Chen et al., *Conv-Adapter*, CVPR 2024 workshop, https://arxiv.org/abs/2208.07463 (section 3): ``in`` channels to
    ``in / compression`` by ``height x width`` pixels, each of which sees ``compression`` channels, then to ``out`` by 1
    x 1.

    Args:
        in_channels: Of the adapted module, or its output channels in the sequential schemes.
        out_channels: Of the adapted module.
        kernel_size: Side of a square kernel, or height and width.
        compression: Channels a channel of the bottleneck; divides ``in_channels``.
        scale_parameters: A learnable scale a channel, one a layer, or none (fixed).

    Raises:
        UserError: If a number is below 1, or the compression does not divide the channels.
    """
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    _positive(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=min(height, width),
        compression=compression,
    )
    if in_channels % compression:
        raise UserError(f"compression is {compression}; it must divide in_channels, {in_channels}")
    scales = {"channel": out_channels, "layer": 1, "none": 0}
    if scale_parameters not in scales:
        raise UserError(f"unknown scale_parameters {scale_parameters!r}; known: {', '.join(scales)}")
    bottleneck = in_channels // compression
    down = in_channels * height * width + bottleneck
    up = bottleneck * out_channels + out_channels
    return down + up + scales[scale_parameters]


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value}; it is a whole number of 1 or more")
