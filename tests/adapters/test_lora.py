import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from layer_kinds import KINDS, images, network, target
from lora_networks import VARIANTS, adapted, every_kind, every_variant, moved
from peft.utils import PeftType
from torch import nn

from lightning_automl.adapters import (
    ADAPTERS,
    LoraConfig,
    add_adapter,
    load_adapter,
    lora,
    merge_adapter,
    save_adapter,
    switch_adapter,
)
from lightning_automl.adapters.injection import tuner_layers
from lightning_automl.adapters.lora import LoraConv2d, LoraLayer, LoraModel
from lightning_automl.adapters.registration import register
from lightning_automl.rundir import UnsupportedError, UserError

#: Kinds whose weight is used without calling the layer.
WITHOUT_DROPOUT = ("functional", "attention")


def adapter_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def lora_layer(model):
    return next(layer for layer in tuner_layers(model) if isinstance(layer, LoraLayer))


@every_variant
@every_kind
def test_outputs_are_those_of_the_base_at_the_start(kind, variant):
    base = network(kind)
    model = add_adapter(copy.deepcopy(base), LoraConfig(r=2, target_modules=[target(kind)], **VARIANTS[variant]))
    assert not model.training
    for grad in (True, False):
        base.requires_grad_(grad)  # torch's attention takes another kernel for weights that need no gradient
        with torch.set_grad_enabled(grad):
            difference = (model(images()) - base(images())).abs().max()
            assert difference <= (1e-6 if variant == "dora" else 0)
    base.train(), model.train()
    with torch.no_grad():
        assert (model(images()) - base(images())).abs().max() <= (1e-6 if variant == "dora" else 0)


@every_kind
def test_the_first_gradient_of_a_is_zero_and_that_of_b_is_not(kind):
    model = adapted(kind)
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (".lora_B." in name), name


