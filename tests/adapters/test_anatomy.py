import inspect

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_automl import models
from lightning_automl.adapters import ConvAdapterConfig, LoraConfig, add_adapter
from lightning_automl.adapters.anatomy import anatomy, base_module, layer_kind, plain_modules
from lightning_automl.adapters.targets import resolve_targets
from lightning_automl.rundir import UserError

OWN = {
    name: value
    for name in models.__all__
    if inspect.isclass(value := getattr(models, name)) and issubclass(value, nn.Module)
    if "num_classes" in inspect.signature(value).parameters and not issubclass(value, models.Supernet)
}
#: What an own network cannot be built without, or would be too slow without.
EXTRA = {
    "Backbone": {"name": "resnet18", "pretrained": False},
    "GenotypeNetwork": {"channels": 8, "cells": 5},
    "NasBench201Network": {"cells_per_stage": 1},
}

#: First layer, layers of the logits, blocks: their number, class, first and last.
KNOWN = {
    "torchvision/resnet18": ("conv1", ("fc",), 8, "BasicBlock", "layer1.0", "layer4.1"),
    "torchvision/mobilenet_v3_small": (
        *("features.0.0", ("classifier.3",), 11, "InvertedResidual"),
        *("features.1", "features.11"),
    ),
    "torchvision/squeezenet1_1": ("features.0", ("classifier.1",), 8, "Fire", "features.3", "features.12"),
    "torchvision/shufflenet_v2_x0_5": ("conv1.0", ("fc",), 16, "InvertedResidual", "stage2.0", "stage4.3"),
    "torchvision/densenet121": (
        *("features.conv0", ("classifier",), 4, "_DenseBlock"),
        *("features.denseblock1", "features.denseblock4"),
    ),
    "torchvision/regnet_x_400mf": (
        *("stem.0", ("fc",), 22, "ResBottleneckBlock"),
        *("trunk_output.block1.block1-0", "trunk_output.block4.block4-11"),
    ),
    "torchvision/swin_t": ("features.0.0", ("head",), 12, "SwinTransformerBlock", "features.1.0", "features.7.1"),
    "timm/convnext_atto": (
        *("stem.0", ("head.fc",), 12, "ConvNeXtBlock"),
        *("stages.0.blocks.0", "stages.3.blocks.1"),
    ),
    "timm/crossvit_tiny_240": (
        *("patch_embed.0.proj", ("head.0", "head.1"), 21, "Block"),
        *("blocks.0.blocks.0.0", "blocks.2.fusion.1"),
    ),
    "timm/deit_tiny_distilled_patch16_224": (
        *("patch_embed.proj", ("head", "head_dist"), 12, "Block"),
        *("blocks.0", "blocks.11"),
    ),
    "timm/fastvit_t8": ("stem.0.conv_scale.conv", ("head.fc",), 15, "MobileOneBlock", "stem.1", "final_conv"),
    "timm/ghostnet_050": ("conv_stem", ("classifier",), 16, "GhostBottleneck", "blocks.0.0", "blocks.8.3"),
    "timm/hrnet_w18_small": ("conv1", ("classifier",), 23, "Bottleneck", "layer1.0", "incre_modules.3.0"),
    "timm/levit_128s": (
        *("stem.conv1.linear", ("head.linear", "head_dist.linear"), 11, "LevitBlock"),
        *("stages.0.blocks.0", "stages.2.blocks.3"),
    ),
    "timm/mobilenetv4_conv_small_035": (
        *("conv_stem", ("classifier",), 12, "UniversalInvertedResidual"),
        *("blocks.2.0", "blocks.3.5"),
    ),
    "timm/regnetx_002": ("stem.conv", ("head.fc",), 13, "Bottleneck", "s1.b1", "s4.b7"),
    "timm/test_nfnet": ("stem.conv1", ("head.fc",), 4, "NormFreeBlock", "stages.0.0", "stages.3.0"),
    "timm/tf_efficientnet_lite0": (
        *("conv_stem", ("classifier",), 16, "DepthwiseSeparableConv"),
        *("blocks.0.0", "blocks.6.0"),
    ),
    "timm/xcit_nano_12_p16_224": (
        *("patch_embed.proj.0.0", ("head",), 14, "XCABlock"),
        *("blocks.0", "cls_attn_blocks.1"),
    ),
}


