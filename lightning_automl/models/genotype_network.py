"""The network of a genotype: what is trained and used once a search for a cell is over."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_automl.models import ops
from lightning_automl.models.genotype import Genotype, load_genotype, random_genotype
from lightning_automl.models.layers import (
    channel_normalization,
    check_counts,
    check_images,
    check_probability,
    norm_layer,
)
from lightning_automl.models.ops import FactorizedReduce, MakeNorm, ReluConvNorm
from lightning_automl.models.weights import load_weights
from lightning_automl.rundir import UserError

#: Height and width, in pixels, below which images are too small for the cells, which halve them twice.
SMALLEST = 4


class Wire(NamedTuple):
    """An edge of a cell: what ``operation`` makes of node ``source`` is added to node ``target``."""

    target: int
    source: int
    operation: str


class GenotypeNetwork(nn.Module):
    """Stacked cells of a genotype, for images of any size from 4 x 4 pixels and any number of channels.

    Liu, Simonyan and Yang, *DARTS*, ICLR 2019, https://arxiv.org/abs/1806.09055 (section 3.1 and appendix A.2): a stem,
    ``cells`` cells, of which those at one and two thirds of the depth halve the image and double the channels, global
    average pooling and one fully connected layer.

    The auxiliary head's pool has windows of 5/8 of the image's height and width, rounded up, and gives 2 x 2 values: on
    the 8 x 8 pixels of CIFAR-10 and the 7 x 7 of ImageNet these are the authors' 5 x 5 windows with stride 3 and 2.
    Unlike theirs for ImageNet, the head has a norm after both convolutions.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Pixels of a square image, or height and width, if known: images that are too small are then refused
            at once.
        genotype: The cell: a genotype, the mapping that its file holds, the path of a ``genotype.json`` or of the run
            directory of a search, or a published name (``darts_v1``, ``darts_v2``, …).
        random: Seed of a random cell of the same space, which takes the place of ``genotype``: the control of a search.
        channels: Channels of each node of the first cells, even; the paper has 36 for CIFAR-10 and 48 for ImageNet.
        cells: Number of cells, 3 or more; the paper has 20 for CIFAR-10 and 14 for ImageNet.
        stem: ``cifar`` is one 3 x 3 convolution, ``imagenet`` three with stride 2, for images from 25 x 25 pixels.
        stem_multiplier: Channels of the ``cifar`` stem, in multiples of ``channels``.
        norm: ``batch`` (the paper's), ``group``, or ``sync_batch`` for statistics of all ranks' images together.
        affine: Give the norms of the cells a weight and a bias. False is the form that cells have in a search, as is
            ``pool_norm``.
        pool_norm: Put a norm behind each pool of the cells.
        auxiliary: Add a classifier behind the cell at two thirds of the depth, whose logits are given in training too.
        drop_path: Probability in [0, 1) with which, in training and for each image, what an operation adds to a node is
            left out; identities never are. :class:`~lightning_automl.callbacks.DropPathSchedule` lets it grow.
        weights: Where to load weights from, see :func:`~lightning_automl.models.weights.load_weights`.
        mean: Mean of each channel, in [0, 1], with which the weights were trained; the task then normalises with it
            and not with the train split's. Together with ``std``.
        std: Standard deviation of each channel, likewise.

    Attributes:
        genotype: The :class:`~lightning_automl.models.genotype.Genotype` of the cells.
        drop_path: The probability, which may be changed at any time.
        normalization: ``(mean, std)`` if given, else ``None``.

    Raises:
        UserError: If an argument cannot be, the genotype cannot be read or is of another space, the images are too
            small, or the weights are another network's.
    """

    _drop_path: Tensor

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        genotype: Genotype | dict[str, Any] | str = "darts_v2",
        random: int | None = None,
        channels: int = 36,
        cells: int = 20,
        stem: Literal["cifar", "imagenet"] = "cifar",
        stem_multiplier: int = 3,
        norm: Literal["batch", "group", "sync_batch"] = "batch",
        affine: bool = True,
        pool_norm: bool = False,
        auxiliary: bool = False,
        drop_path: float = 0.0,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            num_classes=num_classes, in_channels=in_channels, channels=channels, stem_multiplier=stem_multiplier
        )
        check_counts(3, cells=cells)
        if channels % 2:
            raise UserError(f"channels is {channels}; it must be even, as half of them come from every other pixel")
        if stem not in ("cifar", "imagenet"):
            raise UserError(f"unknown stem {stem!r}; known: cifar, imagenet")
        self.in_channels = in_channels
        self.smallest = SMALLEST if stem == "cifar" else 8 * (SMALLEST - 1) + 1
        self.normalization = channel_normalization(mean, std, in_channels)
        if image_size is not None:
            check_size(image_size, self.smallest)
        self.genotype = chosen_genotype(genotype, random, inputs=2)
        # A tensor, since a compiled network would be compiled anew for each number.
        self.register_buffer("_drop_path", torch.zeros(()), persistent=False)
        self.drop_path = drop_path

        make_norm: MakeNorm = partial(norm_layer, norm)
        cell_norm: MakeNorm = partial(norm_layer, norm, affine=affine)
        if stem == "cifar":
            before_previous = previous = stem_multiplier * channels
            self.stem = nn.Sequential(nn.Conv2d(in_channels, previous, 3, padding=1, bias=False), make_norm(previous))
        else:
            before_previous = previous = channels
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, channels // 2, 3, 2, padding=1, bias=False),
                make_norm(channels // 2),
                nn.ReLU(),
                nn.Conv2d(channels // 2, channels, 3, 2, padding=1, bias=False),
                make_norm(channels),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, padding=1, bias=False), make_norm(channels)
            )
        self.cells = nn.ModuleList()
        after_reduction = stem == "imagenet"  # whose second part halves the image as a reduction cell does
        self.auxiliary_at = 2 * cells // 3
        for index in range(cells):
            reduction = index in (cells // 3, 2 * cells // 3)
            channels *= 2 if reduction else 1
            cell = GenotypeCell(
                self.genotype, reduction, after_reduction, before_previous, previous, channels, cell_norm, pool_norm
            )
            self.cells.append(cell)
            before_previous, previous, after_reduction = previous, cell.channels, reduction
            if index == self.auxiliary_at and auxiliary:
                self.auxiliary_head = AuxiliaryHead(previous, num_classes, make_norm)
        self.classifier = nn.Linear(previous, num_classes)
        self.auxiliary = auxiliary
        if weights is not None:
            load_weights(self, weights)

    @property
    def drop_path(self) -> float:
        """Probability in [0, 1) with which what an operation adds to a node is left out in training."""
        return self._chosen_drop_path

    @drop_path.setter
    def drop_path(self, probability: float) -> None:
        check_probability("drop_path", probability)
        self._chosen_drop_path = float(probability)
        self._drops = probability > 0
        self._drop_path.fill_(probability)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``.

        Returns:
            The logits; in training, with an auxiliary head, the logits and those of the auxiliary head.
        """
        check_images(images, self.in_channels)
        check_size((images.shape[2], images.shape[3]), self.smallest)
        before_previous = self.stem(images)
        previous = self.stem1(before_previous) if hasattr(self, "stem1") else before_previous
        drop_path = self._drop_path if self.training and self._drops else None
        auxiliary: Tensor | None = None
        for index, cell in enumerate(self.cells):
            before_previous, previous = previous, cell(before_previous, previous, drop_path)
            if index == self.auxiliary_at and self.auxiliary and self.training:
                auxiliary = self.auxiliary_head(previous)
        logits: Tensor = self.classifier(previous.mean((2, 3)))
        return logits if auxiliary is None else (logits, auxiliary)


class GenotypeCell(nn.Module):
    """One cell: nodes that are sums of what operations make of earlier ones, some of them joined to the output.

    Nodes and inputs that the output does not depend on are not built: parameters without a gradient stop DDP.

    Args:
        genotype: With two inputs.
        reduction: Build the reduction cell, whose edges from the inputs have stride 2, and not the normal one.
        after_reduction: Whether the first input has twice the height and width of the second.
        before_previous: Channels of the first input.
        previous: Channels of the second input.
        channels: Channels of each node.
        make_norm: Makes the norm of so many channels.
        pool_norm: Put a norm behind each pool.

    Attributes:
        wires: The edges, in the order of ``operations``.
        concat: The nodes that make the output.
        channels: Channels of the output.
    """

    def __init__(
        self,
        genotype: Genotype,
        reduction: bool,
        after_reduction: bool,
        before_previous: int,
        previous: int,
        channels: int,
        make_norm: MakeNorm,
        pool_norm: bool = False,
    ) -> None:
        super().__init__()
        nodes = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self.channels = channels * len(self.concat)
        wires = [
            Wire(target, source, name) for target, edges in enumerate(nodes, genotype.inputs) for name, source in edges
        ]
        read = set(self.concat)
        for wire in reversed(wires):
            if wire.target in read:
                read.add(wire.source)
        self.wires = [wire for wire in wires if wire.target in read]
        self.preprocess0: nn.Module | None = None
        if 0 in read and after_reduction:
            self.preprocess0 = FactorizedReduce(before_previous, channels, make_norm)
        elif 0 in read:
            self.preprocess0 = ReluConvNorm(before_previous, channels, 1, 1, make_norm)
        self.preprocess1 = ReluConvNorm(previous, channels, 1, 1, make_norm) if 1 in read else None
        strides = [2 if reduction and wire.source < genotype.inputs else 1 for wire in self.wires]
        self.operations = nn.ModuleList(
            build_operation(wire.operation, channels, stride, make_norm, pool_norm)
            for wire, stride in zip(self.wires, strides, strict=True)
        )
        self.is_identity = [
            wire.operation == "skip_connect" and stride == 1 for wire, stride in zip(self.wires, strides, strict=True)
        ]

    def forward(self, before_previous: Tensor, previous: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Map the outputs of the last cell but one and of the last ``(batch, channels, height, width)`` to the next.

        Args:
            before_previous: Output of the cell before the last, possibly twice as high and wide.
            previous: Output of the last cell.
            drop_path: Probability in [0, 1) with which what an operation gives is left out, a scalar.
        """
        states: dict[int, Tensor] = {}
        if self.preprocess0 is not None:
            states[0] = self.preprocess0(before_previous)
        if self.preprocess1 is not None:
            states[1] = self.preprocess1(previous)
        for wire, operation, is_identity in zip(self.wires, self.operations, self.is_identity, strict=True):
            result = operation(states[wire.source])
            if drop_path is not None and not is_identity:
                result = drop_images(result, drop_path)
            states[wire.target] = states[wire.target] + result if wire.target in states else result
        return torch.cat([states[node] for node in self.concat], 1)


class AuxiliaryHead(nn.Module):
    """A classifier in the middle of the network, which gives its first cells a shorter way to the loss.

    Args:
        inputs: Channels that come in.
        num_classes: Number of logits.
        make_norm: Makes the norm of so many channels.
    """

    def __init__(self, inputs: int, num_classes: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 128, 1, bias=False)
        self.norm1 = make_norm(128)
        self.conv2 = nn.Conv2d(128, 768, 2, bias=False)
        self.norm2 = make_norm(768)
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(batch, inputs, height, width)`` to logits ``(batch, num_classes)``."""
        features = pool_to_two(torch.relu(features))
        features = torch.relu(self.norm1(self.conv1(features)))
        features = torch.relu(self.norm2(self.conv2(features)))
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def pool_to_two(features: Tensor) -> Tensor:
    """Average ``(batch, channels, height, width)`` over windows of 5/8 of the size to ``(batch, channels, 2, 2)``.

    A single row or column is repeated.
    """
    sizes = features.shape[2:]
    if min(sizes) == 1:
        features = features.expand(-1, -1, max(2, sizes[0]), max(2, sizes[1]))
        sizes = features.shape[2:]
    windows = [min(-(-5 * size // 8), size - 1) for size in sizes]
    strides = [size - window for size, window in zip(sizes, windows, strict=True)]
    return F.avg_pool2d(features, windows, strides)


def drop_images(features: Tensor, probability: Tensor) -> Tensor:
    """Set what belongs to an image to zero with a probability, and scale the others so that the mean stays.

    Larsson, Maire and Shakhnarovich, *FractalNet*, ICLR 2017, https://arxiv.org/abs/1605.07648, as DARTS uses it.

    Args:
        features: ``(batch, channels, height, width)``.
        probability: A scalar in [0, 1).
    """
    kept = torch.rand(features.shape[0], 1, 1, 1, device=features.device) >= probability
    return features * (kept / (1 - probability)).to(features.dtype)


def build_operation(name: str, channels: int, stride: int, make_norm: MakeNorm, pool_norm: bool = False) -> nn.Module:
    """Build an operation of a cell, behind which pools may have a norm."""
    found = ops.operation(name)
    module = found.build(channels, stride, make_norm)
    return nn.Sequential(module, make_norm(channels)) if found.pool and pool_norm else module


def chosen_genotype(source: Genotype | Mapping[str, Any] | str, random: int | None, inputs: int) -> Genotype:
    """The genotype that a network is to have.

    Args:
        source: What :func:`~lightning_automl.models.genotype.load_genotype` takes.
        random: Seed of a random genotype of the same space, which takes its place.
        inputs: Input nodes of the network's cells: 2 for DARTS, 1 for NAS-Bench-201.

    Raises:
        UserError: If it cannot be read, or its cells are not for such a network.
    """
    genotype = load_genotype(source)
    if genotype.inputs != inputs:
        words = {1: "one input", 2: "two inputs"}
        network = {1: "NasBench201Network", 2: "GenotypeNetwork"}
        raise UserError(
            f"the genotype's cells have {words.get(genotype.inputs, f'{genotype.inputs} inputs')} and those of the "
            f"network {words[inputs]}; "
            + (f"use {network[genotype.inputs]}" if genotype.inputs in network else "give one of its space")
        )
    if inputs == 2 and not genotype.reduce:
        raise UserError("the genotype has no reduction cell; give 'reduce' and 'reduce_concat' too")
    return genotype if random is None else random_genotype(genotype, random)


def check_size(size: int | tuple[int, int], smallest: int) -> None:
    """Raise a UserError if images are smaller than ``smallest`` pixels in height or width; one number is both."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < smallest:
        raise UserError(
            f"images have {height} x {width} pixels, and the network takes them from {smallest} x {smallest} on; give "
            "larger images"
        )
