"""Residual networks for small images."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.models.layers import channel_normalization, check_counts, check_images, norm_layer
from lightning_automl.models.weights import load_weights
from lightning_automl.rundir import UserError


class ResNet(nn.Module):
    """Residual network for images of about 32 x 32 pixels.

    He, Zhang, Ren and Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016,
    https://arxiv.org/abs/1512.03385 (section 4.2): a 3 x 3 convolution, three stages of ``(depth - 2) / 6`` blocks with
    1, 2 and 4 times ``width`` channels, of which the second and third halve the image, global average pooling and one
    fully connected layer. Any image size will do.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depth: Layers with weights, 6n + 2: 8, 14, 20, 32, 44, 56, 110, …
        width: Channels of the first stage.
        shortcut: Where a block halves the image: ``A`` takes every other pixel and adds channels of zeros, which has no
            parameters (the paper's choice for CIFAR-10); ``B`` is a 1 x 1 convolution and a norm.
        norm: ``batch`` (the paper's) or ``group``.
        weights: Where to load weights from, see :func:`~lightning_automl.models.weights.load_weights`.
        mean: Mean of each channel, in [0, 1], with which the weights were trained; the task then normalises with it
            and not with the train split's. Together with ``std``.
        std: Standard deviation of each channel, likewise.

    Attributes:
        normalization: ``(mean, std)`` if given, else ``None``.

    Raises:
        UserError: If an argument cannot be, or the weights are another network's.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        depth: int = 20,
        width: int = 16,
        shortcut: Literal["A", "B"] = "A",
        norm: Literal["batch", "group"] = "batch",
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            near = max(8, round((depth - 2) / 6) * 6 + 2)
            raise UserError(f"a ResNet has 6n + 2 layers (8, 14, 20, 32, 44, 56, 110, …), not {depth}; try {near}")
        check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
        if shortcut not in ("A", "B"):
            raise UserError(f"unknown shortcut {shortcut!r}; known: A, B")
        self.in_channels = in_channels
        self.normalization = channel_normalization(mean, std, in_channels)
        # The names of the parts are those of the CIFAR-10 weights at https://github.com/akamaster/pytorch_resnet_cifar10.
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(norm, width)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(width, width, blocks, shortcut, norm)
        self.layer2 = _stage(width, 2 * width, blocks, shortcut, norm)
        self.layer3 = _stage(2 * width, 4 * width, blocks, shortcut, norm)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if weights is not None:
            load_weights(self, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels)
        features = torch.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: ``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))``.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: 2 to halve the image.
        shortcut: Kind of shortcut where the size changes, see :class:`ResNet`.
        norm: Kind of norm, see :class:`ResNet`.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, shortcut: Literal["A", "B"], norm: Literal["batch", "group"]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                self.shortcut = PaddedShortcut(outputs - inputs, stride)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(norm, outputs)
                )

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        residual = torch.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(features))


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel, and ``channels`` further channels of zeros, half of them before the others."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, channels // 2, channels - channels // 2)
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to the shape that the block's convolutions have."""
        return F.pad(features[:, :, :: self.stride, :: self.stride], self.padding)


def _stage(
    inputs: int, outputs: int, blocks: int, shortcut: Literal["A", "B"], norm: Literal["batch", "group"]
) -> nn.Sequential:
    channels = [inputs] + [outputs] * blocks
    return nn.Sequential(
        *(
            ResidualBlock(before, after, 1 if before == after else 2, shortcut, norm)
            for before, after in pairwise(channels)
        )
    )
