import copy

import pytest
import torch
from layer_kinds import images, network, target
from lora_networks import VARIANTS, altered, every_kind, every_variant, moved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_automl.adapters import (
    ADAPTERS,
    LoraConfig,
    add_adapter,
    is_mergeable,
    merge_adapter,
    merged_network,
    switch_adapter,
    unmerge_adapter,
)
from lightning_automl.adapters.digest import base_tensors
from lightning_automl.adapters.injection import tuner_layers
from lightning_automl.models import ResNet
from lightning_automl.rundir import UnsupportedError


def base_values(model):
    return {name: tensor.clone() for name, tensor in base_tensors(model)}


def types(net):
    return {name: type(module) for name, module in net.named_modules()}


@pytest.mark.parametrize("size", [9, 12])
@every_variant
@every_kind
def test_merged_outputs_are_the_unmerged_ones(kind, variant, size):
    size = 9 if kind == "static_same" else size  # its padding is for images of this size
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = altered(kind, **VARIANTS[variant]).to(dtype)
        x = images(size=size).to(dtype)
        wanted = model(x)
        before = base_values(model)
        merge_adapter(model)
        assert (model(x) - wanted).abs().max() <= bound * wanted.abs().max()
        changed = {
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter, before.get(plain(name), parameter))
        }
        assert changed, "the weights did not move, so the test says nothing"
        merged = merged_network(model)
        assert (merged(x) - wanted).abs().max() <= bound * wanted.abs().max()
        unmerge_adapter(model)
        assert torch.equal(model(x), wanted)
        assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))


@every_kind
def test_several_active_adapters_are_summed_and_merged_together(kind):
    model = altered(kind, modules_to_save=[])
    model.add_adapter("other", LoraConfig(r=1, lora_alpha=3, target_modules=[target(kind)], modules_to_save=[]))
    model.base_model.set_adapter(["default", "other"])
    moved(model)
    wanted = model(images())
    layer = next(iter(tuner_layers(model)))
    total = sum(layer.get_delta_weight(name) for name in ("default", "other"))
    torch.testing.assert_close(layer.effective_weight(), layer.base_weight + total)
    merged = merged_network(model)
    torch.testing.assert_close(merged(images()), wanted, atol=1e-5, rtol=1e-5)


@every_kind
def test_a_merged_network_does_as_many_operations_as_the_base(kind):
    def operations(net):
        net.requires_grad_(False)  # torch multiplies a frozen matrix by another kernel
        with FlopCounterMode(display=False) as counter:
            net(images())
        return counter.get_flop_counts()["Global"]

    assert operations(merged_network(altered(kind))) == operations(network(kind))


def plain(name):
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@every_variant
@every_kind
def test_the_merged_network_is_a_plain_one_and_the_model_is_not_touched(kind, variant):
    model = altered(kind, modules_to_save=["head", "norm"], num_classes=7, **VARIANTS[variant])
    model.base_model.model.norm.modules_to_save["default"].running_mean += 1
    wanted = model(images())
    before = copy.deepcopy(model.state_dict())
    merged = merged_network(model)
    assert (merged(images()) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert types(merged) == types(network(kind))
    assert merged.state_dict().keys() == network(kind).state_dict().keys()
    assert not hasattr(merged, "peft_config")
    assert merged.head.out_features == 7
    assert torch.equal(model(images()), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in shared for parameter in merged.parameters())


@every_kind
def test_errors_of_states(kind):
    model = altered(kind)
    layers = list(tuner_layers(model))
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        unmerge_adapter(model)
    for layer in layers:
        with pytest.raises(RuntimeError, match="no adapter is merged"):
            layer.unmerge()
    merge_adapter(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="merged"):
        merge_adapter(model)
    with pytest.raises(RuntimeError, match="merged"):
        layers[0].merge()
    with pytest.raises(RuntimeError, match="cannot train while an adapter is merged"):
        model.train()
    assert not any(module.training for module in model.base_model.model.modules())
    for layer in layers:
        with pytest.raises(RuntimeError, match="cannot train while an adapter is merged"):
            layer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unmerge_adapter(model)
    model.train()


@every_kind
def test_a_layer_merges_alone(kind):
    model = altered(kind)
    wanted = model(images())
    before = base_values(model)
    layer = next(iter(tuner_layers(model)))
    layer.merge()
    torch.testing.assert_close(model(images()), wanted, atol=1e-5, rtol=1e-5)
    assert all(inner.merged for inner in tuner_layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))  # as they were
    layer.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))
    assert torch.equal(model(images()), wanted)


@every_variant
@every_kind
def test_a_base_of_half_precision_has_adapters_of_single_precision(kind, variant):
    config = LoraConfig(r=2, target_modules=[target(kind)], **VARIANTS[variant])
    model = moved(add_adapter(network(kind).bfloat16(), config))
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    x = images().bfloat16()
    wanted = model(x)
    assert wanted.dtype == torch.bfloat16
    before = base_values(model)
    merge_adapter(model)
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x), wanted, atol=0.1, rtol=0.1)
    unmerge_adapter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_is_not_merged_into_any_layer(value):
    model = altered("depthwise", target_modules=["stem", "layer.0", "layer.1"], lora_alpha=100)
    list(tuner_layers(model))[-1].lora_B["default"].weight.data[0] = value
    before = copy.deepcopy(model.state_dict())
    for act in (merge_adapter, merged_network):
        with pytest.raises(RuntimeError, match="not finite"):
            act(model)
        assert not any(layer.merged for layer in tuner_layers(model))
        assert all(
            torch.equal(value, before[name]) for name, value in model.state_dict().items() if "lora_" not in name
        )


def test_attention_is_merged_whole_or_not_at_all():
    model = altered("attention")
    layer, projection = tuner_layers(model)
    projection.lora_B["default"].weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        layer.merge()
    assert not layer.merged
    assert not projection.merged


def test_switching_while_merged_merges_the_other_adapter():
    model = altered("groups")
    one = model(images())
    add_adapter(model, LoraConfig(r=3, target_modules=["layer", "stem"]), "other", num_classes=7)
    moved(model)
    other = model(images())
    before = base_values(model)
    merge_adapter(model)
    for name, wanted in (("default", one), ("other", other), ("default", one)):
        switch_adapter(model, name)
        assert any(layer.merged for layer in tuner_layers(model))
        torch.testing.assert_close(model(images()), wanted, atol=1e-5, rtol=1e-5)
    unmerge_adapter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))


@every_kind
def test_peft_merges_and_unloads_too(kind):
    model = altered(kind)
    wanted = model(images())
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(images()), wanted, atol=1e-5, rtol=1e-5)
    assert types(merged) == types(network(kind))
    base = model.unload()
    assert types(base) == types(network(kind))


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_cannot_be_merged_says_so(name):
    torch.manual_seed(0)
    model = add_adapter(ResNet(4, depth=8, width=8).eval(), ADAPTERS[name]())
    wanted = moved(model)(images(size=16))
    assert is_mergeable(model) == (name != "conv_adapter")
    if is_mergeable(model):
        torch.testing.assert_close(merged_network(model)(images(size=16)), wanted, atol=1e-5, rtol=1e-5)
    else:
        for act in (merge_adapter, unmerge_adapter, merged_network):
            with pytest.raises(UnsupportedError, match="only adapters that change weights"):
                act(model)


def test_a_plain_network_cannot_be_merged():
    net = nn.Linear(2, 2)
    assert not is_mergeable(net)
    with pytest.raises(UnsupportedError, match="no adapter"):
        merge_adapter(net)
