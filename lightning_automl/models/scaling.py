"""Compound scaling: one coefficient for the depth, the width and the resolution of a network."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from lightning_automl.models.layers import (
    channel_normalization,
    check_counts,
    check_images,
    check_probability,
    resize_images,
)
from lightning_automl.models.weights import load_weights
from lightning_automl.rundir import UserError

#: Table 1 of the paper: expansion, kernel, stride, input and output channels, and repeats of each stage.
_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


class Scaling(NamedTuple):
    """Multipliers of a network's depth, width and resolution."""

    depth: float
    width: float
    resolution: float


def compound_scaling(phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> Scaling:
    """Multipliers ``alpha**phi``, ``beta**phi`` and ``gamma**phi`` of depth, width and resolution.

    Tan and Le, *EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks*, ICML 2019,
    https://arxiv.org/abs/1905.11946 (equation 3). Operations grow about as ``(alpha * beta**2 * gamma**2) ** phi``. The
    paper wants that base near 2; with its own values, the defaults here, it is 1.92027.

    Args:
        phi: How many times to spend that much more; 0 scales nothing, negative values make the network smaller.
        alpha: 1 or more.
        beta: 1 or more.
        gamma: 1 or more.

    Raises:
        UserError: If a base is below 1 or a number is not finite.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not 1 <= value < math.inf:
            raise UserError(f"{name} is {value}; it is the growth for each unit of phi, 1 (none) or more")
    if not math.isfinite(phi):
        raise UserError(f"phi is {phi}; give a finite number, such as 0 (no scaling) or 1")
    return Scaling(alpha**phi, beta**phi, gamma**phi)


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, or the next one if that is below 90 % of it.

    As in the authors' released networks; the smallest result is ``divisor``.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def round_repeats(repeats: float) -> int:
    """The number of repeats rounded up, as in the authors' released networks."""
    return math.ceil(round(repeats, 6))  # 10 * 1.1 is 11.000000000000002, which is not 12 repeats


class EfficientNet(nn.Module):
    """EfficientNet whose depth, width and resolution follow from one coefficient.

    Tan and Le, ICML 2019, https://arxiv.org/abs/1905.11946 (table 1 and equation 3); the blocks are torchvision's, and
    so are the names of the parts: the weights of its ``efficientnet_b0`` can be loaded at ``phi=0``. The networks
    published as B1 to B7 have multipliers set by hand and are not exactly those of any ``phi``; for them see
    :class:`~lightning_automl.models.pretrained.Backbone`.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a square image, or height and width: the resolution at ``phi=0``.
        phi: The coefficient. Images are resized inside the network to ``round(image_size * gamma**phi)`` pixels, at
            0 not at all.
        alpha: Growth of the depth for each unit of phi, 1 or more.
        beta: Growth of the width, likewise.
        gamma: Growth of the resolution, likewise.
        stem_stride: Stride of the first convolution. By default 1 for images of up to 32 pixels, which are halved four
            more times, and 2, the paper's, for larger ones.
        dropout: Probability in [0, 1) before the last layer.
        stochastic_depth: Probability in [0, 1) of leaving out the last residual block in training; that of the others
            grows linearly from 0.
        weights: Where to load weights from, see :func:`~lightning_automl.models.weights.load_weights`.
        mean: Mean of each channel, in [0, 1], with which the weights were trained; the task then normalises with it
            and not with the train split's. Together with ``std``.
        std: Standard deviation of each channel, likewise.

    Attributes:
        scaling: The multipliers of depth, width and resolution.
        resolution: Height and width to which images are resized, ``None`` if they are not.
        normalization: ``(mean, std)`` if given, else ``None``.

    Raises:
        UserError: If an argument cannot be, or the weights are another network's.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        phi: float = 0.0,
        alpha: float = 1.2,
        beta: float = 1.1,
        gamma: float = 1.15,
        stem_stride: Literal[1, 2] | None = None,
        dropout: float = 0.2,
        stochastic_depth: float = 0.2,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        # two seconds that a command line which only names the class does not wait for
        from torchvision.models.efficientnet import EfficientNet as Network
        from torchvision.models.efficientnet import MBConvConfig

        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        check_counts(num_classes=num_classes, in_channels=in_channels, image_size=min(height, width))
        if stem_stride not in (None, 1, 2):
            raise UserError(f"stem_stride is {stem_stride}; give 1 or 2, or leave it out")
        check_probability("dropout", dropout)
        check_probability("stochastic_depth", stochastic_depth)
        self.in_channels = in_channels
        self.normalization = channel_normalization(mean, std, in_channels)
        self.scaling = compound_scaling(phi, alpha, beta, gamma)
        scaled = (max(1, round(height * self.scaling.resolution)), max(1, round(width * self.scaling.resolution)))
        self.resolution = None if self.scaling.resolution == 1 else scaled
        if stem_stride is None:
            stem_stride = 1 if min(height, width) <= 32 else 2

        network = Network(
            [
                MBConvConfig(
                    expansion,
                    kernel,
                    stride,
                    round_channels(inputs * self.scaling.width),
                    round_channels(outputs * self.scaling.width),
                    round_repeats(repeats * self.scaling.depth),
                )
                for expansion, kernel, stride, inputs, outputs, repeats in _STAGES
            ],
            dropout=dropout,
            stochastic_depth_prob=stochastic_depth,
            num_classes=num_classes,
        )
        first = network.features[0][0]
        network.features[0][0] = nn.Conv2d(in_channels, first.out_channels, 3, stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(network.features[0][0].weight, mode="fan_out")
        for module in network.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # hooks on the layer before keep what they saw
        self.features, self.avgpool, self.classifier = network.features, network.avgpool, network.classifier
        if weights is not None:
            load_weights(self, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels)
        if self.resolution is not None:
            images = resize_images(images, self.resolution)
        logits: Tensor = self.classifier(self.avgpool(self.features(images)).flatten(1))
        return logits
