import copy
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_automl.models.genotype import Genotype
from lightning_automl.models.layers import norm_layer
from lightning_automl.models.ops import (
    DARTS_OPERATIONS,
    NASBENCH201_OPERATIONS,
    OPS,
    FactorizedReduce,
    Operation,
    ReluConvNorm,
    SeparableConv,
    Zero,
    operation,
)
from lightning_automl.rundir import UserError

CASES = [(name, stride) for name in OPS for stride in (1, 2)]

#: Parameters of each operation at so many channels, without the norms'; what stride 2 adds is in `STRIDED`.
PARAMETERS = {
    "none": lambda c: 0,
    "max_pool_3x3": lambda c: 0,
    "avg_pool_3x3": lambda c: 0,
    "skip_connect": lambda c: 0,
    "sep_conv_3x3": lambda c: 2 * (9 * c + c**2),
    "sep_conv_5x5": lambda c: 2 * (25 * c + c**2),
    "sep_conv_7x7": lambda c: 2 * (49 * c + c**2),
    "dil_conv_3x3": lambda c: 9 * c + c**2,
    "dil_conv_5x5": lambda c: 25 * c + c**2,
    "conv_7x1_1x7": lambda c: 14 * c**2,
    "dw_conv_3x3": lambda c: 9 * c,
    "dw_conv_5x5": lambda c: 25 * c,
    "nor_conv_1x1": lambda c: c**2,
    "nor_conv_3x3": lambda c: 9 * c**2,
    "squeeze_excitation": lambda c: 2 * c * (c // 4) + c // 4 + c,
}
STRIDED = {"skip_connect": lambda c: c**2, "squeeze_excitation": lambda c: c**2}
#: Norms of each operation at strides 1 and 2.
NORMS = {
    **dict.fromkeys(("none", "max_pool_3x3", "avg_pool_3x3"), (0, 0)),
    **dict.fromkeys(("skip_connect", "squeeze_excitation"), (0, 1)),
    **dict.fromkeys(("sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"), (2, 2)),
}
#: The pixels of one row, as distances, that a pixel of the result depends on; None: all.
SEEN = {
    "none": [],
    "skip_connect": [0],
    "nor_conv_1x1": [0],
    **dict.fromkeys(("max_pool_3x3", "avg_pool_3x3", "dw_conv_3x3", "nor_conv_3x3"), (-1, 0, 1)),
    "dw_conv_5x5": [-2, -1, 0, 1, 2],
    "conv_7x1_1x7": list(range(-3, 4)),
    "sep_conv_3x3": list(range(-2, 3)),
    "sep_conv_5x5": list(range(-4, 5)),
    "sep_conv_7x7": list(range(-6, 7)),
    "dil_conv_3x3": [-2, 0, 2],
    "dil_conv_5x5": [-4, -2, 0, 2, 4],
    "squeeze_excitation": None,
}
#: The operations whose channels do not see each other.
WITHIN_CHANNELS = {"none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "dw_conv_3x3", "dw_conv_5x5"}


def no_affine(channels):
    return norm_layer("batch", channels, affine=False)


def no_norm(channels):
    return nn.Identity()


def build(name, channels=8, stride=1, norm=no_affine):
    return operation(name).build(channels, stride, norm).double()


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize(("name", "stride"), CASES)
def test_parameters_are_as_many_as_the_formula_says(name, stride, channels):
    expected = PARAMETERS[name](channels)
    if stride == 2 and name in STRIDED:
        expected += STRIDED[name](channels)
    assert sum(value.numel() for value in build(name, channels, stride).parameters()) == expected
    # each norm brings a scale and a shift in what is built after the search
    norms = NORMS.get(name, (1, 1))[stride - 1]
    affine = build(name, channels, stride, nn.BatchNorm2d)
    assert sum(value.numel() for value in affine.parameters()) == expected + norms * 2 * channels


@pytest.mark.parametrize(("name", "stride"), CASES)
def test_channels_stay_and_stride_2_halves_each_side_rounding_up(name, stride):
    module = build(name, 8, stride)
    for height, width in ((8, 8), (7, 7), (7, 8), (6, 5), (2, 2), (3, 1), (1, 1)):
        given = images(3, 8, height, width)
        before = given.clone()
        assert module(given).shape == (3, 8, ceil(height / stride), ceil(width / stride))
        assert torch.equal(given, before), "the operation changed its input"


@pytest.mark.parametrize(("name", "stride"), CASES)
def test_gradients_are_finite_and_reach_every_parameter_and_the_input(name, stride):
    module, given = build(name, 8, stride), images(4, 8, 7, 7).requires_grad_()
    out = module(given)
    (out * torch.randn_like(out)).sum().backward()
    for parameter_name, gradient in [("input", given.grad), *((n, p.grad) for n, p in module.named_parameters())]:
        assert gradient is not None, parameter_name
        assert gradient.isfinite().all(), parameter_name
        assert gradient.abs().max() > 0 or name == "none", parameter_name


@pytest.mark.parametrize(("name", "stride"), CASES)
def test_two_edges_share_no_parameter_and_differ(name, stride):
    one, two = build(name, 8, stride), build(name, 8, stride)
    assert not {id(value) for value in one.parameters()} & {id(value) for value in two.parameters()}
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        assert not torch.equal(first, second)


@pytest.mark.parametrize(("name", "stride"), CASES)
def test_channels_last_stays_so_and_gives_the_same(name, stride):
    module, given = build(name, 8, stride), images(2, 8, 7, 7)
    expected = module(given)
    out = copy.deepcopy(module).to(memory_format=torch.channels_last)(
        given.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", OPS)
def test_a_pixel_sees_the_neighbours_of_its_kernel_and_the_channels_of_its_kind(name):
    module = build(name, 8, 1, no_norm)
    seen = torch.zeros(8, 17, 17, dtype=torch.bool)
    for _ in range(30):  # what ReLU or the maximum hides in one image, another shows
        given = torch.rand(1, 8, 17, 17, dtype=torch.float64).requires_grad_()
        with torch.no_grad():
            for value in module.parameters():
                value.normal_()
        (gradient,) = torch.autograd.grad(module(given)[0, 3, 8, 8], given)
        seen |= gradient[0] != 0
    distances = range(-8, 9) if SEEN[name] is None else SEEN[name]
    expected = torch.zeros(17, 17, dtype=torch.bool)
    for row in distances:
        for column in distances:
            expected[8 + row, 8 + column] = True
    assert torch.equal(seen.any(0), expected)
    channels = seen.any((1, 2)).nonzero().flatten().tolist()
    assert channels == ([] if name == "none" else [3] if name in WITHIN_CHANNELS else list(range(8)))


@pytest.mark.parametrize("name", [name for name in OPS if name not in STRIDED and NORMS.get(name) != (2, 2)])
def test_stride_2_is_what_stride_1_gives_at_every_second_pixel(name):
    """But for reductions, which see all pixels, and separable convolutions, half of which comes after the stride."""
    whole, strided = build(name, norm=no_norm), build(name, stride=2, norm=no_norm)
    strided.load_state_dict(whole.state_dict())
    for height, width in ((8, 8), (7, 6)):
        given = images(2, 8, height, width)
        torch.testing.assert_close(strided(given), whole(given)[:, :, ::2, ::2])


def test_the_darts_operations_come_first_since_their_order_decides_ties():
    assert tuple(OPS)[:8] == DARTS_OPERATIONS
    assert set(NASBENCH201_OPERATIONS) <= OPS.keys()


def test_a_norm_follows_the_pools_alone():
    assert {name for name in OPS if OPS[name].pool} == {"max_pool_3x3", "avg_pool_3x3"}


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 7), (5, 5), (1, 1)])
def test_zero_gives_zeros_of_the_size_of_the_other_operations(size):
    given = images(2, 4, *size).requires_grad_()
    for stride in (1, 2):
        out = Zero(stride)(given)
        assert out.shape == build("max_pool_3x3", 4, stride)(given).shape
        assert not out.any()
        (gradient,) = torch.autograd.grad(out.sum(), given)
        assert not gradient.any()


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 7), (5, 5), (1, 1)])
def test_factorized_reduce_has_the_even_pixels_and_the_odd_ones_and_zeros_beyond_the_edge(size):
    module = FactorizedReduce(3, 4, no_norm).double()
    given = images(2, 3, *size)
    padded = torch.zeros(2, 3, size[0] + size[0] % 2, size[1] + size[1] % 2, dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = given.relu()
    first, second = (
        torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], padded[:, :, shift::2, shift::2])
        for conv, shift in ((module.conv1, 0), (module.conv2, 1))
    )
    torch.testing.assert_close(module(given), torch.cat([first, second], 1))