@every_variant
@every_kind
def test_only_the_adapter_and_the_head_move_in_ten_steps(kind, variant):
    model = adapted(kind, **VARIANTS[variant])
    before = copy.deepcopy(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        *adapter_parameters(model),
        *(f"base_model.model.head.modules_to_save.default.{end}" for end in ("weight", "bias")),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert set(before) - same == trained


@every_kind
def test_the_update_has_rank_r(kind):
    layer = lora_layer(moved(adapted(kind, r=2)))
    delta = layer.get_delta_weight("default").flatten(1).double()
    assert torch.linalg.matrix_rank(delta, rtol=1e-6) == 2


@every_kind
def test_full_rank_gives_any_weight(kind):
    weight = lora_layer(adapted(kind)).base_weight.flatten(1)
    side = min(weight.shape)
    with pytest.warns(UserWarning, match="full rank"):
        layer = lora_layer(adapted(kind, r=side, lora_alpha=side))
    wanted = torch.randn_like(weight)
    left, values, right = torch.linalg.svd(wanted, full_matrices=False)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_((left * values).reshape(layer.lora_B["default"].weight.shape))
        layer.lora_A["default"].weight.copy_(right.reshape(layer.lora_A["default"].weight.shape))
    torch.testing.assert_close(layer.get_delta_weight("default").flatten(1), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.effective_weight().flatten(1), weight + wanted, atol=1e-5, rtol=1e-5)


@every_kind
def test_the_number_of_parameters_is_r_times_outputs_plus_inputs(kind):
    model = adapted(kind, r=3)
    sizes = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    assert sizes == sum(3 * sum(layer.base_weight.flatten(1).shape) for layer in tuner_layers(model))


def test_a_conv_of_the_method_file_has_5632_parameters():
    layer = LoraConv2d(nn.Conv2d(64, 128, 3), "default", LoraConfig(), r=8, lora_alpha=8)
    assert sum(parameter.numel() for name, parameter in layer.named_parameters() if "lora_" in name) == 5_632


@every_kind
def test_twice_alpha_doubles_the_effect_and_rslora_divides_by_the_root(kind):
    def delta(**options):
        return lora_layer(moved(adapted(kind, r=4, **options))).get_delta_weight("default")

    torch.testing.assert_close(delta(lora_alpha=8), 2 * delta(lora_alpha=4))
    torch.testing.assert_close(delta(lora_alpha=8, use_rslora=True), 2 * delta(lora_alpha=8))


def test_patterns_give_layers_their_own_rank_and_alpha():
    config = LoraConfig(r=2, target_modules=["layer", "stem"], rank_pattern={"stem": 3}, alpha_pattern={"stem": 6})
    layers = {layer.in_channels: layer for layer in tuner_layers(add_adapter(network("conv"), config))}
    assert {channels: (layer.r["default"], layer.scaling["default"]) for channels, layer in layers.items()} == {
        3: (3, 2.0),
        8: (2, 4.0),
    }


@every_kind
def test_a_learnable_scale_starts_at_alpha_over_r_and_trains(kind):
    model = moved(adapted(kind, lora_alpha=6, scale="learnable"), by=0)
    assert [layer.scale("default").item() for layer in tuner_layers(model)] == [3.0] * len(list(tuner_layers(model)))
    moved(model)
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    for layer in tuner_layers(model):
        assert layer.scale("default").grad.abs() > 0
        factor = layer.lora_B["default"].weight.flatten(1) @ layer.lora_A["default"].weight.flatten(1)
        wanted = layer.lora_scale["default"] * factor
        torch.testing.assert_close(layer.get_delta_weight("default").flatten(1), wanted)


@every_kind
def test_dora_is_the_formula_and_the_norm_has_no_gradient(kind):
    model = moved(adapted(kind, use_dora=True))
    layer = lora_layer(model)
    base = layer.base_weight.flatten(1)
    first, second = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    magnitude = layer.lora_magnitude_vector["default"].weight
    raw = base + 4 * second.flatten(1) @ first.flatten(1)
    wanted = magnitude.flatten()[:, None] * raw / raw.detach().norm(dim=1, keepdim=True)
    got = layer.effective_weight().flatten(1)
    torch.testing.assert_close(got, wanted)
    seed = torch.randn_like(got)
    expected = torch.autograd.grad(wanted, (first, second, magnitude), seed, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, (first, second, magnitude), seed), expected)


@pytest.mark.parametrize("kind", [kind for kind, (_, right) in KINDS.items() if right])
def test_dora_gives_what_peft_gives(kind):
    ours = moved(adapted(kind, use_dora=True))
    config = peft.LoraConfig(r=2, target_modules=[target(kind)], modules_to_save=["head"], use_dora=True)
    theirs = peft.get_peft_model(network(kind), config).eval()
    with torch.no_grad():
        values = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            parameter.copy_(values[name].reshape(parameter.shape))
    torch.testing.assert_close(ours(images()), theirs(images()))


def test_a_zero_row_stays_finite_under_dora():
    net = network("conv")
    with torch.no_grad():
        net.layer.weight[3] = 0
    model = add_adapter(net, LoraConfig(r=2, target_modules=["layer"], use_dora=True))
    model(images()).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter_parameters(model).values())


@every_variant
def test_both_forms_of_the_forward_agree_with_dropout(variant, monkeypatch):
    """Composition and weight form are one function; also where inputs of A are dropped in training."""
    model = moved(adapted("stride", lora_dropout=0.5, **VARIANTS[variant])).train()
    model.base_model.model.norm.eval()

    def outputs():
        torch.manual_seed(3)
        return model(images())

    first = outputs()
    assert not torch.equal(first, outputs() + model(images()) - outputs())  # the mask differs from call to call
    monkeypatch.setattr(LoraConv2d, "composes", False)
    torch.testing.assert_close(outputs(), first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - set(WITHOUT_DROPOUT)))
