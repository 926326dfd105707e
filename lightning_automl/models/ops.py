"""Candidate operations of searched cells, which keep the channels and at stride 2 make ``ceil(side / 2)`` of a side.

Liu, Simonyan and Yang, *DARTS: Differentiable Architecture Search*, ICLR 2019, https://arxiv.org/abs/1806.09055
(section 3.1), and Dong and Yang, *NAS-Bench-201*, ICLR 2020, https://arxiv.org/abs/2001.00326 (section 2.1). Norms come
from the caller, who decides on their kind and parameters: a search has them without, what it found with parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.rundir import UserError

#: Makes a norm of so many channels.
MakeNorm = Callable[[int], nn.Module]


class Zero(nn.Module):
    """No edge: zeros of the size that the other operations give.

    Args:
        stride: 1 or 2.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        # A product, not new zeros: what came before stays in the graph, and DDP does not wait for its gradients.
        return images[:, :, :: self.stride, :: self.stride] * 0.0


class ReluConvNorm(nn.Module):
    """ReLU, convolution, norm: what cells do first to their inputs, and NAS-Bench-201's ``nor_conv``.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        kernel: Odd kernel size in pixels; the image is padded to keep its size.
        stride: 1 or 2.
        norm: Makes the norm.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = norm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        out: Tensor = self.norm(self.conv(F.relu(images)))
        return out


class FactorizedReduce(nn.Module):
    """Halve the image without losing pixels: ReLU, two 1x1 convolutions of stride 2 one pixel apart, norm.

    Each gives half of the channels. The released code of DARTS fails on odd sizes, where the shifted half is smaller;
    here a row or column of zeros is added to them, so that any side becomes ``ceil(side / 2)``.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out, even.
        norm: Makes the norm.

    Raises:
        UserError: If ``outputs`` is odd.
    """

    def __init__(self, inputs: int, outputs: int, norm: MakeNorm) -> None:
        super().__init__()
        if outputs % 2:
            raise UserError(
                f"a reduction by two halves needs an even number of channels, not {outputs}; give even channels (and, "
                "with partial channels, an even share of them)"
            )
        self.conv1 = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.conv2 = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.norm = norm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        height, width = images.shape[2:]
        images = F.relu(images)
        if height % 2 or width % 2:
            images = F.pad(images, (0, width % 2, 0, height % 2))
        out: Tensor = self.norm(torch.cat([self.conv1(images), self.conv2(images[:, :, 1:, 1:])], 1))
        return out


class SeparableConv(nn.Module):
    """ReLU, depthwise convolution, 1x1 convolution, norm, all of it twice; the first half has the stride.

    Args:
        channels: Channels in and out.
        kernel: Odd kernel size in pixels.
        stride: 1 or 2.
        norm: Makes the norms.
    """

    def __init__(self, channels: int, kernel: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        self.depthwise1 = _depthwise(channels, kernel, stride)
        self.pointwise1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm1 = norm(channels)
        self.depthwise2 = _depthwise(channels, kernel, 1)
        self.pointwise2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = norm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        half = self.norm1(self.pointwise1(self.depthwise1(F.relu(images))))
        out: Tensor = self.norm2(self.pointwise2(self.depthwise2(F.relu(half))))
        return out


class DilatedConv(nn.Module):
    """ReLU, depthwise convolution with gaps, 1x1 convolution, norm.

    Args:
        channels: Channels in and out.
        kernel: Odd kernel size in pixels, without the gaps.
        stride: 1 or 2.
        norm: Makes the norm.
        dilation: Distance of the kernel's pixels.
    """

    def __init__(self, channels: int, kernel: int, stride: int, norm: MakeNorm, dilation: int = 2) -> None:
        super().__init__()
        self.depthwise = _depthwise(channels, kernel, stride, dilation)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        out: Tensor = self.norm(self.pointwise(self.depthwise(F.relu(images))))
        return out


class DepthwiseConv(nn.Module):
    """ReLU, depthwise convolution, norm: pixels are mixed, channels are not.

    Args:
        channels: Channels in and out.
        kernel: Odd kernel size in pixels.
        stride: 1 or 2.
        norm: Makes the norm.
    """

    def __init__(self, channels: int, kernel: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        self.depthwise = _depthwise(channels, kernel, stride)
        self.norm = norm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        out: Tensor = self.norm(self.depthwise(F.relu(images)))
        return out


class FactorizedConv(nn.Module):
    """ReLU, a convolution of one row, one of one column, norm (DARTS's and AmoebaNet's ``conv_7x1_1x7``).

    Args:
        channels: Channels in and out.
        kernel: Odd length of row and column in pixels.
        stride: 1 or 2.
        norm: Makes the norm.
    """

    def __init__(self, channels: int, kernel: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        half = kernel // 2
        self.row = nn.Conv2d(channels, channels, (1, kernel), (1, stride), (0, half), bias=False)
        self.column = nn.Conv2d(channels, channels, (kernel, 1), (stride, 1), (half, 0), bias=False)
        self.norm = norm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        out: Tensor = self.norm(self.column(self.row(F.relu(images))))
        return out


class SqueezeExcitation(nn.Module):
    """Scale each channel by what all channels are on average over the image.

    Hu, Shen and Sun, *Squeeze-and-Excitation Networks*, CVPR 2018, https://arxiv.org/abs/1709.01507 (equations 2 to 4).
    The paper squeezes to a sixteenth of the channels, here it is a quarter, since cells are narrow. At stride 2 the
    image is first halved by :class:`FactorizedReduce`.

    Args:
        channels: Channels in and out.
        stride: 1 or 2.
        norm: Makes the norm of the reduction.
    """

    def __init__(self, channels: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        squeezed = max(1, channels // 4)
        self.reduce = _skip(channels, stride, norm)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``."""
        images = self.reduce(images)
        means = images.mean((2, 3), keepdim=True)
        scales: Tensor = self.excite(F.relu(self.squeeze(means))).sigmoid()
        return images * scales


