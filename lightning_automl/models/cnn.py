"""A plain convolutional network whose depth, widths, kernels, pools and dropout can all be searched."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_automl.models.layers import Activation, Norm, activation_layer, check_images, norm_layer
from lightning_automl.rundir import UserError

Pool = Literal["none", "max", "avg"]


class TunableCNN(nn.Module):
    """Blocks of convolution, norm, activation, pool and dropout, then fully connected layers.

    Between the two the feature map is flattened, not averaged, so the network is built for one ``image_size``, and
    pooling decides how many inputs the first fully connected layer has. Convolutions are padded and keep the size; a
    pool halves it and drops the last row or column of an odd size.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a square image, or height and width.
        filters: Output channels of each block; as many blocks as numbers, unless ``n_conv`` says fewer.
        kernels: Odd kernel size in pixels, one for all blocks or one a block.
        pools: ``none``, ``max`` or ``avg`` over 2 x 2 pixels, one for all blocks or one a block.
        conv_dropout: Probability in [0, 1) at the end of a block, one for all blocks or one a block.
        units: Width of each hidden fully connected layer; may be empty. The layer that makes the logits follows them
            and is not counted.
        fc_dropout: Probability in [0, 1) after a hidden fully connected layer, one for all or one a layer.
        activation: After every norm and every hidden fully connected layer.
        norm: After every convolution; convolutions have a bias only with ``none``.
        n_conv: Build only the first ``n_conv`` blocks, so that a search varies the depth and the lists stay as they
            are; entries beyond are ignored.
        n_fc: Build only the first ``n_fc`` hidden fully connected layers, likewise.

    Raises:
        UserError: If the arguments do not go together; the message says which and why.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        filters: Sequence[int] = (32, 64, 128),
        kernels: int | Sequence[int] = 3,
        pools: Pool | Sequence[Pool] = "max",
        conv_dropout: float | Sequence[float] = 0.0,
        units: Sequence[int] = (128,),
        fc_dropout: float | Sequence[float] = 0.0,
        activation: Activation = "relu",
        norm: Norm = "batch",
        n_conv: int | None = None,
        n_fc: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        _at_least("num_classes", num_classes, 1)
        _at_least("in_channels", in_channels, 1)
        _at_least("image_size", min(self.image_size), 1)
        filters = _first("filters", filters, n_conv, "n_conv")
        units = _first("units", units, n_fc, "n_fc")
        if not filters:
            raise UserError(
                "the network has no convolution block; give filters at least one number and n_conv 1 or more"
            )
        for value in filters:
            _at_least("filters", value, 1)
        for value in units:
            _at_least("units", value, 1)
        exact = n_conv is None
        kernels = _one_each("kernels", kernels, len(filters), "convolution blocks", exact)
        pools = _one_each("pools", pools, len(filters), "convolution blocks", exact)
        conv_dropout = _one_each("conv_dropout", conv_dropout, len(filters), "convolution blocks", exact)
        fc_dropout = _one_each("fc_dropout", fc_dropout, len(units), "hidden fully connected layers", n_fc is None)

        blocks, channels, (height, width) = [], in_channels, self.image_size
        for index, (outputs, kernel, pool, dropout) in enumerate(
            zip(filters, kernels, pools, conv_dropout, strict=True)
        ):
            _check_kernel(kernel, self.image_size)
            layers: list[nn.Module] = [
                nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=norm == "none"),
                norm_layer(norm, outputs),
                activation_layer(activation),
            ]
            if pool != "none":
                layers.append(_pool_layer(pool))
                height, width = height // 2, width // 2
            if min(height, width) == 0:
                raise UserError(
                    f"images of {self.image_size[0]} x {self.image_size[1]} can be halved "
                    f"{min(self.image_size).bit_length() - 1} times, but the pool of block {index} (counted from 0) "
                    "is one more; set more pools to 'none' or n_conv lower"
                )
            layers += _dropout_layers("conv_dropout", dropout)
            blocks.append(nn.Sequential(*layers))
            channels = outputs
        self.features = nn.Sequential(*blocks)

        hidden, inputs = [], channels * height * width
        for outputs, dropout in zip(units, fc_dropout, strict=True):
            hidden.append(
                nn.Sequential(
                    nn.Linear(inputs, outputs), activation_layer(activation), *_dropout_layers("fc_dropout", dropout)
                )
            )
            inputs = outputs
        self.hidden = nn.Sequential(*hidden)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels, self.image_size)
        logits: Tensor = self.linear(self.hidden(self.features(images).flatten(1)))
        return logits


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is {value}; it must be {least} or more")


def _first(name: str, values: Sequence[int], count: int | None, counter: str) -> Sequence[int]:
    if count is None:
        return values
    if count < 0 or count > len(values):
        raise UserError(
            f"{counter} is {count}, but {name} has {len(values)} numbers; "
            f"give {name} more or set {counter} between 0 and {len(values)}"
        )
    return values[:count]


def _one_each(name: str, value: Any, count: int, what: str, exact: bool) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) < count or (exact and len(value) > count):
        values = "1 value" if len(value) == 1 else f"{len(value)} values"
        raise UserError(f"{name} has {values} for {count} {what}; give one value for all, or a list with one for each")
    return list(value[:count])


def _check_kernel(kernel: int, image_size: tuple[int, int]) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"a kernel of {kernel} pixels has no middle; kernels must be odd: 1, 3, 5, …")
    if kernel > min(image_size):
        raise UserError(
            f"a kernel of {kernel} pixels is larger than images of {image_size[0]} x {image_size[1]}; "
            "give smaller kernels or a larger image_size"
        )


def _pool_layer(name: Pool) -> nn.Module:
    if name == "max":
        return nn.MaxPool2d(2)
    if name == "avg":
        return nn.AvgPool2d(2)
    raise UserError(f"unknown pool {name!r}; known: {', '.join(get_args(Pool))}")


def _dropout_layers(name: str, probability: float) -> list[nn.Module]:
    if not 0 <= probability < 1:
        raise UserError(f"{name} is {probability}; it is a probability in [0, 1)")
    return [nn.Dropout(probability)] if probability else []
