import json

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_automl.adapters import ConvAdapterConfig, add_adapter
from lightning_automl.adapters.factorisation import (
    factorise_conv,
    factorise_linear,
    low_rank_saves,
    numerical_rank,
    rank_factorise,
)
from lightning_automl.adapters.folding import fold_batchnorm
from lightning_automl.adapters.low_rank import LowRankConfig, low_rank_network
from lightning_automl.models import ResNet
from lightning_automl.rundir import UnsupportedError, UserError

EXAMPLE = torch.tensor([[1, 3, 0, 2, 3], [0, 1, -2, 1, 2], [2, 5, 1, 3, 4], [1, 2, 1, 1, 1], [3, 7, 2, 4, 5]])
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def relative(given, expected):
    return ((given - expected).norm() / expected.norm()).item()


# Exact factorisation


def test_the_worked_example_has_rank_3_and_its_factors_give_it_exactly():
    A, B, r = rank_factorise(EXAMPLE)
    assert r == numerical_rank(EXAMPLE) == 3
    assert torch.equal(A, EXAMPLE[:, :3].double())
    assert B.tolist() == [[1, 0, 0, -1, -3], [0, 1, 0, 1, 2], [0, 0, 1, 0, 0]]
    assert torch.equal(A @ B, EXAMPLE.double())
    assert A.numel() == B.numel() == 15


def test_factors_save_memory_below_the_break_even_rank_alone():
    assert not low_rank_saves(5, 5, 3)
    assert low_rank_saves(5, 5, 2)
    assert low_rank_saves(128, 64 * 9, 104)
    assert not low_rank_saves(128, 64 * 9, 105)


def test_the_example_without_its_smallest_singular_value_has_the_printed_error():
    sigma = torch.linalg.svdvals(EXAMPLE.double())
    assert sigma.tolist() == pytest.approx([13.7992, 2.91333, 0.307682, 0, 0], abs=1e-4)
    assert rank_factorise(EXAMPLE, tol=0.1)[2] == 2  # 0.307682 / 13.7992 is below, 2.91333 / 13.7992 is not
    layer = nn.Linear(5, 5, bias=False).double()
    layer.weight.data = EXAMPLE.double()
    for rank, error in ((2, 0.307682), (1, 2.92953)):
        lost = (factorise_linear(layer, rank).weight - layer.weight).norm()
        assert lost.item() == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "rank"), [(7, 9, 4), (9, 7, 7), (6, 6, 1), (30, 20, 11)])
def test_a_product_is_found_again(m, n, rank, dtype):
    matrix = torch.randn(m, rank, dtype=dtype) @ torch.randn(rank, n, dtype=dtype)
    A, B, r = rank_factorise(matrix)
    assert r == rank
    assert A.dtype == B.dtype == dtype
    assert relative(A @ B, matrix) < 100 * torch.finfo(dtype).eps
    columns = [int((matrix == column[:, None]).all(0).nonzero()[0]) for column in A.T]
    assert torch.equal(B[:, columns], torch.eye(r, dtype=dtype))


def test_pivots_are_the_first_independent_columns():
    column = torch.tensor([1.0, 2.0, 4.0])
    matrix = torch.stack([torch.zeros(3), column, 3 * column, torch.tensor([0.0, 1.0, 0.0]), column], 1)
    A, B, r = rank_factorise(matrix)
    assert (r, A.T.tolist()) == (2, [[1, 2, 4], [0, 1, 0]])
    assert B.tolist() == [[0, 1, 3, 0, 1], [0, 0, 0, 1, 0]]


def test_columns_that_hardly_differ_do_not_spoil_the_factors():
    matrix = torch.randn(8, 4).double()
    matrix[:, 1] = matrix[:, 0] + 1e-14 * matrix[:, 1]
    A, B, _ = rank_factorise(matrix)
    assert relative(A @ B, matrix) < 1e-12


def test_a_matrix_of_zeros_has_rank_0():
    A, B, r = rank_factorise(torch.zeros(3, 4))
    assert (A.shape, B.shape, r) == ((3, 0), (0, 4), 0)


@pytest.mark.parametrize(
    ("matrix", "tol", "sentence"),
    [
        (torch.zeros(3), None, "a matrix has 2 dimensions, not the 1"),
        (torch.tensor([[1.0, float("nan")]]), None, "not finite"),
        (torch.ones(2, 2), -1.0, "tol is -1.0"),
    ],
)
def test_what_has_no_rank_is_refused(matrix, tol, sentence):
    with pytest.raises(UserError, match=sentence):
        rank_factorise(matrix, tol)


