import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_automl.models import fused_operations
from lightning_automl.models.derivation import Edges, cell_edges
from lightning_automl.models.fused_cell import fused_mix
from lightning_automl.models.fused_depthwise import depthwise, joined, phases
from lightning_automl.models.fused_norms import equal
from lightning_automl.models.layers import norm_layer
from lightning_automl.models.ops import DARTS_OPERATIONS, NASBENCH201_OPERATIONS, OPS, Operation
from lightning_automl.models.relaxations import AuxiliarySkip, Mixture, PartialChannels
from lightning_automl.models.search_cell import MixedOp, mix
from lightning_automl.models.supernet import DartsSpace

CHANNELS, NODES = 8, 3
SIZES = [(8, 8), (7, 10), (6, 5)]


class Cell(nn.Module):
    """Edges, a wiring and what weighs them; inputs are halved by a reduction."""

    def __init__(self, operations=DARTS_OPERATIONS, reduction=False, norm="batch", affine=False, partial=1, **options):
        super().__init__()
        torch.manual_seed(0)
        self.wiring = options.pop("wiring", cell_edges(2, NODES))
        self.edges = nn.ModuleList(
            MixedOp(
                operations,
                CHANNELS,
                2 if reduction and source < self.wiring.inputs else 1,
                lambda channels: norm_layer(norm, channels, affine=affine),
                partial,
                **options,
            )
            for source in self.wiring.sources
        )
        for parameter in self.parameters():  # scales and shifts of norms are no ones and zeros
            nn.init.normal_(parameter, std=0.5)
        for name, buffer in self.named_buffers():
            if name.endswith("running_mean"):
                nn.init.normal_(buffer)
            if name.endswith("running_var"):
                nn.init.uniform_(buffer, 0.5, 2.0)
        count = len(self.wiring.sources)
        self.weights = nn.Parameter(torch.rand(count, len(operations)))
        self.factors = nn.Parameter(torch.rand(count))

    def mixture(self, factors=False, skip=0.0):
        return Mixture(self.weights, self.factors if factors else None, skip=skip)


def outcome(form, cell, size=(8, 8), dtype=torch.float64, layout=torch.contiguous_format, **mixture):
    """Nodes, gradients of inputs and of every parameter, and buffers afterwards."""
    state = {name: value.clone() for name, value in cell.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, CHANNELS, *size, generator=generator, dtype=torch.float64) for _ in range(2)]
    inputs = [x.to(dtype).contiguous(memory_format=layout).requires_grad_() for x in inputs[: cell.wiring.inputs]]
    nodes = form(inputs, cell.edges, cell.wiring, cell.mixture(**mixture))[cell.wiring.inputs :]
    loss = sum(
        (node.to(dtype) * torch.randn(node.shape, generator=generator, dtype=torch.float64)).sum() for node in nodes
    )
    wanted = {f"input {number}": x for number, x in enumerate(inputs)} | dict(cell.named_parameters())
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"node {number}": node.detach() for number, node in enumerate(nodes)}
    for (name, parameter), gradient in zip(wanted.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    found |= {f"buffer {name}": buffer.clone() for name, buffer in cell.named_buffers()}
    cell.load_state_dict(state)
    return found


def assert_same(cell, tolerance=1e-9, **options):
    expected, found = outcome(mix, cell, **options), outcome(fused_mix, cell, **options)
    assert list(expected) == list(found)
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name],
            value,
            rtol=0,
            atol=tolerance * scale,
            check_stride=False,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    return expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_the_fast_form_of_a_cell_is_the_readable_one(reduction, size, layout):
    assert_same(Cell(reduction=reduction).double(), size=size, layout=layout)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("norm", ["batch", "group", "sync_batch", "none"])
def test_all_norms(norm, affine, reduction):
    assert_same(Cell(norm=norm, affine=affine, reduction=reduction).double())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("norm", ["batch", "sync_batch"])
def test_running_statistics_are_used_and_moved_as_modules_do(norm, tracked, training):
    cell = Cell(norm=norm, reduction=True).double().train(training)
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = tracked  # as during the step of the architecture
    before = {f"buffer {name}": buffer.clone() for name, buffer in cell.named_buffers()}
    after = assert_same(cell)
    moved = [name for name, buffer in before.items() if not torch.equal(buffer, after[name])]
    assert len(moved) == (len(before) if training and tracked else 0)


def test_batch_norms_that_never_had_running_statistics():
    cell = Cell().double()
    for name, module in list(cell.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(
                cell.get_submodule(parent), child, nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False)
            )
    assert_same(cell.double())
    assert_same(cell.eval())


def test_a_norm_that_averages_over_all_steps_runs_by_itself():
    cell = Cell().double()
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    assert_same(cell)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_every_operation_alone_and_with_none(name, reduction, norm):
    assert_same(Cell((name,), reduction, norm).double(), size=(8, 10))
    if name != "none":
        assert_same(Cell((name, "none"), reduction, norm).double(), size=(7, 7))