def test_dropout_takes_a_pass_less_where_the_output_is_linear_in_the_weight(kind, variant, monkeypatch):
    model = moved(adapted(kind, r=3, **VARIANTS[variant])).train()
    model.base_model.model.norm.eval()
    layer = lora_layer(model)
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    in_weight_form = variant == "dora" or not layer.composes
    call, passes = LoraLayer.call_base, []
    monkeypatch.setattr(LoraLayer, "call_base", lambda *args, **kwargs: passes.append(0) or call(*args, **kwargs))

    def outputs():
        passes.clear()
        torch.manual_seed(3)
        return model(images())

    first = outputs()
    assert len(passes) == (2 if type(layer.base_layer) in (nn.Conv2d, nn.Linear) else 3) * in_weight_form
    monkeypatch.setattr(lora, "_LINEAR", ())
    monkeypatch.setattr(LoraConv2d, "composes", False)
    torch.testing.assert_close(outputs(), first, atol=1e-5, rtol=1e-4)
    assert len(passes) == 3


@every_kind
def test_dropout_that_cannot_act_is_told(kind):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = moved(adapted(kind, lora_dropout=0.5)).train()
    model.base_model.model.norm.eval()
    acts = not torch.equal(model(images()), model(images()))
    assert acts == (kind not in WITHOUT_DROPOUT)
    sentences = [str(one.message) for one in told]
    assert bool(sentences) != acts
    assert acts or sentences[0].startswith(f"lora_dropout has no effect in {target(kind)}, as")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(kind)  # without dropout there is nothing to tell


@pytest.mark.filterwarnings("ignore:lora_dropout has no effect:UserWarning")
@every_kind
def test_dropout_does_nothing_in_evaluation(kind):
    model = moved(adapted(kind, lora_dropout=0.5))
    plain = moved(adapted(kind))
    assert torch.equal(model(images()), plain(images()))


@every_variant
@every_kind
def test_precisions_layouts_and_copies(kind, variant):
    model = moved(adapted(kind, **VARIANTS[variant]))
    wanted = model(images())
    torch.testing.assert_close(
        model(images().contiguous(memory_format=torch.channels_last)), wanted, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(copy.deepcopy(model)(images()), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, atol=0.2, rtol=0.2)
    torch.testing.assert_close(copy.deepcopy(model).double()(images().double()).float(), wanted, atol=1e-5, rtol=1e-4)
    fresh = adapted(kind, **VARIANTS[variant])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images()), wanted)