# Layers


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (2, 5, 12)),
    "wide": (lambda: nn.Linear(7, 12, bias=False), (3, 7)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 7)),
    "1x1": (lambda: nn.Conv2d(6, 8, 1, stride=2, bias=False), (2, 6, 9, 7)),
    "stride": (lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 6, 11, 13)),
    "dilation": (lambda: nn.Conv2d(6, 8, 3, dilation=(1, 2), padding=(0, 2)), (1, 6, 9, 10)),
    "reflect": (lambda: nn.Conv2d(6, 8, 3, padding=(2, 1), padding_mode="reflect"), (1, 6, 9, 7)),
    "circular": (lambda: nn.Conv2d(6, 8, 5, stride=2, padding=2, padding_mode="circular"), (1, 6, 9, 7)),
    "same": (lambda: nn.Conv2d(6, 8, (5, 3), dilation=2, padding="same"), (1, 6, 9, 7)),
    "timm": (lambda: timm.layers.Conv2dSame(6, 8, 3, stride=2), (1, 6, 9, 7)),
}
CASES = [(name, form) for name in LAYERS for form in ("channel", "spatial") if form == "channel" or name[0] not in "lw"]


def made(name, form, rank=None):
    build, shape = LAYERS[name]
    layer = build().double()
    matrix = layer.weight.flatten(1)
    if form == "spatial" and name != "timm":
        matrix = layer.weight.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
    rank = rank or min(matrix.shape)
    factors = factorise_linear(layer, rank) if isinstance(layer, nn.Linear) else factorise_conv(layer, rank, form)
    return layer, factors, matrix.detach(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_with_the_full_rank_the_outputs_are_the_layers(name, form):
    layer, factors, _, inputs = made(name, form)
    torch.testing.assert_close(factors(inputs), layer(inputs), atol=1e-10, rtol=0)
    torch.testing.assert_close(factors.weight, layer.weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_error_is_that_of_the_singular_values_left_out(name, form):
    rank = 3
    layer, factors, matrix, inputs = made(name, form, rank)
    lost = torch.linalg.svdvals(matrix)[rank:].norm()
    assert (factors.weight - layer.weight).norm().item() == pytest.approx(lost.item(), rel=1e-9)
    assert factors(inputs).shape == layer(inputs).shape
    expected = torch.func.functional_call(layer, {"weight": factors.weight}, (inputs,))
    torch.testing.assert_close(factors(inputs), expected, atol=1e-10, rtol=0)
    norms = factors.first.weight.flatten(1).norm(dim=1)  # the singular values are shared evenly
    assert norms.square().tolist() == pytest.approx(torch.linalg.svdvals(matrix)[:rank].tolist())


def test_parameters_of_both_forms_by_formula():
    layer = nn.Conv2d(64, 128, 3, bias=False)

    def count(form):
        return sum(parameter.numel() for parameter in factorise_conv(layer, 8, form).parameters())

    assert count("channel") == 8 * (9 * 64 + 128) == 5632
    assert count("spatial") == 8 * 3 * (64 + 128)


def test_factors_keep_type_device_layout_gradients_and_mode():
    layer = nn.Conv2d(6, 8, 3).half().to(memory_format=torch.channels_last).requires_grad_(False).eval()
    factors = factorise_conv(layer, 2)
    assert {parameter.dtype for parameter in factors.parameters()} == {torch.float16}
    assert not any(parameter.requires_grad for parameter in factors.parameters())
    assert factors.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module.training for module in factors.modules())
    assert factors.bias is not layer.bias


@pytest.mark.parametrize("rank", [0, -1, 9, 2.0, True])
def test_ranks_that_cannot_be_are_refused(rank):
    with pytest.raises(UserError, match="whole number from 1 to 8"):
        factorise_conv(nn.Conv2d(6, 8, 3), rank)


def test_other_layers_are_refused():
    with pytest.raises(UnsupportedError, match="2 groups"):
        factorise_conv(nn.Conv2d(6, 8, 3, groups=2), 2)
    with pytest.raises(UserError, match="unknown form 'x'; known: channel, spatial"):
        factorise_conv(nn.Conv2d(6, 8, 3), 2, "x")
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        factorise_linear(layer, 1)


# Batch norms


class Reused(nn.Module):
    """The first convolution's output is used beside the norm, the second's is changed in place before it."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.linear = nn.Linear(3, 4)

    def forward(self, images):
        features = self.convs[0](images)
        features = features + self.norms[0](features)
        features = self.convs[1](features)
        features.mul_(2)
        features = self.norms[1](features)
        features = self.norms[2](self.convs[2](features)).relu()
        return self.linear(features.mean((2, 3)))


def test_only_pairs_that_leave_the_outputs_as_they_are_are_folded(warmed):
    network = Reused()
    for norm in network.norms:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    network.linear.weight.data *= 10
    warmed(network, size=32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded, pairs = fold_batchnorm(network, IMAGES)
    assert pairs == {"norms.2": "convs.2"}
    torch.testing.assert_close(folded(IMAGES), network(IMAGES), atol=1e-5, rtol=0)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


NETWORKS = {
    "ResNet": lambda: ResNet(5, depth=8),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_norms_behind_layers_are_folded(name, warmed):
    network = warmed(NETWORKS[name](), size=32)
    folded, pairs = fold_batchnorm(network, IMAGES)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert len(pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    with torch.no_grad():
        assert relative(folded(IMAGES), network(IMAGES)) < 1e-4


# Networks


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_a_network_keeps_its_budget_and_its_plan_makes_it_again(name, form, warmed):
    network = warmed(NETWORKS[name](), size=32)
    small, report = low_rank_network(network, LowRankConfig(flops=0.8, form=form), IMAGES)
    assert report.flops[1] <= 0.8 * report.flops[0]
    assert report.parameters[1] == sum(parameter.numel() for parameter in small.parameters()) < report.parameters[0]
    gone = sum(layer.parameters[0] - layer.parameters[1] for layer in report.layers)
    norms = report.parameters[0] - report.parameters[1] - gone  # weights of norms have gone, biases stay
    assert 0 <= norms < 0.1 * report.parameters[0]
    plan = json.loads(json.dumps(report.plan))
    again, _ = low_rank_network(NETWORKS[name](), LowRankConfig(**plan))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.eval()(IMAGES), small(IMAGES))


def test_the_counted_operations_are_those_of_the_layers(warmed):
    network = warmed(ResNet(5, depth=8), size=32)
    _, report = low_rank_network(network, LowRankConfig(energy=0.5), IMAGES)
    saved = sum(layer.flops[0] - layer.flops[1] for layer in report.layers)
    assert saved == report.flops[0] - report.flops[1] > 0


def test_ranks_by_energy_are_the_smallest_that_keep_it(warmed):
    network = warmed(ResNet(5, depth=8), size=32)
    small, report = low_rank_network(network, LowRankConfig(energy=0.6), IMAGES)
    folded, _ = fold_batchnorm(network, IMAGES)
    assert [layer.name for layer in report.layers if layer.rank]
    for layer in report.layers:
        energies = torch.linalg.svdvals(folded.get_submodule(layer.name).weight.flatten(1).double()).square()
        wanted = int((energies.cumsum(0) / energies.sum() < 0.6).sum()) + 1
        rows, columns = layer.shape[0], energies.new_tensor(layer.shape[1:]).prod().int().item()
        if low_rank_saves(rows, columns, wanted):
            assert layer.rank == small.get_submodule(layer.name).first.out_channels == wanted
            assert layer.energy >= 0.6
            assert layer.error == pytest.approx((1 - layer.energy) ** 0.5)
        else:
            assert (layer.rank, layer.energy) == (None, 1.0)
            assert "would not save" in layer.reason


def test_stem_and_head_stay_unless_named(warmed):
    network = warmed(ResNet(5, depth=8), size=32)
    _, report = low_rank_network(network, LowRankConfig(rank=2), IMAGES)
    names = [layer.name for layer in report.layers]
    assert set(report.plan["ranks"].values()) == {2}
    assert "linear" not in names
    assert len(names) == 6
    _, report = low_rank_network(network, LowRankConfig(rank=1, target_modules=["linear"]), IMAGES)
    assert report.plan["ranks"] == {"linear": 1}


def test_a_budget_loses_no_more_than_the_same_rank_share_everywhere(warmed):
    network = warmed(ResNet(5, depth=14), size=32)
    _, even = low_rank_network(network, LowRankConfig(energy=0.7), IMAGES)
    share = even.flops[1] / even.flops[0]
    _, report = low_rank_network(network, LowRankConfig(flops=share + 1e-9), IMAGES)
    assert sum(layer.error**2 for layer in report.layers) <= sum(layer.error**2 for layer in even.layers) * 1.05


def test_the_network_itself_stays_and_modes_are_kept():
    network = ResNet(5, depth=8).train()
    network.layer1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    small, _ = low_rank_network(network, LowRankConfig(rank=2), IMAGES)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training
    assert small.training
    assert not any(module.training for module in small.layer1.modules())
    small(IMAGES).sum().backward()  # all factors can be trained
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_layers_that_compute_more_than_a_product_are_left_alone():
    network = timm.create_model("test_nfnet", num_classes=5).eval()
    small, report = low_rank_network(network, LowRankConfig(rank=2), IMAGES)
    reasons = {layer.reason.replace("4", "2").replace("3", "2") for layer in report.layers if "Std" in layer.kind}
    assert reasons == {"it computes more than its weight says", "it has 2 groups"}
    assert {small.get_submodule(name).first.__class__ for name in report.plan["ranks"]} == {nn.Conv2d}


def test_weights_that_are_used_without_a_call_are_left_alone():
    network = torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=5).eval()
    small, report = low_rank_network(network, LowRankConfig(rank=2), IMAGES)
    reasons = {layer.name.rpartition(".")[2]: layer.reason for layer in report.layers}
    assert reasons["qkv"] == reasons["proj"] == "its weight is used without calling it"
    assert report.plan["ranks"] == {f"features.1.{block}.mlp.{layer}": 2 for block in (0, 1) for layer in (0, 3)}
    assert small(IMAGES).shape == (2, 5)


CONFIGS = [
    ({"energy": 1.5}, "energy is 1.5"),
    ({"energy": 0}, "energy is 0"),
    ({"flops": 1}, "flops is 1"),
    ({"rank": 0}, "rank is 0"),
    ({"rank": 1.5}, "rank is 1.5"),
    ({"ranks": {"linear": True}}, "linear is True"),
    ({"form": "depth"}, "unknown form 'depth'"),
    ({"energy": 0.9, "rank": 2}, "energy and rank are given"),
]


@pytest.mark.parametrize(("arguments", "sentence"), CONFIGS, ids=str)
def test_configurations_that_cannot_be_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        LowRankConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"energy": 1.0}, "with an energy of 1 no layer gets smaller; give 0.9"),
        ({"rank": 1000}, "rank 1000 makes no layer smaller; give 57 or less"),
        ({"flops": 0.01}, r"with rank 1 everywhere 0\.0\d+ of the operations are left"),
        ({"target_modules": "nothing"}, "nothing"),
        ({"ranks": {"layer9": 2}, "folded": {}}, "the network has no Linear or Conv2d called 'layer9'"),
        ({"ranks": {"linear": 6}, "folded": {}}, "ranks has 6 for linear, whose largest rank is 5"),
        ({"ranks": {"linear": 2}, "folded": {"linear": "linear"}}, "no BatchNorm1d or BatchNorm2d called 'linear'"),
    ],
    ids=str,
)
def test_what_cannot_be_reached_is_told(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        low_rank_network(ResNet(5, depth=8), LowRankConfig(**arguments), IMAGES)


def test_weights_that_are_not_finite_are_told_by_name():
    network = ResNet(5, depth=8)
    network.linear.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="the weight of linear holds numbers that are not finite"):
        low_rank_network(network, LowRankConfig(rank=1, target_modules=["linear"]), IMAGES)


def test_without_an_image_nothing_can_be_chosen():
    with pytest.raises(UserError, match="an image is needed"):
        low_rank_network(ResNet(5, depth=8), LowRankConfig())


def test_what_is_compressed_already_or_carries_adapters_is_told():
    network = ResNet(5, depth=8)
    small, _ = low_rank_network(network, LowRankConfig(rank=4), IMAGES)
    with pytest.raises(UserError, match=r"made of factors already; compress the network that it was made from"):
        low_rank_network(small, LowRankConfig(rank=2), IMAGES)
    adapted = add_adapter(network, ConvAdapterConfig(scheme="conv_parallel"))
    with pytest.raises(UserError, match="the network carries adapters; merge them first"):
        low_rank_network(adapted, LowRankConfig(rank=2), IMAGES)
    with pytest.raises(UserError, match="none without an adapter was found"):
        low_rank_network(adapted.get_base_model(), LowRankConfig(rank=2), IMAGES)


def test_layers_beside_an_adapter_are_factorised_under_their_own_names(warmed):
    network = warmed(ResNet(5, depth=8), size=32)
    adapted = add_adapter(network, ConvAdapterConfig(scheme="residual_parallel")).get_base_model().eval()
    small, report = low_rank_network(adapted, LowRankConfig(ranks={"layer1.0.base_layer.conv1": 16}), IMAGES)
    assert report.plan["ranks"] == {"layer1.0.base_layer.conv1": 16}
    torch.testing.assert_close(small(IMAGES), adapted(IMAGES), atol=1e-4, rtol=0)
    _, report = low_rank_network(adapted, LowRankConfig(rank=2), IMAGES)
    assert {name.split(".")[2] for name in report.plan["ranks"]} == {"base_layer"}
