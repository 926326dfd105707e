"""Densely connected networks, for small images and in the form for ImageNet."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_automl.models.layers import (
    channel_normalization,
    check_counts,
    check_images,
    check_probability,
    norm_layer,
)
from lightning_automl.models.weights import load_weights
from lightning_automl.rundir import UserError


class DenseNet(nn.Module):
    """Every layer of a block sees the feature maps of all layers before it.

    Huang, Liu, van der Maaten and Weinberger, *Densely Connected Convolutional Networks*, CVPR 2017,
    https://arxiv.org/abs/1608.06993 (sections 3 and 4.2): a layer adds ``growth`` channels to those it is given,
    ``x_l = H_l([x_0, …, x_(l-1)])`` (equation 2); between two blocks a transition halves the image.

    The default, DenseNet-BC of 40 layers and growth 12, has 0.18 million parameters; the paper's smallest is
    ``depth=100`` with 0.8 million. ``blocks=(6, 12, 24, 16), growth=32, stem="imagenet"`` is DenseNet-121. The names of
    the parts are those of torchvision, whose weights can hence be loaded.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depth: Layers with weights of three equal blocks: 6n + 4 with bottlenecks (22, 40, 100, 190, 250, …), else
            3n + 4. Of no effect when ``blocks`` is given.
        growth: Channels that a layer adds (the paper's k).
        bottleneck: Before the 3 x 3 convolution of a layer, reduce what it sees to ``4 * growth`` channels by a 1 x 1
            convolution (the paper's B).
        compression: Fraction, in (0, 1], of the channels that a transition keeps (the paper's theta; below 1 its C).
        blocks: Layers of each block, one number a block.
        stem: ``small`` begins with a 3 x 3 convolution that keeps the size, for images of about 32 x 32 pixels;
            ``imagenet`` halves the image twice first, for images of 29 pixels and more with four blocks.
        dropout: Probability in [0, 1) after each convolution but the first; the paper has 0.2 where it trains without
            augmentation. (torchvision's has none after 1 x 1 convolutions.)
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
        depth: int = 40,
        growth: int = 12,
        bottleneck: bool = True,
        compression: float = 0.5,
        blocks: Sequence[int] | None = None,
        stem: Literal["small", "imagenet"] = "small",
        dropout: float = 0.0,
        norm: Literal["batch", "group"] = "batch",
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels, growth=growth)
        if not 0 < compression <= 1:
            raise UserError(f"compression is {compression}; it is the fraction of channels that is kept, in (0, 1]")
        if stem not in ("small", "imagenet"):
            raise UserError(f"unknown stem {stem!r}; known: small, imagenet")
        check_probability("dropout", dropout)
        layers = _three_blocks(depth, bottleneck) if blocks is None else list(blocks)
        if not layers or min(layers) < 1:
            raise UserError(f"blocks is {layers}; give each block a number of layers, 1 or more, or leave it out")
        self.in_channels = in_channels
        self.normalization = channel_normalization(mean, std, in_channels)
        # Each transition halves the image, rounded down; the stem for ImageNet halves it twice, rounded up.
        smallest = 2 ** (len(layers) - 1)
        self.smallest = smallest if stem == "small" else 4 * smallest - 3

        channels = 2 * growth if stem == "imagenet" or (bottleneck and compression < 1) else 16
        features: OrderedDict[str, nn.Module] = OrderedDict()
        if stem == "small":
            features["conv0"] = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        else:
            features["conv0"] = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
            features["norm0"] = norm_layer(norm, channels)
            features["relu0"] = nn.ReLU()
            features["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
        for number, count in enumerate(layers, start=1):
            features[f"denseblock{number}"] = DenseBlock(channels, count, growth, bottleneck, dropout, norm)
            channels += count * growth
            if number < len(layers):
                kept = max(1, int(channels * compression))
                features[f"transition{number}"] = _transition(channels, kept, dropout, norm)
                channels = kept
        features["norm5"] = norm_layer(norm, channels)  # torchvision's name, however many blocks there are
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels)
        height, width = images.shape[2:]
        if min(height, width) < self.smallest:
            raise UserError(
                f"images have {height} x {width} pixels, but this DenseNet halves them until {self.smallest} are "
                "needed; give larger images, fewer blocks or the stem 'small'"
            )
        features = torch.relu(self.features(images))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


class DenseLayer(nn.Module):
    """Norm, relu and convolution, which make ``growth`` new channels of all those so far.

    Args:
        inputs: Channels that come in.
        growth: Channels that go out.
        bottleneck: Whether a 1 x 1 convolution comes first, see :class:`DenseNet`.
        dropout: Probability after each convolution.
        norm: Kind of norm, see :class:`DenseNet`.
    """

    def __init__(
        self, inputs: int, growth: int, bottleneck: bool, dropout: float, norm: Literal["batch", "group"]
    ) -> None:
        super().__init__()
        narrow = 4 * growth
        self.norm1 = norm_layer(norm, inputs)
        self.relu1 = nn.ReLU()
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, narrow, 1, bias=False)
            self.norm2 = norm_layer(norm, narrow)
            self.relu2 = nn.ReLU()
            self.conv2 = nn.Conv2d(narrow, growth, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.bottleneck = bottleneck

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, growth, height, width)``."""
        new: Tensor = self.dropout(self.conv1(self.relu1(self.norm1(features))))
        if self.bottleneck:
            new = self.dropout(self.conv2(self.relu2(self.norm2(new))))
        return new


class DenseBlock(nn.Sequential):
    """Dense layers, each of which is given the block's input and what all layers before it made.

    Args:
        inputs: Channels that come in.
        layers: Number of layers.
        growth: Channels that each of them adds.
        bottleneck: See :class:`DenseNet`.
        dropout: See :class:`DenseNet`.
        norm: See :class:`DenseNet`.
    """

    def __init__(
        self, inputs: int, layers: int, growth: int, bottleneck: bool, dropout: float, norm: Literal["batch", "group"]
    ) -> None:
        super().__init__(
            OrderedDict(
                (f"denselayer{index + 1}", DenseLayer(inputs + index * growth, growth, bottleneck, dropout, norm))
                for index in range(layers)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, inputs + layers * growth, height, width)``."""
        for layer in self:
            features = torch.cat([features, layer(features)], 1)
        return features


def _transition(inputs: int, outputs: int, dropout: float, norm: Literal["batch", "group"]) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=norm_layer(norm, inputs),
            relu=nn.ReLU(),
            conv=nn.Conv2d(inputs, outputs, 1, bias=False),
            dropout=nn.Dropout(dropout),
            pool=nn.AvgPool2d(2),
        )
    )


def _three_blocks(depth: int, bottleneck: bool) -> list[int]:
    """Layers of each of three blocks; the first convolution, two transitions and the classifier count as well."""
    step = 6 if bottleneck else 3
    if depth < step + 4 or (depth - 4) % step:
        near = max(1, round((depth - 4) / step)) * step + 4
        raise UserError(
            f"a DenseNet with three {'bottleneck ' if bottleneck else ''}blocks has {step}n + 4 layers, not {depth}; "
            f"try {near}, or give blocks"
        )
    return [(depth - 4) // step] * 3