def test_all_operations_together():
    assert_same(Cell(tuple(OPS)).double())
    assert_same(Cell(tuple(reversed(OPS)), reduction=True, affine=True).double())


def test_an_operation_of_ones_own_runs_through_its_module(monkeypatch):
    monkeypatch.setitem(
        OPS, "mine", Operation(lambda channels, stride, norm: nn.Conv2d(channels, channels, 3, stride, 1))
    )
    assert_same(Cell(("mine", "skip_connect", "sep_conv_3x3"), reduction=True).double())


def test_convolutions_that_an_adapter_replaced_run_through_their_modules():
    class Doubled(nn.Conv2d):
        def forward(self, images):
            return 2 * super().forward(images)

    cell = Cell().double()
    for edge in cell.edges:
        conv = edge.operations["dil_conv_3x3"].pointwise
        edge.operations["dil_conv_3x3"].pointwise = Doubled(CHANNELS, CHANNELS, 1, bias=False).double()
        edge.operations["dil_conv_3x3"].pointwise.load_state_dict(conv.state_dict())
    assert_same(cell)


def test_convolutions_with_hooks_run_through_their_modules():
    cell = Cell(["none", "sep_conv_3x3", "nor_conv_1x1"]).double()
    calls = []
    cell.edges[1].operations["sep_conv_3x3"].pointwise1.register_forward_hook(lambda *_: calls.append("after"))
    cell.edges[2].operations["sep_conv_3x3"].depthwise1.register_forward_pre_hook(lambda *_: calls.append("before"))
    assert_same(cell)
    assert sorted(calls) == 2 * ["after"] + 2 * ["before"]


def test_convolutions_with_another_padding_run_through_their_modules():
    cell = Cell(["none", "sep_conv_3x3"]).double()
    for edge in cell.edges:
        edge.operations["sep_conv_3x3"].depthwise1.padding_mode = "reflect"
    assert_same(cell)


def test_one_operation_may_be_on_several_edges():
    cell = Cell(["none", "sep_conv_3x3"]).double()
    for edge in cell.edges:
        edge.operations["sep_conv_3x3"].pointwise1 = cell.edges[0].operations["sep_conv_3x3"].pointwise1
    assert_same(cell)


@pytest.mark.parametrize(("reduction", "layout"), [(False, torch.channels_last), (True, torch.contiguous_format)])
def test_devices_other_than_cpus_keep_the_layout(reduction, layout):
    """The meta device stands for GPUs: it takes their way through the code, and has no numbers to wait for."""
    cell = Cell(reduction=reduction).to("meta")
    inputs = [torch.randn(3, CHANNELS, 8, 8, device="meta").contiguous(memory_format=layout) for _ in range(2)]
    inputs.append(torch.randn(3, 2 * CHANNELS, 8, 8, device="meta").chunk(2, 1)[1])  # in no layout at all
    for pair in (inputs[:2], inputs[1:]):
        nodes = fused_mix(pair, cell.edges, cell.wiring, cell.mixture())
        sum(node.sum() for node in nodes).backward()
        assert [node.shape for node in nodes] == [
            node.shape for node in mix(pair, cell.edges, cell.wiring, cell.mixture())
        ]


def test_one_edge_with_another_kernel_runs_through_its_module():
    cell = Cell(("sep_conv_3x3", "avg_pool_3x3")).double()
    cell.edges[0].operations["sep_conv_3x3"] = MixedOp(["sep_conv_5x5"], CHANNELS, 1, nn.BatchNorm2d).operations[
        "sep_conv_5x5"
    ]
    assert_same(cell.double())


@pytest.mark.parametrize("factors", [False, True], ids=["all edges", "weighted edges"])
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
@pytest.mark.parametrize("partial", [1, 2, 4])
def test_partial_channels_edge_weights_and_auxiliary_skips(partial, reduction, factors):
    cell = Cell(reduction=reduction, partial=partial, auxiliary=True).double()
    assert_same(cell, factors=factors)
    assert_same(cell, factors=factors, skip=0.7, size=(7, 10))


