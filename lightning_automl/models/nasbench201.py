"""The networks of the NAS-Bench-201 space: a cell with one input whose every edge has one of five operations."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_automl.models.genotype import Genotype
from lightning_automl.models.genotype_network import Wire, build_operation, check_size, chosen_genotype
from lightning_automl.models.layers import channel_normalization, check_counts, check_images, norm_layer
from lightning_automl.models.ops import MakeNorm, ReluConvNorm
from lightning_automl.models.weights import load_weights

#: A cell of 3 x 3 convolutions with a shortcut.
_RESIDUAL = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"

#: Height and width, in pixels, below which images are too small: the network halves them twice.
SMALLEST = 4


class NasBench201Network(nn.Module):
    """Network of one architecture of NAS-Bench-201, for images of any size from 4 x 4 pixels.

    Dong and Yang, *NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search*, ICLR 2020,
    https://arxiv.org/abs/2001.00326 (figure 1): a 3 x 3 convolution, three stages of ``cells_per_stage`` cells with 1,
    2 and 4 times ``channels`` channels, a residual block that halves the image before the second and the third, global
    average pooling and one fully connected layer.

    What leads nowhere in a cell, since ``none`` is on every edge from its node, is built and computed as in the
    benchmark, whose costs include it.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a square image, or height and width, if known: images that are too small are then refused
            at once.
        genotype: The cell: a genotype, the mapping that its file holds, the path of a ``genotype.json`` or of the run
            directory of a search, or the benchmark's own ``|nor_conv_3x3~0|+|…|``.
        random: Seed of a random cell of the same space, which takes the place of ``genotype``: the control of a search.
        channels: Channels of the first stage; the benchmark has 16.
        cells_per_stage: Number of cells of each stage; the benchmark has 5.
        norm: ``batch`` (the paper's), ``group``, or ``sync_batch`` for statistics of all ranks' images together.
        affine: Give the norms of the cells a weight and a bias. False is the form that cells have in a search, as is
            ``pool_norm``.
        pool_norm: Put a norm behind each pool of the cells.
        weights: Where to load weights from, see :func:`~lightning_automl.models.weights.load_weights`.
        mean: Mean of each channel, in [0, 1], with which the weights were trained; the task then normalises with it
            and not with the train split's. Together with ``std``.
        std: Standard deviation of each channel, likewise.

    Attributes:
        genotype: The :class:`~lightning_automl.models.genotype.Genotype` of the cells.
        normalization: ``(mean, std)`` if given, else ``None``.

    Raises:
        UserError: If an argument cannot be, the genotype cannot be read or is of another space, the images are too
            small, or the weights are another network's.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        genotype: Genotype | dict[str, Any] | str = _RESIDUAL,
        random: int | None = None,
        channels: int = 16,
        cells_per_stage: int = 5,
        norm: Literal["batch", "group", "sync_batch"] = "batch",
        affine: bool = True,
        pool_norm: bool = False,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            num_classes=num_classes, in_channels=in_channels, channels=channels, cells_per_stage=cells_per_stage
        )
        self.in_channels = in_channels
        self.normalization = channel_normalization(mean, std, in_channels)
        if image_size is not None:
            check_size(image_size, SMALLEST)
        self.genotype = chosen_genotype(genotype, random, inputs=1)

        make_norm: MakeNorm = partial(norm_layer, norm)
        cell_norm: MakeNorm = partial(norm_layer, norm, affine=affine)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), make_norm(channels))
        self.cells = stacked(
            lambda width: NasBench201Cell(self.genotype, width, cell_norm, pool_norm),
            channels,
            cells_per_stage,
            make_norm,
        )
        self.norm = make_norm(4 * channels)
        self.classifier = nn.Linear(4 * channels, num_classes)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        check_images(images, self.in_channels)
        check_size((images.shape[2], images.shape[3]), SMALLEST)
        features = self.stem(images)
        for cell in self.cells:
            features = cell(features)
        features = torch.relu(self.norm(features))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def stacked(
    make_cell: Callable[[int], nn.Module], channels: int, cells_per_stage: int, make_norm: MakeNorm
) -> nn.ModuleList:
    """Three stages of cells, of ``channels``, 2 and 4 times as many, with a residual reduction between two.

    Args:
        make_cell: Makes a cell of so many channels.
        channels: Of the first stage.
        cells_per_stage: Cells of each stage.
        make_norm: Makes the norms of the reductions.
    """
    cells = nn.ModuleList()
    for stage in range(3):
        width = channels * 2**stage
        if stage > 0:
            cells.append(ResidualReduction(width // 2, width, make_norm))
        cells.extend(make_cell(width) for _ in range(cells_per_stage))
    return cells


class NasBench201Cell(nn.Module):
    """One cell: each node is the sum of what operations make of earlier ones; the last one is the output.

    Args:
        genotype: With one input.
        channels: Channels of each node.
        make_norm: Makes the norm of so many channels.
        pool_norm: Put a norm behind each pool.

    Attributes:
        wires: The edges, in the order of ``operations``.
    """

    def __init__(self, genotype: Genotype, channels: int, make_norm: MakeNorm, pool_norm: bool = False) -> None:
        super().__init__()
        self.wires = [
            Wire(target, source, name) for target, edges in enumerate(genotype.normal, 1) for name, source in edges
        ]
        self.operations = nn.ModuleList(
            build_operation(wire.operation, channels, 1, make_norm, pool_norm) for wire in self.wires
        )
        self.last = len(genotype.normal)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, channels, height, width)`` to the same shape."""
        states = {0: features}
        # `none` is computed too: its zeros give what leads nowhere a gradient, for which ranks wait for each other.
        for wire, operation in zip(self.wires, self.operations, strict=True):
            result = operation(states[wire.source])
            states[wire.target] = states[wire.target] + result if wire.target in states else result
        return states[self.last]


class ResidualReduction(nn.Module):
    """Residual block that halves the image: ``shortcut(x) + norm(conv(relu(norm(conv(relu(x))))))``.

    The shortcut is a 2 x 2 average pool and a 1 x 1 convolution. Of an odd size the last row or column is a pool's own.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        make_norm: Makes the norm of so many channels.
    """

    def __init__(self, inputs: int, outputs: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.conv1 = ReluConvNorm(inputs, outputs, 3, 2, make_norm)
        self.conv2 = ReluConvNorm(outputs, outputs, 3, 1, make_norm)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, outputs, height / 2, width / 2)``, rounded up."""
        halved: Tensor = self.conv2(self.conv1(features)) + self.shortcut(features)
        return halved