def _depthwise(channels: int, kernel: int, stride: int, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)


def _skip(channels: int, stride: int, norm: MakeNorm) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, norm)


@dataclass(frozen=True)
class Operation:
    """A candidate of an edge.

    Args:
        build: Called with channels, stride (1 or 2) and what makes norms; gives a module from images ``(batch,
            channels, height, width)`` to ``(batch, channels, ceil(height / stride), ceil(width / stride))``.
        pool: Whether a norm follows it in the search, as after the pools of DARTS, whose scale would differ from that
            of the other operations.
    """

    build: Callable[[int, int, MakeNorm], nn.Module]
    pool: bool = False


#: Every operation; own ones join by ``OPS["mine"] = Operation(build)``. The first eight are those of DARTS in the order
#: of the paper's code, which decides ties.
OPS: dict[str, Operation] = {
    "none": Operation(lambda channels, stride, norm: Zero(stride)),
    "max_pool_3x3": Operation(lambda channels, stride, norm: nn.MaxPool2d(3, stride, 1), pool=True),
    "avg_pool_3x3": Operation(
        lambda channels, stride, norm: nn.AvgPool2d(3, stride, 1, count_include_pad=False), pool=True
    ),
    "skip_connect": Operation(_skip),
    "sep_conv_3x3": Operation(lambda channels, stride, norm: SeparableConv(channels, 3, stride, norm)),
    "sep_conv_5x5": Operation(lambda channels, stride, norm: SeparableConv(channels, 5, stride, norm)),
    "dil_conv_3x3": Operation(lambda channels, stride, norm: DilatedConv(channels, 3, stride, norm)),
    "dil_conv_5x5": Operation(lambda channels, stride, norm: DilatedConv(channels, 5, stride, norm)),
    "sep_conv_7x7": Operation(lambda channels, stride, norm: SeparableConv(channels, 7, stride, norm)),
    "conv_7x1_1x7": Operation(lambda channels, stride, norm: FactorizedConv(channels, 7, stride, norm)),
    "dw_conv_3x3": Operation(lambda channels, stride, norm: DepthwiseConv(channels, 3, stride, norm)),
    "dw_conv_5x5": Operation(lambda channels, stride, norm: DepthwiseConv(channels, 5, stride, norm)),
    "nor_conv_1x1": Operation(lambda channels, stride, norm: ReluConvNorm(channels, channels, 1, stride, norm)),
    "nor_conv_3x3": Operation(lambda channels, stride, norm: ReluConvNorm(channels, channels, 3, stride, norm)),
    "squeeze_excitation": Operation(SqueezeExcitation),
}

#: The candidates of DARTS (section 3.1), in the order of its code.
DARTS_OPERATIONS: tuple[str, ...] = (
    *("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"),
    *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
)
#: The candidates of NAS-Bench-201 (section 2.1), in the order of its code.
NASBENCH201_OPERATIONS: tuple[str, ...] = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def operation(name: str) -> Operation:
    """The operation of this name.

    Raises:
        UserError: If there is none; the closest one is named.
    """
    if not isinstance(name, str) or name not in OPS:  # names come from files
        close = get_close_matches(str(name), OPS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown operation {name!r}; {hint}known: {', '.join(OPS)}")
    return OPS[name]