@pytest.mark.parametrize("norm", ["batch", "group", "sync_batch"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_products_that_are_made_again_on_the_way_back(norm, training, monkeypatch):
    cell = Cell(norm=norm, affine=True, reduction=True).double().train(training)
    images = [torch.randn(3, CHANNELS, 8, 8, dtype=torch.float64) for _ in range(2)]
    again = []
    for large in (fused_operations.LARGE, 0):
        monkeypatch.setattr(fused_operations, "LARGE", large)
        assert_same(cell)
        loss = fused_mix(images, cell.edges, cell.wiring, cell.mixture())[-1].sum()
        with Calls() as calls:
            torch.autograd.grad(loss, cell.weights)
        again.append(calls.names.count("convolution"))
    assert again[0] == 0
    assert again[1] > 0


def test_weights_of_zero():
    cell = Cell().double()
    nn.init.zeros_(cell.weights)
    nn.init.zeros_(cell.factors)
    assert_same(cell, factors=True)


def test_wirings_of_one_input_and_of_few_edges():
    assert_same(Cell(NASBENCH201_OPERATIONS, pool_norm=False, wiring=cell_edges(1, 3)).double())
    assert_same(Cell(wiring=Edges((0, 1, 0, 2), (2, 2, 3, 4), 2)).double())


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_float32(reduction):
    assert_same(Cell(reduction=reduction), tolerance=1e-4, dtype=torch.float32)


def test_bfloat16_is_as_close_as_the_readable_form():
    cell = Cell().eval()  # a batch's statistics turn rounding into much more
    exact = outcome(mix, cell, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        readable, fast = (outcome(form, cell, dtype=torch.float32) for form in (mix, fused_mix))
    for name, value in exact.items():
        value = value.float()
        assert (fast[name] - value).norm() <= 2 * (readable[name] - value).norm() + 0.01 * value.norm(), name


@pytest.mark.parametrize("relaxation", [None, PartialChannels(2), AuxiliarySkip()], ids=["softmax", "partial", "skip"])
def test_a_space_gives_the_same_fused_or_not(relaxation):
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        space = DartsSpace(5, channels=4, cells=3, relaxation=relaxation, fused=fused).double()
        logits = space(images)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(space.parameters()))])
        found[-1] += list(space.buffers())
    for expected, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (1, 5), (5, 1), (3, 5)], ids=str)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("width", [7, 9, 10])
@pytest.mark.parametrize("edges", [1, 3])
def test_depthwise_convolutions_of_several_edges(kernel, stride, dilation, width, edges):
    torch.manual_seed(0)
    images = torch.randn(2, 2, 6, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2 * edges, 1, *kernel, dtype=torch.float64, requires_grad=True)
    padding = kernel[0] // 2 * dilation, kernel[1] // 2 * dilation
    expected = F.conv2d(images.repeat(1, edges, 1, 1), weight, None, stride, padding, dilation, 2 * edges)
    found = depthwise(images, weight, ((stride, stride), padding, (dilation, dilation)))
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for wanted in ([images], [weight], [images, weight]):
        for fast, slow in zip(
            torch.autograd.grad(found, wanted, gradient, retain_graph=True),
            torch.autograd.grad(expected, wanted, gradient, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(fast, slow)


class Calls(TorchDispatchMode):
    """Counts what would be kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        inputs = {value.untyped_storage().data_ptr() for value in arguments if isinstance(value, torch.Tensor)}
        is_view = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() in inputs
        name = function.overloadpacket.__name__
        if name.endswith("_") or not (is_view or name.startswith(("empty", "new_empty", "split", "unbind", "detach"))):
            self.names.append(name)
        return result


def test_gradients_of_weights_are_not_computed_when_not_asked_for():
    images, weight = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(8, 1, 5, 5, requires_grad=True)
    out = depthwise(images, weight, ((1, 1), (2, 2), (1, 1))).sum()
    for wanted, count in ((images, 1), ([images, weight], 3)):
        with Calls() as calls:
            torch.autograd.grad(out, wanted, retain_graph=True)
        assert calls.names.count("convolution_backward") == count


def test_a_second_derivative_is_refused_not_wrong():
    cell = Cell(("sep_conv_3x3",)).double()
    images = torch.randn(2, CHANNELS, 8, 8, dtype=torch.float64, requires_grad=True)
    loss = fused_mix([images, images], cell.edges, cell.wiring, cell.mixture())[-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_phases_part_an_image_and_join_it():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    parted = phases(images)
    assert parted.shape == (8, 3, 2, 3)
    torch.testing.assert_close(parted[:2], images[:, :, ::2, ::2])
    torch.testing.assert_close(parted[2:4], images[:, :, ::2, 1::2])
    torch.testing.assert_close(joined(parted), images)


def test_norms_with_parameters_or_statistics_of_their_own_are_not_equal():
    plain = [nn.BatchNorm2d(4, affine=False) for _ in range(2)]
    assert equal(plain)
    assert equal([nn.GroupNorm(2, 4, affine=False)] * 2)
    assert not equal([nn.BatchNorm2d(4)] * 2)
    assert not equal([norm.eval() for norm in plain])
    assert not equal([nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4, affine=False)])


def test_the_fast_form_calls_less_than_half_of_the_kernels():
    counts = []
    for fused in (False, True):
        space = DartsSpace(10, channels=4, cells=3, fused=fused)
        with Calls() as calls:
            loss = space(torch.rand(2, 3, 8, 8)).sum()
            torch.autograd.grad(loss, list(space.parameters()))
        counts.append(len(calls.names))
    assert counts[1] < counts[0] / 2