@every_kind
def test_switching_adapters_reproduces_both(kind):
    model = moved(adapted(kind))
    one = model(images())
    config = LoraConfig(r=3, target_modules=[target(kind)], modules_to_save=["head", "norm"])
    assert add_adapter(model, config, "other", num_classes=7) is model
    model.base_model.model.norm.modules_to_save["other"].running_mean += 1
    moved(model)
    other = model(images())
    assert other.shape == (3, 7)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)
    switch_adapter(model, "default")
    assert torch.equal(model(images()), one)
    assert all(".default." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    switch_adapter(model, "other")
    assert torch.equal(model(images()), other)


def test_switching_keeps_modes_and_frozen_adapters_frozen():
    model = adapted("conv")
    add_adapter(model, LoraConfig(r=2, target_modules=["layer"], modules_to_save=["norm", "head"]), "other")
    model.requires_grad_(False).train()
    model.base_model.model.norm.eval()
    switch_adapter(model, "default")
    switch_adapter(model, "other")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.base_model.model.norm.modules_to_save["other"].training
    assert model.base_model.model.head.modules_to_save["other"].training


def test_disabling_gives_the_base_and_leaves_what_trains_as_it_was():
    base = network("groups")(images())
    model = moved(adapted("groups", modules_to_save=["head", "norm"]))
    for trains in (True, False):
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trains and (".lora_" in name or ".modules_to_save." in name)
        before = [parameter.requires_grad for parameter in model.parameters()]
        with model.disable_adapter():
            assert torch.equal(model(images()), base)
        assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_merged_and_disabled_adapter_gives_the_base_and_stays_merged():
    base = network("attention").requires_grad_(False)(images())
    model = moved(adapted("attention", modules_to_save=[]))
    wanted = model(images())
    merge_adapter(model)
    with model.disable_adapter():
        assert torch.equal(model(images()), base)
    torch.testing.assert_close(model(images()), wanted)


def test_deleting_an_adapter_leaves_the_others():
    model = moved(adapted("groups"))
    wanted = model(images())
    add_adapter(model, LoraConfig(r=3, target_modules=["layer", "stem"]), "other")
    switch_adapter(model, "default")
    model.delete_adapter("other")
    assert torch.equal(model(images()), wanted)
    assert not [name for name in model.state_dict() if "other" in name]


def test_names_are_exact():
    class Alike(nn.Module):
        """Names that end alike: peft would adapt and save both of each pair."""

        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3)
            self.block = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3), "xfc": nn.Conv2d(4, 4, 1)})
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.block["xfc"](self.block["conv1"](self.conv1(x))).mean((2, 3)))

    model = add_adapter(Alike(), LoraConfig(r=1, target_modules="conv1"))
    trained = {
        name.removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert {name.split(".lora_")[0].split(".modules_to_save")[0] for name in trained} == {"conv1", "fc"}


def test_long_lists_of_names_are_exact():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        *(nn.Conv2d(4, 4, 1) for _ in range(30)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    names = [str(index) for index in range(3, 29)]
    model = add_adapter(net, LoraConfig(r=1, target_modules=names))
    adapted_names = {name.split(".")[2] for name in adapter_parameters(model)}
    assert adapted_names == set(names)


def test_a_model_of_peft_functions(tmp_path):
    """get_peft_model, save_pretrained and from_pretrained of peft go with our configuration."""
    model = moved(peft.get_peft_model(network("groups"), LoraConfig(r=2, target_modules=["layer"])).eval())
    model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(network("groups"), tmp_path)
    assert torch.equal(read(images()), model(images()))
    assert peft.PeftConfig.from_pretrained(tmp_path).to_dict() == model.peft_config["default"].to_dict()


def test_the_registry_knows_each_method_under_peft():
    for name, config_class in ADAPTERS.items():
        kind = PeftType("IMAGE_LORA" if name == "lora" else name.upper())
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] is config_class
        assert config_class().peft_type == kind
        assert kind in list(PeftType)
        assert copy.deepcopy(kind) is kind
        assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind].prefix == peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind]