def test_factorized_reduce_halves_even_sizes_and_normalises():
    out = FactorizedReduce(3, 8, nn.BatchNorm2d)(torch.randn(16, 3, 32, 16))
    assert out.shape == (16, 8, 16, 8)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)


def test_factorized_reduce_refuses_odd_channels():
    with pytest.raises(UserError, match="needs an even number of channels, not 5"):
        FactorizedReduce(4, 5, no_norm)
    with pytest.raises(UserError, match="even"):
        build("skip_connect", 5, 2)
    build("skip_connect", 5, 1)
    assert FactorizedReduce(5, 6, no_norm)(torch.rand(1, 5, 4, 4)).shape == (1, 6, 2, 2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_separable_convolution_by_its_formula(kernel, stride):
    module, out = SeparableConv(4, kernel, stride, nn.BatchNorm2d).double(), images(3, 4, 7, 8)
    found = module(out)
    halves = [(module.depthwise1, module.pointwise1, stride), (module.depthwise2, module.pointwise2, 1)]
    for depthwise, pointwise, step in halves:
        out = F.conv2d(out.clamp(min=0), depthwise.weight, None, step, kernel // 2, groups=4)
        out = torch.einsum("oi,nihw->nohw", pointwise.weight[:, :, 0, 0], out)
        out = (out - out.mean((0, 2, 3), keepdim=True)) / (out.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, out)


@pytest.mark.parametrize("kernel", [1, 3])
def test_relu_comes_before_the_convolution_and_the_norm_after_it(kernel):
    module = ReluConvNorm(3, 5, kernel, 1, nn.BatchNorm2d)
    given = torch.randn(4, 3, 6, 6)
    expected = F.batch_norm(F.conv2d(given.relu(), module.conv.weight, padding=kernel // 2), None, None, training=True)
    torch.testing.assert_close(module(given), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_do_not_count_what_is_beyond_the_edge(stride):
    given = torch.full((1, 2, 5, 5), -3.0)
    for name in ("max_pool_3x3", "avg_pool_3x3"):
        out = OPS[name].build(2, stride, no_norm)(given)
        assert torch.equal(out, torch.full_like(out, -3.0))


def test_skip_connect_is_the_identity():
    given = images(2, 4, 5, 5)
    assert torch.equal(build("skip_connect", 4)(given), given)


def test_squeeze_excitation_by_its_formula():
    module, given = build("squeeze_excitation", 8), images(3, 8, 5, 6)
    means = given.flatten(2).mean(2)
    squeezed = (means @ module.squeeze.weight.flatten(1).T + module.squeeze.bias).relu()
    scales = torch.sigmoid(squeezed @ module.excite.weight.flatten(1).T + module.excite.bias)
    torch.testing.assert_close(module(given), given * scales[:, :, None, None])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sep_conv_3", "unknown operation 'sep_conv_3'; did you mean sep_conv_3x3"),
        ("skip", "known: none, max_pool_3x3"),
        (None, "unknown operation None; did you mean none?"),
        (["none"], r"unknown operation \['none'\]"),
    ],
)
def test_an_unknown_operation_is_refused_with_the_known_ones(name, told):
    with pytest.raises(UserError, match=told):
        operation(name)


def test_an_own_operation_joins_the_registry_and_genotypes(monkeypatch):
    with pytest.raises(UserError, match="unknown operation 'mine'"):
        Genotype(normal=[[("mine", 0)]], normal_concat=[2], operations=["mine"])
    monkeypatch.setitem(OPS, "mine", Operation(lambda channels, stride, norm: nn.Conv2d(channels, channels, 1, stride)))
    assert build("mine", 4, 2)(images(1, 4, 6, 6)).shape == (1, 4, 3, 3)
    assert Genotype(normal=[[("mine", 0)]], normal_concat=[2], operations=["mine"]).normal == ((("mine", 0),),)
