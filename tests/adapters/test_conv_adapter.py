import copy
import inspect
import json
import logging
from itertools import pairwise

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_automl.adapters import conv_adapter
from lightning_automl.adapters.conv_adapter import ConvAdapterConfig, ConvAdapterLayer, calibrate
from lightning_automl.adapters.files import add_adapter, load_adapter, save_adapter, switch_adapter
from lightning_automl.models import ResNet
from lightning_automl.rundir import UnsupportedError, UserError

SCHEMES = conv_adapter._CHOICES["scheme"]
BLOCK = {
    **{"in_channels": 8, "out_channels": 8, "kernel_size": (3, 3), "stride": (1, 1)},
    **{"padding": (1, 1), "dilation": (1, 1), "padding_mode": "zeros"},
}
MATCHED = [
    *({"norm": norm, "norm_at": "input"} for norm in conv_adapter._CHOICES["norm"]),
    {"scale": "fixed", "scale_init": 4.0},
    {"scale_per": "layer", "activation": "silu", "kernel_size": 5},
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(depth=8, width=8):
    torch.manual_seed(1)
    net = ResNet(4, depth=depth, width=width)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # as a trained one, no two channels the same
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net.eval()


def adapted(config):
    return peft.get_peft_model(network(), config)


def images(count=2, size=15):
    return torch.randn(count, 3, size, size)


def layers(model):
    return [module for module in model.modules() if isinstance(module, ConvAdapterLayer)]


def shake(model):
    """Give everything that is trained another value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    return model


def layer_of(block, name="default", geometry=None, **arguments):
    layer = ConvAdapterLayer(block, "block")
    layer.update_layer(name, ConvAdapterConfig(**{"compression": 4, **arguments}), {**BLOCK, **(geometry or {})})
    return layer


# counts and definition


def test_the_parameters_of_the_papers_bottleneck_are_11040():
    geometry = {"in_channels": 256, "out_channels": 256}
    layer = layer_of(nn.Identity(), geometry=geometry, compression=8)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 11_040


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_is_its_formula(scheme):
    block = nn.Conv2d(8, 12, 3, stride=1 if scheme == "conv_sequential" else 2, padding=1)
    geometry = {"out_channels": 12, "stride": block.stride}
    layer = layer_of(block, geometry=geometry, scheme=scheme, init="paper", activation="gelu")
    down, up = layer.conv_adapter_down["default"], layer.conv_adapter_up["default"]
    scale = layer.conv_adapter_scale["default"]
    scale.data = torch.randn(1, 12, 1, 1)
    x = torch.randn(2, 8, 9, 9)

    def adapter(features, stride):
        hidden = F.conv2d(features, down.weight, down.bias, stride=stride, padding=1, groups=features.shape[1] // 4)
        return F.conv2d(F.gelu(hidden), up.weight, up.bias)

    assert down.weight.shape == ((2, 4, 3, 3) if "parallel" in scheme else (3, 4, 3, 3))
    plain = block(x)
    expected = plain + scale * (adapter(x, block.stride) if "parallel" in scheme else adapter(plain, 1))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_norm_is_on_the_input_of_the_adapter_or_on_the_output_of_the_block(norm):
    x = torch.randn(2, 8, 5, 5)
    groups = {"layer": 1, "group": 8}[norm]
    block = nn.Conv2d(8, 8, 3, padding=1)
    layer = layer_of(block, norm=norm, init="paper")
    normalised = F.group_norm(x, groups)
    torch.testing.assert_close(layer(x), block(x) + layer_of_same(layer, normalised))
    layer = layer_of(block, norm=norm, norm_at="block", init="paper")
    torch.testing.assert_close(layer(x), F.group_norm(block(x), groups) + layer_of_same(layer, x))
    layer = layer_of(block, norm=norm, norm_at="block", init="paper", scheme="conv_sequential")
    normalised = F.group_norm(block(x), groups)
    torch.testing.assert_close(layer(x), normalised + layer_of_same(layer, normalised))


def layer_of_same(layer, x):
    return layer.conv_adapter_up["default"](torch.relu(layer.conv_adapter_down["default"](x)))


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("kernel_size", [None, 1, 3, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": (2, 2)},
        {"stride": (2, 1), "kernel_size": (3, 5), "padding": (1, 2)},
        {"dilation": (2, 2), "padding": (2, 2), "padding_mode": "reflect"},
        {"kernel_size": (5, 5), "padding": (2, 2), "padding_mode": "circular"},
        {"kernel_size": (7, 7), "padding": (3, 3), "stride": (3, 3), "out_channels": 16},
        {"padding": (3, 3), "dilation": (3, 3)},
        {"padding": (3, 3)},
    ],
    ids=str,
)
def test_the_shape_is_the_blocks(geometry, scheme, kernel_size, size):
    described = {**BLOCK, **geometry}
    block = nn.Conv2d(**described)
    layer = layer_of(block, geometry=geometry, scheme=scheme, kernel_size=kernel_size)
    x = torch.randn(1, 8, size, size)
    assert torch.equal(layer(x), block(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_even_kernel_is_taken_as_it_is_beside_and_made_odd_behind(scheme):
    block = nn.Conv2d(8, 16, 2, stride=2)
    geometry = {"kernel_size": 2, "stride": 2, "padding": 0, "out_channels": 16}
    layer = layer_of(block, geometry=geometry, scheme=scheme)
    assert layer.conv_adapter_down["default"].kernel_size == ((2, 2) if "parallel" in scheme else (3, 3))
    x = torch.randn(1, 8, 7, 7)
    assert torch.equal(layer(x), block(x))


# in a network


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("arguments", MATCHED, ids=str)
def test_zero_up_leaves_the_network_as_it_is(scheme, arguments):
    x = images()
    expected = network()(x)
    model = adapted(ConvAdapterConfig(scheme=scheme, **arguments))
    assert len(layers(model)) == (6 if scheme.startswith("conv") else 3)
    assert torch.equal(model(x), expected)
    assert not torch.equal(shake(model)(x), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scale_of_zero_leaves_the_network_as_it_is_and_still_learns(scheme):
    x = images()
    model = adapted(ConvAdapterConfig(scheme=scheme, init="paper", scale_init=0.0))
    assert torch.equal(model(x), network()(x))
    model(x).square().sum().backward()
    for layer in layers(model):
        assert layer.conv_adapter_scale["default"].grad.abs().sum() > 0
        layer.conv_adapter_scale["default"].data.fill_(0.1)
    model(x).square().sum().backward()
    assert all(layer.conv_adapter_up["default"].weight.grad.abs().sum() > 0 for layer in layers(model))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_gradient_reaches_the_up_projection_alone(scheme):
    model = adapted(ConvAdapterConfig(scheme=scheme))
    model(images()).square().sum().backward()
    for layer in layers(model):
        assert layer.conv_adapter_up["default"].weight.grad.abs().sum() > 0
        assert layer.conv_adapter_down["default"].weight.grad.abs().sum() == 0
        assert layer.conv_adapter_scale["default"].grad.abs().sum() == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("norm_at", ["input", "block"])
def test_ten_steps_move_all_of_the_adapter_and_the_head_and_nothing_else(scheme, norm_at):
    model = adapted(ConvAdapterConfig(scheme=scheme, norm="group", norm_at=norm_at, init="paper"))
    before = copy.deepcopy(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(images(4)), torch.arange(4)).backward()
        # as DistributedDataParallel needs it
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained
    assert all("conv_adapter_" in name or "linear.modules_to_save" in name for name in trained)


def test_a_norm_of_the_block_starts_where_the_block_is():
    config = ConvAdapterConfig(scheme="residual_parallel", norm="group", norm_at="block")
    model, x = adapted(config), images(1)
    expected = network()(x)
    assert (model(x) - expected).abs().max() > 0.1
    model.train()
    state = torch.get_rng_state()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    calibrate(model, [x])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    # a single image has the mean and standard deviation that they were calibrated to
    torch.testing.assert_close(model.eval()(x), expected)


def test_calibration_averages_over_images_and_processes(monkeypatch):
    config = ConvAdapterConfig(scheme="residual_sequential", norm="layer", norm_at="block")
    x = images(6)
    model = adapted(config)
    outputs = []
    block = layers(model)[1].base_layer
    hook = block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    with torch.no_grad():
        network_without = copy.deepcopy(model)
        calibrate(model, [x[:2], x[2:]])
    hook.remove()
    features = torch.cat(outputs).flatten(1)
    norm = layers(model)[1].conv_adapter_norm["default"]
    torch.testing.assert_close(norm.bias, features.mean(1).mean().expand(16))
    torch.testing.assert_close(norm.weight, features.std(1, correction=0).mean().expand(16), rtol=1e-4, atol=0)

    others = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: others.append(sums.clone()))
    calibrate(copy.deepcopy(network_without), [x[:1]])
    remaining = iter(others)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(next(remaining)))
    calibrate(network_without, [x[1:]])
    for one, two in zip(layers(model), layers(network_without), strict=True):
        torch.testing.assert_close(one.conv_adapter_norm.state_dict(), two.conv_adapter_norm.state_dict())


def test_calibration_without_a_batch_is_refused_and_without_such_norms_does_nothing():
    with pytest.raises(UserError, match="no batch"):
        calibrate(adapted(ConvAdapterConfig(norm="layer", norm_at="block")), [])
    calibrate(adapted(ConvAdapterConfig(norm="layer")), [])


# places


def test_blocks_whose_channels_do_not_divide_are_left_out_and_named(caplog):
    caplog.set_level(logging.INFO)
    model = adapted(ConvAdapterConfig(compression=16))
    assert [layer.name for layer in layers(model)] == ["layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2"]
    assert "compression 16 does not divide the channels of layer1.0.conv1 (8), layer1.0.conv2 (8)" in caplog.text


def test_no_block_left_is_an_error():
    with pytest.raises(UserError, match=r"compression 7 divides the channels of no block \(layer1.0.conv1: 8, "):
        adapted(ConvAdapterConfig(compression=7))


def test_a_block_named_by_hand_that_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"layer1.0.conv1 has 8 channels, which compression 16 .* such as 8"):
        adapted(ConvAdapterConfig(compression=16, target_modules=["layer1.0.conv1"]))


def test_places_are_taken_exactly():
    model = adapted(ConvAdapterConfig(target_modules=["layer1.0.conv1"]))
    assert [layer.name for layer in layers(model)] == ["layer1.0.conv1"]


def test_the_configuration_given_is_not_changed_and_fits_any_network():
    config = ConvAdapterConfig(compression=4)
    before = copy.deepcopy(vars(config))
    one, two = add_adapter(network(), config), add_adapter(network(depth=14, width=4), config)
    assert vars(config) == before
    assert len(layers(one)) == 6
    assert len(layers(two)) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "parallel"}, "unknown scheme 'parallel'; known: conv_parallel, "),
        ({"activation": "tanh"}, "unknown activation"),
        ({"norm": "batch"}, "unknown norm"),
        ({"norm_at": "output"}, "unknown norm_at"),
        ({"scale": "free"}, "unknown scale"),
        ({"scale_per": "pixel"}, "unknown scale_per"),
        ({"init": "normal"}, "unknown init"),
        ({"compression": 0}, "compression is 0"),
        ({"compression": 2.5}, "compression is 2.5"),
        ({"compression": True}, "compression is True"),
        ({"kernel_size": 4}, "kernel_size is 4; it is an odd number"),
        ({"kernel_size": -1}, "kernel_size is -1"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"scale_init": float("nan")}, "scale_init is nan"),
        ({"scale_init": 0.0}, "no gradient would ever reach the adapter"),
        ({"scale_init": 0.0, "init": "paper", "scale": "fixed"}, "the adapter has no effect"),
        ({"target_modules": "layer[1"}, "no regular expression"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ConvAdapterConfig(**arguments)


def test_more_compression_than_channels_is_refused():
    with pytest.raises(UserError, match="block has 8 channels, which compression 9 does not divide"):
        layer_of(nn.Identity(), compression=9)


def test_a_kernel_that_changes_the_size_is_refused():
    with pytest.raises(UserError, match=r"kernel of 2 x 2 pixels .* kernel_size 3 gives another output size"):
        layer_of(nn.Identity(), geometry={"kernel_size": 2, "stride": 2, "padding": 0}, kernel_size=3)
    with pytest.raises(UserError, match=r"kernel of 3 x 3 pixels .* kernel_size 1 gives another output size"):
        layer_of(nn.Identity(), geometry={"padding": 0}, kernel_size=1)


def test_a_shape_that_does_not_match_is_refused_when_put_in(monkeypatch):
    resolve = conv_adapter.resolve_blocks

    def without_stride(*arguments):
        return {name: {**block, "stride": 1} for name, block in dict(resolve(*arguments)).items()}

    monkeypatch.setattr(conv_adapter, "resolve_blocks", without_stride)
    with pytest.raises(UserError, match=r"at layer2.0 the adapter would give .* and the block"):
        adapted(ConvAdapterConfig(scheme="residual_parallel"))
    adapted(ConvAdapterConfig(scheme="residual_sequential"))


def test_a_shape_that_does_not_match_is_refused_at_the_latest_with_the_first_image():
    layer = layer_of(nn.Conv2d(8, 8, 3))
    with pytest.raises(UserError, match=r"at block the adapter gives .* \(8, 6, 6\) and the block \(8, 4, 4\)"):
        layer(torch.randn(1, 8, 6, 6))


# peft's engine


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_switching_disabling_deleting_and_unloading(scheme, tmp_path):
    x = images()
    expected = network()(x)
    one = shake(adapted(ConvAdapterConfig(scheme=scheme, norm="layer", scale_per="layer")))
    two = shake(adapted(ConvAdapterConfig(scheme=scheme, kernel_size=5, activation="gelu", scale="fixed")))
    one.save_pretrained(tmp_path / "1")
    two.save_pretrained(tmp_path / "2")
    model = peft.PeftModel.from_pretrained(network(), tmp_path / "1", adapter_name="a")
    model.load_adapter(tmp_path / "2", "b")
    model.eval()
    for name, task in (("a", one), ("b", two), ("a", one)):
        model.set_adapter(name)
        assert torch.equal(model(x), task(x))
        with model.disable_adapter():
            assert torch.equal(model(x), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".a." in name or name.endswith(".a") for name in trained)
    model.set_adapter("b")
    model.delete_adapter("a")
    assert torch.equal(model(x), two(x))
    assert not [name for name in model.state_dict() if ".a." in name or name.endswith(".a")]
    assert type(model.unload()) is ResNet
    assert not layers(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_task_with_more_classes_goes_through_files_of_our_own(scheme, tmp_path):
    model = shake(add_adapter(network(), ConvAdapterConfig(scheme=scheme), num_classes=7))
    save_adapter(model, tmp_path / "task")
    two = load_adapter(load_adapter(network(), tmp_path / "task", "a"), tmp_path / "task", "b")
    x = images()
    assert torch.equal(two(x), model(x))
    switch_adapter(two, "a")
    assert torch.equal(two(x), model(x))
    assert model(x).shape == (2, 7)


def test_the_file_says_what_was_adapted_and_how(tmp_path):
    adapted(ConvAdapterConfig(scheme="residual_parallel", compression=4)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "CONV_ADAPTER"
    assert written.keys() == inspect.signature(ConvAdapterConfig).parameters.keys()
    assert list(written["geometry"]) == ["layer1.0", "layer2.0", "layer3.0"]
    assert written["modules_to_save"] == ["linear"]
    assert peft.PeftConfig.from_pretrained(tmp_path).compression == 4


def test_another_architecture_is_refused(tmp_path):
    adapted(ConvAdapterConfig(scheme="residual_parallel")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"."):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (SCHEMES[2], SCHEMES[0], "go to layer1.0.conv1, but another one is at layer1.0 already, around it"),
        (SCHEMES[0], SCHEMES[2], r"go to layer1.0, but another one is at layer1.0.conv1 already, within it"),
    ],
)
def test_adapters_within_each_other_are_refused(first, second, message):
    model = adapted(ConvAdapterConfig(scheme=first))
    x = images()
    before = model(x)
    with pytest.raises(UserError, match=message):
        model.add_adapter("other", ConvAdapterConfig(scheme=second))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_norm_within_a_block_is_trained_and_saved_with_the_adapter(scheme, tmp_path):
    names = ["layer1.0.bn1", "layer2.0.bn2", "linear"]
    model = shake(adapted(ConvAdapterConfig(scheme=scheme, modules_to_save=names)))
    norms = [module for module in model.modules() if isinstance(module, peft.utils.ModulesToSaveWrapper)]
    for norm in norms:
        norm.train()
    model(images(4))  # moves their running statistics
    model.eval()
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(network(), tmp_path).eval()
    x = images()
    assert torch.equal(other(x), model(x))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == names
    with model.disable_adapter():
        assert torch.equal(model(x), network()(x))


def test_merging_is_refused_and_touches_nothing():
    model = shake(adapted(ConvAdapterConfig()))
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match="cannot be merged"):
            merge()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(RuntimeError, match="never merged"):
        layers(model)[0].unmerge()


def test_one_adapter_is_active_at_a_time():
    model = adapted(ConvAdapterConfig())
    model.add_adapter("other", ConvAdapterConfig())
    with pytest.raises(UserError, match="not default and other"):
        layers(model)[0].set_adapter(["default", "other"])


def test_a_layer_answers_as_its_block():
    layer = layer_of(nn.Conv2d(8, 8, 3, padding=1))
    assert (layer.out_channels, layer.weight.shape) == (8, (8, 8, 3, 3))
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_further_arguments_reach_the_block():
    class Block(nn.Module):
        def forward(self, x, factor, offset=0):
            return x * factor + offset

    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(layer_of(Block())(x, 3, offset=1), x * 3 + 1)


# what a network must survive


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_format_precision_and_copies(scheme):
    x = images(size=16)
    model = shake(adapted(ConvAdapterConfig(scheme=scheme, norm="group")))
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(copy.deepcopy(model).to(memory_format=torch.channels_last)(last), expected)
    seen = []
    hook = layers(model)[0].register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    torch.testing.assert_close(mixed.float(), expected, atol=0.1, rtol=0.1)
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16), model.disable_adapter():
        hook = layers(model)[0].register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
        model(x)
    assert seen[0].dtype == seen[1].dtype


def test_a_half_precision_network_has_an_adapter_in_single_precision():
    model = peft.get_peft_model(network().bfloat16(), ConvAdapterConfig(norm="layer", norm_at="block"))
    layer = layers(model)[0]
    assert {parameter.dtype for parameter in layer.conv_adapter_up.parameters()} == {torch.float32}
    assert layer(torch.randn(1, 8, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_export_gives_the_same_logits_for_any_batch():
    model = shake(adapted(ConvAdapterConfig(scheme="residual_parallel", norm="group", norm_at="block")))
    program = torch.export.export(
        model.get_base_model(), (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    x = images(5)
    torch.testing.assert_close(program.module()(x), model(x))


def test_all_sizes_of_image_are_taken():
    model = adapted(ConvAdapterConfig(scheme="residual_parallel"))
    plain = network()
    for before, size in pairwise((8, 9, 17, 32)):
        x = torch.randn(1, 3, before, size)
        assert torch.equal(model(x), plain(x))


# blocks that change their input in place


class PreActivation(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.first, self.second = nn.ReLU(inplace), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_may_change_its_input_in_place(scheme):
    """Outputs and gradients are those of an adapter beside the same block that does not; ``x`` is changed as before."""
    results = []
    for inplace in (True, False):
        torch.manual_seed(0)
        layer = shake(layer_of(PreActivation(inplace), scheme=scheme))
        layer.set_adapter("default")
        for train in (True, True, False, True):
            layer.train(train).zero_grad()
            leaf = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
            x = leaf * 2
            outputs = layer(x)
            ((outputs + (x if inplace else F.relu(x))) ** 2).sum().backward()
            results.append([outputs, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for changed, left in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(changed, left)


def test_a_compiled_block_that_changes_its_input_gives_the_same_gradients():
    layer = shake(layer_of(PreActivation(True)))
    layer.set_adapter("default")
    results = []
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        outputs = module(torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(3)))
        (outputs**2).sum().backward()
        results.append([outputs, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*results)


def test_the_input_is_copied_only_beside_a_block_that_changes_it():
    seen = []
    for inplace in (True, False):
        layer = layer_of(PreActivation(inplace))
        layer.set_adapter("default")
        layer.conv_adapter_down["default"].register_forward_pre_hook(lambda _, given: seen.append(given[0].data_ptr()))
        for _ in range(3):
            x = torch.randn(2, 8, 5, 5)
            layer(x)
            seen[-1] = seen[-1] != x.data_ptr()
    assert seen == [True, True, True, True, False, False]