def build(name):
    torch.manual_seed(0)
    library, _, short = name.partition("/")
    if library == "torchvision":
        network = torchvision.models.get_model(short, weights=None, num_classes=7)
    elif library == "timm":
        network = timm.create_model(short, pretrained=False, num_classes=7)
    else:
        sized = {"image_size": 32} if "image_size" in inspect.signature(OWN[name]).parameters else {}
        network = OWN[name](num_classes=7, **sized, **EXTRA.get(name, {}))
    with torch.no_grad():
        for (
            parameter
        ) in network.parameters():  # gains and last layers that start at zero would hide what is before them
            if parameter.numel() and parameter.abs().max() < 1e-3:
                parameter.uniform_(0.05, 0.1)
    return network.eval()


def with_statistics(network, images):
    """Norms that fit a random network, whose activations would vanish or explode otherwise."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        network(images)
    return network.eval()


def image_for(name):
    size = {"timm/crossvit_tiny_240": 240, "timm/deit_tiny_distilled_patch16_224": 224, "timm/levit_128s": 224}
    return torch.rand(1, 3, *(2 * [size.get(name, 64 if name in KNOWN else 32)]))


def weight_layers(network):
    """Names of all weight layers, from their classes alone."""
    attentions = [name for name, module in network.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        and not any(name.startswith(f"{attention}.") for attention in attentions)
    }


@pytest.mark.parametrize("name", KNOWN)
def test_stem_head_and_blocks_of_known_networks(name):
    network = build(name)
    found = anatomy(network, image_for(name))
    stem, head, blocks, kind, first, last = KNOWN[name]
    assert (found.stem, found.head, len(found.blocks)) == (stem, head, blocks)
    assert (found.blocks[0], found.blocks[-1]) == (first, last)
    assert type(network.get_submodule(first)).__name__ == kind
    assert found.num_classes == 7


@pytest.mark.parametrize("name", [*OWN, *KNOWN])
def test_what_holds_for_every_network(name):
    network = build(name)
    found = anatomy(network, image_for(name))
    assert set(found.layers) == weight_layers(network)
    assert len(set(found.layers)) == len(found.layers)
    assert found.stem == found.stems[0]
    assert set(found.norms) == {
        norm for norm, module in network.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    for one in found.blocks:
        for other in (*found.blocks, *found.head, *found.stems):
            assert one == other or not f"{other}.".startswith(f"{one}.")
    assert found.shapes.keys() <= dict(network.named_modules()).keys()


@pytest.mark.parametrize("name", [*OWN, *KNOWN])
def test_without_its_stem_or_its_head_a_network_sees_nothing(name):
    # independent of how they are found: logits of two images agree when the weights are zero
    image = image_for(name)
    images = torch.cat([image, torch.rand_like(image)])
    network = with_statistics(build(name), images)
    found = anatomy(network, image)
    with torch.no_grad():
        one, other = network(images)
        assert not torch.allclose(one, other, rtol=1e-6, atol=0)
        for ends in (found.stems, found.head):
            kept = {}
            for end in ends:
                weight = network.get_submodule(end).weight
                kept[end] = weight.clone()
                weight.zero_()
            one, other = network(images)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            for end, weight in kept.items():
                network.get_submodule(end).weight.copy_(weight)


@pytest.mark.parametrize("name", [*OWN, "torchvision/swin_t", "timm/levit_128s", "timm/test_nfnet"])
def test_nothing_of_the_network_changes(name):
    network = build(name).train()
    next(network.children()).eval()
    modes = {key: module.training for key, module in network.named_modules()}
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    attributes = {key: set(vars(module)) for key, module in network.named_modules()}
    image, random = image_for(name), torch.get_rng_state()
    anatomy(network, image)
    assert {key: module.training for key, module in network.named_modules()} == modes
    assert {key: set(vars(module)) for key, module in network.named_modules()} == attributes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), random)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[key])


@pytest.mark.parametrize(
    "name", [*OWN, "torchvision/resnet18", "torchvision/swin_t", "timm/fastvit_t8", "timm/test_nfnet"]
)
def test_adapters_do_not_change_what_is_found(name):
    image = image_for(name)
    plain = anatomy(build(name), image)
    config = LoraConfig(r=1, target_modules=resolve_targets(build(name), "auto", 1, plain)[:3])
    adapted = add_adapter(build(name), config)
    assert anatomy(adapted, image) == plain
    assert anatomy(add_adapter(adapted, config, "second"), image) == plain


@pytest.mark.parametrize("scheme", ["conv_parallel", "residual_parallel"])
def test_conv_adapters_do_not_change_what_is_found(scheme):
    image = image_for("torchvision/resnet18")
    plain = anatomy(build("torchvision/resnet18"), image)
    adapted = add_adapter(build("torchvision/resnet18"), ConvAdapterConfig(scheme=scheme))
    found = anatomy(adapted, image)
    assert found == plain
    modules = plain_modules(adapted)
    assert isinstance(base_module(modules["layer1.0"]), torchvision.models.resnet.BasicBlock)
    assert layer_kind(modules["layer1.0.conv1"]) == "conv"
    assert set(modules) == {name for name, _ in build("torchvision/resnet18").named_modules()}


def test_attention_is_found_by_its_softmax_and_not_by_its_name():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.out = nn.Linear(8, 16), nn.Linear(8, 8)
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, tokens):
            one, two = self.both(tokens).chunk(2, -1)
            return self.out(self.softmax(one @ one.mT) @ two)

    class ChannelAttention(nn.Module):  # squeeze and excitation
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, tokens):
            return tokens * self.up(self.down(tokens.mean(1, keepdim=True))).softmax(1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 8, 2, 2), nn.Linear(8, 3)
            self.mixer, self.gate = Mixer(), ChannelAttention()

        def forward(self, images):
            return self.head(self.gate(self.mixer(self.stem(images).flatten(2).mT)).mean(1))

    found = anatomy(Network(), torch.rand(1, 1, 8, 8))
    assert found.attention == ("mixer.both", "mixer.out")
    assert found.kinds == {
        **{"stem": "conv", "mixer.both": "linear", "mixer.out": "linear"},
        **{"gate.down": "linear", "gate.up": "linear", "head": "linear"},
    }


def test_a_weight_that_is_used_without_calling_its_layer_is_a_layer_in_its_place():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.inner, self.first = nn.Linear(6, 3), nn.Linear(5, 6), nn.Linear(4, 5)

        def forward(self, images):
            features = nn.functional.linear(self.first(images.flatten(1)), self.inner.weight)
            return features @ self.last.weight.T

    found = anatomy(Network(), torch.rand(2, 1, 2, 2))
    assert found.layers == ("first", "inner", "last")
    assert (found.stem, found.head, found.blocks) == ("first", ("last",), ("inner",))
    assert "inner" not in found.shapes


def test_a_stage_is_taken_apart_and_a_residual_block_is_not():
    class Unit(nn.Module):  # two of them are chained in a block, as in GhostNet
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, features):
            return self.two(self.one(features))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Unit(), Unit()

        def forward(self, features):
            return features + self.second(self.first(features))

    class Stage(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(depth)])

        def forward(self, features):
            for block in self.blocks:
                features = block(features)
            return features

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.stages = nn.Sequential(Stage(2), Stage(1), Stage(2))

        def forward(self, images):
            return self.head(self.stages(self.stem(images)).mean((2, 3)))

    found = anatomy(Network())
    assert found.blocks == tuple(
        f"stages.{stage}.blocks.{block}" for stage, block in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1))
    )
    assert found.image_shape == (3, 224, 224)


def test_a_plain_chain_of_layers_is_its_own_blocks_and_modules_that_are_not_used_are_no_layers():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    network.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    network.unused = nn.Linear(3, 2)
    network.forward = lambda images: nn.Sequential(*list(network)[:-1])(images)
    found = anatomy(network, torch.rand(1, 3, 8, 8))
    assert (found.stem, found.blocks, found.head) == ("0", ("2",), ("3",))
    assert found.layers == ("0", "2", "3")


class Picky(nn.Module):
    """Takes images of one shape."""

    def __init__(self, shape, **attributes):
        super().__init__()
        self.shape, self.layer = shape, nn.Conv2d(shape[0], 2, 1)
        vars(self).update(attributes)

    def forward(self, images):
        if tuple(images.shape[1:]) != self.shape:
            raise RuntimeError(f"wrong shape {tuple(images.shape)}\nand a second line")
        return self.layer(images).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (Picky((3, 224, 224)), (3, 224, 224)),
        (Picky((1, 8, 8)), (1, 8, 8)),
        (Picky((5, 20, 24), image_size=(20, 24)), (5, 20, 24)),
        (Picky((3, 20, 20), resize=[20, 20], image_size=7), (3, 20, 20)),
        (Picky((3, 20, 20), image_size=7, default_cfg={"input_size": (3, 20, 20)}), (3, 20, 20)),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3)), (1, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(75, 5), nn.Linear(5, 3)), (3, 5, 5)),
    ],
)
def test_the_size_of_images_is_what_the_network_says_or_a_usual_one(network, shape):
    assert anatomy(network).image_shape == shape


ATTENTIONS = {
    "matmul": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(-1), v),
    "einsum": lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v),
    "sdpa": nn.functional.scaled_dot_product_attention,
    "module": None,
}


class EveryPixel(nn.Module):
    """An attention over all pixels."""

    def __init__(self, attend, sizes=None):
        super().__init__()
        self.attend, self.sizes = attend, sizes
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if attend is None else None

    def forward(self, images):
        if self.sizes and images.shape[-1] not in self.sizes:
            raise RuntimeError("another size, please")
        tokens = self.stem(images).flatten(2).mT
        given = [layer(tokens) for layer in self.layers]
        tokens = self.attention(*given, need_weights=False)[0] if self.attend is None else self.attend(*given)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_over_every_pixel_is_watched_on_a_smaller_image(name):
    """At 224 pixels its 50,176 tokens have 2.5 billion pairs: 10 GB."""
    network = EveryPixel(ATTENTIONS[name])
    found = anatomy(network)
    assert found.image_shape == (3, 64, 64)
    assert set(found.layers) == weight_layers(network)


def test_a_size_that_needs_much_memory_is_taken_when_no_other_is_left(monkeypatch):
    monkeypatch.setattr(inspect.getmodule(anatomy), "_MOST", 2**18)
    for sizes, size in [((32, 16), 16), ((32,), 32)]:
        network = EveryPixel(ATTENTIONS["matmul"], sizes)
        assert anatomy(network).image_shape == (3, size, size)
    assert anatomy(EveryPixel(ATTENTIONS["matmul"]), torch.rand(3, 24, 24)).image_shape == (3, 24, 24)


def test_what_was_found_is_remembered_until_the_network_is_built_anew():
    network = build("torchvision/squeezenet1_1")
    found = anatomy(network)
    assert anatomy(network) is found
    network.classifier[1] = nn.Conv2d(512, 4, 1)
    assert (found.num_classes, anatomy(network).num_classes) == (7, 4)


def test_a_network_that_refuses_every_image_asks_for_one():
    with pytest.raises(
        UserError, match=r"Picky refuses empty images of usual shapes \(of \[3, 224, 224\]: wrong shape .*\)"
    ):
        anatomy(Picky((3, 21, 21)))
    assert anatomy(Picky((3, 21, 21)), torch.rand(3, 21, 21)).layers == ("layer",)
    with pytest.raises(UserError, match=r"Picky refuses the given image \(of \[1, 3, 9, 9\]"):
        anatomy(Picky((3, 21, 21)), torch.rand(1, 3, 9, 9))


def test_a_network_without_weight_layers_is_refused():
    with pytest.raises(UserError, match=r"Sequential has no nn\.Linear, nn\.Conv2d or nn\.MultiheadAttention"):
        anatomy(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3)))


def test_half_precision_and_other_devices_are_followed():
    assert anatomy(build("torchvision/squeezenet1_1").bfloat16(), None).stem == "features.0"
