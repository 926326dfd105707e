import pytest
import torch
from torch import nn

from lightning_automl.models import Genotype, NasBench201Network, load_genotype, parameter_count
from lightning_automl.models.nasbench201 import NasBench201Cell, ResidualReduction
from lightning_automl.models.ops import NASBENCH201_OPERATIONS


def architecture(*names):
    """The benchmark's notation of six operations: 0 → 1; 0 → 2, 1 → 2; 0 → 3, 1 → 3, 2 → 3."""
    first, *rest = names
    second, third, *last = rest
    ends = "".join(f"|{name}~{source}" for source, name in enumerate(last))
    return f"|{first}~0|+|{second}~0|{third}~1|+{ends}|"


def network(names=("nor_conv_3x3",) * 6, **arguments):
    arguments = {"num_classes": 10, "cells_per_stage": 1, "genotype": architecture(*names)} | arguments
    return NasBench201Network(**arguments)


CONV1, CONV3 = "nor_conv_1x1", "nor_conv_3x3"


@pytest.mark.parametrize(
    ("names", "kernel_pixels", "convolutions"),
    [
        ((CONV3,) * 6, 54, 6),
        ((CONV1, CONV3, "skip_connect", "avg_pool_3x3", "none", CONV1), 11, 3),
        (("none",) * 6, 0, 0),
    ],
)
def test_parameters_by_hand(names, kernel_pixels, convolutions):
    """All 3 x 3 convolutions give 1,531,546, which is the largest network of the benchmark (1.53 million)."""
    cells = sum(5 * (kernel_pixels * c * c + convolutions * 2 * c) for c in (16, 32, 64))
    stem = 3 * 9 * 16 + 2 * 16
    reductions = sum((9 * c * 2 * c + 4 * c) + (9 * 2 * c * 2 * c + 4 * c) + c * 2 * c for c in (16, 32))
    head = 2 * 64 + 64 * 10 + 10
    assert parameter_count(network(names, cells_per_stage=5)) == stem + cells + reductions + head
    assert names != (CONV3,) * 6 or stem + cells + reductions + head == 1_531_546


def test_a_cell_by_hand():
    """0 → 1 average pool; 0 → 2 skip, 1 → 2 nothing; 0 → 3 1 x 1 convolution, 1 → 3 skip, 2 → 3 skip."""
    names = ("avg_pool_3x3", "skip_connect", "none", CONV1, "skip_connect", "skip_connect")
    genotype = load_genotype(architecture(*names))
    cell = NasBench201Cell(genotype, 4, nn.BatchNorm2d).eval()
    features = torch.randn(2, 4, 5, 6)
    pooled = nn.functional.avg_pool2d(features, 3, 1, 1, count_include_pad=False)
    (convolution,) = (module for module in cell.modules() if isinstance(module, nn.Conv2d))
    mixed = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], features.relu()) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(cell(features), mixed + pooled + features)


def test_a_residual_reduction_by_hand():
    block = ResidualReduction(2, 4, nn.BatchNorm2d).eval()
    features = torch.randn(2, 2, 6, 8)
    scale = (1 + 1e-5) ** -0.5
    first = nn.functional.conv2d(features.relu(), block.conv1.conv.weight, stride=2, padding=1) * scale
    second = nn.functional.conv2d(first.relu(), block.conv2.conv.weight, padding=1) * scale
    shortcut = nn.functional.conv2d(nn.functional.avg_pool2d(features, 2), block.shortcut[1].weight)
    torch.testing.assert_close(block(features), second + shortcut)


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (8, 8), (17, 33)])
def test_any_size_will_do(size):
    built = network(image_size=size, in_channels=2)
    assert built(torch.rand(2, 2, *size)).shape == (2, 10)


@pytest.mark.parametrize(
    "names",
    [
        (CONV3, "skip_connect", "none", CONV1, "none", "none"),  # node 1 leads nowhere, and so does its convolution
        ("none", "none", CONV3, "none", CONV1, CONV1),  # nothing reaches the output
        ("none",) * 6,
    ],
    ids="-".join,
)
def test_what_leads_nowhere_has_a_gradient_of_zero_for_which_no_rank_waits(names):
    built = network(names)
    built(torch.rand(4, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


@pytest.mark.parametrize("norm", ["batch", "group", "sync_batch"])
def test_every_norm_runs(norm):
    assert network(norm=norm)(torch.rand(3, 3, 8, 8)).shape == (3, 10)


def test_random_cells_are_of_the_same_space_and_come_from_their_seed():
    first, again, second = (network(random=seed).genotype for seed in (0, 0, 1))
    assert first == again != second
    assert [[source for _, source in node] for node in first.normal] == [[0], [0, 1], [0, 1, 2]]
    drawn = {name for seed in range(20) for node in network(random=seed).genotype.normal for name, _ in node}
    assert drawn == set(NASBENCH201_OPERATIONS)


def test_weights_are_loaded(tmp_path):
    saved = network().eval()
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "a.ckpt")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(network(weights=str(tmp_path / "a.ckpt")).eval()(images), saved(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cells_per_stage": 0}, "cells_per_stage is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"image_size": 3}, "images have 3 x 3 pixels"),
        ({"genotype": "darts_v2"}, "two inputs and those of the network one input; use GenotypeNetwork"),
        ({"genotype": "|skip_connect|"}, "skip_connect"),
        ({"genotype": "|skip_conect~0|"}, "did you mean skip_connect"),
        ({"mean": [0.5] * 3}, "std is missing"),
    ],
    ids=str,
)
def test_impossible_networks_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        NasBench201Network(**{"num_classes": 3} | arguments)


def test_cells_of_another_number_of_nodes_will_do():
    genotype = Genotype(((("skip_connect", 0),),), (1,), inputs=1, operations=NASBENCH201_OPERATIONS)
    assert network(genotype=genotype)(torch.rand(2, 3, 8, 8)).shape == (2, 10)