def test_a_method_cannot_be_registered_twice():
    with pytest.raises(KeyError, match="already"):
        register("image_lora", LoraConfig, LoraModel, "lora_")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "rank r is 0"),
        ({"r": -1}, "rank r is -1"),
        ({"r": 2.5}, "rank r is 2.5"),
        ({"r": True}, "rank r is True"),
        ({"rank_pattern": {"layer": 0}}, "rank r is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": {"layer": -1}}, "lora_alpha is -1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"scale": "per_channel"}, "known: fixed, learnable"),
        ({"use_dora": True, "scale": "learnable"}, "use_dora"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(options, words):
    with pytest.raises(UserError, match=words):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"r": 9, "target_modules": ["layer"]},
            r"rank 9 is more than the smaller side of layer \(12 x 8\); give at most 8",
        ),
        ({"target_modules": ["layers"]}, "layer"),
        ({"target_modules": "nothing"}, "layer"),
        ({"target_modules": ["layer"], "modules_to_save": ["heads"]}, "nearest are head"),
        ({"target_modules": ["layer"], "modules_to_save": ["layer"]}, "adapted too"),
        ({"target_modules": ["layer"], "modules_to_save": ["norm"], "num_classes": 3}, "not in modules_to_save"),
        ({"target_modules": ["layer"], "base_digest": "0" * 32}, "another base network"),
        ({"target_modules": ["layers"], "base_digest": "0" * 32}, "another architecture: this network has no layers"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_network_stays_as_it_was(options, words):
    net = network("pointwise")
    names = [*net.state_dict()]
    before = net(images())
    with pytest.raises(UserError, match=words):
        add_adapter(net, LoraConfig(**{"r": 2, **options}))
    assert [*net.state_dict()] == names
    assert torch.equal(net(images()), before)
    assert all(parameter.requires_grad for parameter in net.parameters())


class Parametrised(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.weighted(self.norm(self.up(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "words"), [("up", "ConvTranspose2d"), ("norm", "BatchNorm2d"), ("weighted", "parametri")]
)
def test_an_unsupported_layer_is_named(name, words):
    with pytest.raises(UnsupportedError, match=words):
        add_adapter(Parametrised(), LoraConfig(r=1, target_modules=[name]))


def test_attention_with_other_sizes_of_keys_is_refused():
    class Cross(nn.Module):
        image_size = 4

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.layer = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            tokens = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(self.layer(tokens, tokens[..., :4], tokens[..., :4])[0].mean(1))

    with pytest.raises(UnsupportedError, match=r"another width|key and value sizes"):
        add_adapter(Cross(), LoraConfig(r=1, target_modules=["layer"]))


def test_a_second_adapter_that_does_not_fit_leaves_the_first():
    model = moved(adapted("conv"))
    before = copy.deepcopy(model.state_dict())
    wanted = model(images())
    config = LoraConfig(r=2, target_modules=["layer"])
    for name, options, error, words in [
        ("default", config, UserError, "already"),
        ("head", config, UserError, "named 'head'"),
        ("a.b", config, UserError, "named 'a.b'"),
        ("other", LoraConfig(r=100, target_modules=["layer"]), UserError, "rank 100"),
        ("other", LoraConfig(r=1, target_modules=["head"]), UserError, "trained as a whole"),
        ("other", LoraConfig(r=2, target_modules=["stem"], modules_to_save=["layer"]), UserError, "adapted by another"),
        ("other", ADAPTERS["conv_adapter"](), UserError, "IMAGE_LORA"),
    ]:
        with pytest.raises(error, match=words):
            add_adapter(model, options, name)
        assert list(model.peft_config) == ["default"]
    merge_adapter(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        add_adapter(model, config, "other")
    model.base_model.unmerge_adapter()
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(images()), wanted)
    with pytest.raises(UserError, match="known: default"):
        switch_adapter(model, "other")


def test_one_of_pefts_configurations_is_taken_over():
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["layer"])
    model = add_adapter(network("dilation"), config)
    assert type(model.peft_config["default"]) is LoraConfig
    assert lora_layer(model).scaling == {"default": 2.0}
    with pytest.raises(UserError, match="init_lora_weights, lora_bias"):
        add_adapter(network("conv"), peft.LoraConfig(lora_bias=True, init_lora_weights=False))


def test_a_configuration_can_be_used_again():
    config = LoraConfig(r=2, target_modules=["layer"])
    contents = json.dumps(config.to_dict())
    for seed in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            add_adapter(network("conv", seed), config)
    assert json.dumps(config.to_dict()) == contents


def test_attributes_of_the_layer_are_those_of_the_base():
    layer = lora_layer(adapted("oblong"))
    assert layer.kernel_size == (3, 5)
    assert layer.in_channels == 8
    assert not hasattr(layer, "num_heads")
    assert lora_layer(adapted("attention")).num_heads == 3


def test_an_encoder_layer_of_torch_is_adapted_also_on_its_fast_path(tmp_path):
    """It looks into its attention and takes the weights itself when nothing needs a gradient."""

    class Encoder(nn.Module):
        image_size = 8

        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    base = Encoder().eval()
    model = moved(
        add_adapter(copy.deepcopy(base), LoraConfig(r=2, target_modules=["layer.self_attn", "layer.linear1"]))
    )
    slow = model(images(size=8))
    with torch.no_grad():
        torch.testing.assert_close(model(images(size=8)), slow)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base, tmp_path)(images(size=8)), slow)
