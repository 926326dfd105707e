import contextlib
import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_automl.adapters import ConvAdapterConfig, LoraConfig, add_adapter, switch_adapter
from lightning_automl.adapters.anatomy import anatomy, plain_modules
from lightning_automl.adapters.targets import (
    CHOICES,
    adapter_parameters,
    adapter_size,
    describe_adapters,
    layer_size,
    resolve_blocks,
    resolve_targets,
)
from lightning_automl.models import ResNet
from lightning_automl.rundir import UnsupportedError, UserError

NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(weights=None),
    "convnext_atto": lambda: timm.create_model("convnext_atto", pretrained=False),
    "tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0", pretrained=False),  # pads by itself
    "test_nfnet": lambda: timm.create_model("test_nfnet", pretrained=False),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
    "deit_tiny": lambda: timm.create_model("deit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=5),
    "resnet20": lambda: ResNet(depth=20, num_classes=5),
}
CONVOLUTIONAL = [name for name in NETWORKS if name not in ("vit", "deit_tiny")]
SCHEMES = ("conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential")


@pytest.fixture(scope="module")
def network():
    """A network by its name, and its parts; each is built once and never changed."""
    built = {}

    def get(name):
        if name not in built:
            torch.manual_seed(0)
            plain = NETWORKS[name]().eval()
            built[name] = plain, anatomy(plain)
        return built[name]

    return get


def factors(layer, rank):
    """Parameters of the factors of each matrix of a layer, and of the matrices: from the shapes of its weights."""
    if isinstance(layer, nn.MultiheadAttention):
        matrices = [layer.in_proj_weight, layer.out_proj.weight]
    else:
        matrices = [layer.weight.flatten(1)]
    return sum(rank * sum(matrix.shape) for matrix in matrices), sum(matrix.numel() for matrix in matrices)


def result_shape(geometry, given):
    """Shape of what a convolution gives; on the meta device nothing is computed."""
    return tuple(nn.Conv2d(**geometry, device="meta")(torch.empty(1, *given, device="meta")).shape[1:])


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_automatic_targets_are_all_layers_for_which_an_adapter_is_smaller_but_never_stem_and_head(network, name, rank):
    plain, found = network(name)
    chosen = resolve_targets(plain, "auto", rank, found)
    for layer in found.layers:
        adapter, weights = factors(plain.get_submodule(layer), rank)
        module = plain.get_submodule(layer)
        assert (adapter_size(module, rank), layer_size(module)) == (adapter, weights)
        assert (layer in chosen) == (adapter < weights and layer not in (found.stem, *found.head)), layer
    assert chosen == [layer for layer in found.layers if layer in chosen]


@pytest.mark.parametrize("name", NETWORKS)
def test_kinds_share_the_automatic_targets_among_themselves(network, name):
    plain, found = network(name)
    chosen = {}
    for choice in ("conv", "linear", "attention"):
        with contextlib.suppress(UserError):  # there is none of the kind
            chosen[choice] = resolve_targets(plain, choice, 2, found)
    auto = resolve_targets(plain, "auto", 2, found)
    assert set(chosen.get("conv", ())) == {layer for layer in auto if isinstance(plain.get_submodule(layer), nn.Conv2d)}
    assert set(chosen.get("linear", ())) == {
        layer for layer in auto if isinstance(plain.get_submodule(layer), nn.Linear)
    }
    assert set(chosen.get("attention", ())) == {
        layer for layer in auto if re.search(r"\.attn\.|self_attention$", layer)
    }


def test_all_linear_is_every_linear_layer_but_the_head_whatever_its_size(network):
    plain, found = network("deit_tiny")
    linear = [layer for layer in found.layers if isinstance(plain.get_submodule(layer), nn.Linear)]
    assert resolve_targets(plain, "all-linear", 4096, found) == linear[:-1]
    assert linear[-1:] == list(found.head)


def test_patterns_and_names_may_choose_any_layer(network):
    plain, found = network("resnet18")
    assert resolve_targets(plain, r"layer1\..*conv\d", 4, found) == [
        *("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"),
    ]
    assert resolve_targets(plain, ["fc", "conv1"], 4, found)[0] == "conv1"
    assert resolve_targets(plain, ["fc", "conv1"], 4, found)[-1] == "fc"
    assert resolve_targets(plain, ["downsample.0"], 4, found) == [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]
    assert resolve_targets(plain, ["layer4.1.conv2"], 4, found) == ["layer4.1.conv2"]
    assert "ayer1.0.conv1" not in resolve_targets(plain, ["conv1"], 4, found)


def test_layers_that_no_image_passes_can_be_named(network):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 2))
    plain.add_module("auxiliary", nn.Linear(3, 2))
    plain.forward = lambda images: plain[2](plain[1](plain[0](images)))
    found = anatomy(plain, torch.rand(1, 3, 1, 1))
    assert resolve_targets(plain, ["auxiliary"], 1, found) == ["auxiliary"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["layer9.conv1"], r"no module is called 'layer9\.conv1'; closest: layer\d\.\d\.conv1 \(Conv2d .*3 x 3\)"),
        ("q_proj|v_proj", r"no module is called 'q_proj\|v_proj'; closest: .*; auto, conv, .* choose by themselves"),
        ("conv(", r"target_modules 'conv\(' is no regular expression"),
        ("attention", r"no projection of an attention; candidates: layer1\.0\.conv1 \(Conv2d 64 x 64 x 3 x 3\)"),
        ([], "target_modules is empty; give names, a pattern, or one of auto, conv"),
    ],
)
def test_targets_that_are_not_there_are_refused_with_candidates(network, targets, message):
    plain, found = network("resnet18")
    with pytest.raises(UserError, match=message):
        resolve_targets(plain, targets, 8, found)


def test_a_rank_too_high_for_every_layer_names_the_highest_that_is_not(network):
    plain, found = network("resnet20")  # its largest layers have 64 x 576 weights: 57 x 640 < 36,864 < 58 x 640
    assert resolve_targets(plain, "auto", 57, found)
    with pytest.raises(UserError, match=r"rank 58 has no fewer parameters .* rank of 57 or less; candidates: layer3"):
        resolve_targets(plain, "auto", 58, found)


@pytest.mark.parametrize("targets", [["bn1"], r"layer1\.0", ["layer1"], ["relu"]])
def test_modules_that_are_no_weight_layers_are_not_implemented(network, targets):
    plain, found = network("resnet18")
    with pytest.raises(UnsupportedError, match=r"is a (BatchNorm2d|BasicBlock|Sequential|ReLU), which this adapter"):
        resolve_targets(plain, targets, 8, found)


def test_an_attention_with_keys_of_another_width_is_left_out_or_refused():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.keys = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 6, 1)
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, images):
            features = self.stem(images)
            keys = self.keys(features).flatten(2).mT
            return self.head(self.attention(features.flatten(2).mT, keys, keys)[0].mean(1))

    network = Attending()
    assert anatomy(network).attention == ("attention",)
    assert resolve_targets(network, "auto", 1) == ["keys"]
    with pytest.raises(UnsupportedError, match="MultiheadAttention with keys or values of another width"):
        resolve_targets(network, ["attention"], 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_convolution_of_the_geometry_maps_the_shapes_of_the_block(network, name, scheme):
    plain, found = network(name)
    blocks = resolve_blocks(plain, scheme, "auto", found)
    assert blocks
    assert found.stem not in blocks
    for block, geometry in blocks.items():
        given, gave = found.shapes[block]
        assert result_shape(geometry, gave if scheme.endswith("sequential") else given) == gave


@pytest.mark.parametrize("scheme", ["conv_parallel", "residual_parallel"])
@pytest.mark.parametrize("size", [61, 96])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "tf_efficientnet_lite0"])
def test_the_geometry_holds_for_images_of_other_sizes(network, name, scheme, size):
    plain, found = network(name)
    blocks = resolve_blocks(plain, scheme, "auto", found)
    shapes = anatomy(plain, torch.zeros(1, 3, size, size)).shapes
    for block, geometry in blocks.items():
        given, gave = shapes[block]
        assert result_shape(geometry, given) == gave, block


def test_convolutions_are_taken_with_their_norm_where_both_have_a_container(network):
    assert next(iter(resolve_blocks(network("mobilenet_v3_small")[0], "conv_parallel"))) == "features.1.block.0"
    blocks = resolve_blocks(network("resnet18")[0], "conv_parallel")
    assert next(iter(blocks)) == "layer1.0.conv1"
    assert "layer2.0.downsample.0" not in blocks  # 1 x 1


def test_stride_padding_and_dilation_are_those_of_the_convolution():
    convolution = nn.Conv2d(8, 8, (3, 5), (2, 1), (2, 4), (2, 1), padding_mode="circular")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), convolution, nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, 3, 20, 20))
    assert resolve_blocks(network, "conv_parallel", "auto", anatomy(network, torch.zeros(1, 3, 20, 20))) == {
        "1": {
            **{"in_channels": 8, "out_channels": 8, "kernel_size": [3, 5], "stride": [2, 1], "padding": [2, 4]},
            **{"dilation": [2, 1], "padding_mode": "circular"},
        }
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_network_without_such_blocks_is_refused(network, scheme):
    plain, found = network("deit_tiny")
    with pytest.raises(UserError, match=f"a {scheme} adapter needs a .*, and VisionTransformer has none"):
        resolve_blocks(plain, scheme, "auto", found)


def test_blocks_by_hand(network):
    plain, found = network("resnet18")
    assert list(resolve_blocks(plain, "residual_parallel", r"layer[34]\.0", found)) == ["layer3.0", "layer4.0"]
    assert list(resolve_blocks(plain, "residual_parallel", ["layer3.0"], found)) == ["layer3.0"]
    assert resolve_blocks(plain, "residual_parallel", ["layer4.0"], found)["layer4.0"]["stride"] == [2, 2]
    with pytest.raises(UserError, match=r"no module is called 'layer5\.0'; closest: layer\d\.0 \(BasicBlock\)"):
        resolve_blocks(plain, "residual_parallel", ["layer5.0"], found)
    with pytest.raises(UnsupportedError, match=r"fc \(Linear\) does not map images to images"):
        resolve_blocks(plain, "conv_parallel", ["fc"], found)


def test_a_block_whose_shapes_no_convolution_meets_is_refused_by_hand_and_left_out_automatically():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, features):
            return nn.functional.interpolate(self.two(self.one(features)), scale_factor=2)

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Doubling(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = anatomy(network, torch.zeros(1, 3, 8, 8))
    assert found.blocks == ("1",)
    with pytest.raises(UserError, match="1 maps 4 x 8 x 8 to 4 x 16 x 16, which no convolution of its kind does"):
        resolve_blocks(network, "residual_parallel", ["1"], found)
    with pytest.raises(UserError, match="Sequential has none"):
        resolve_blocks(network, "residual_parallel", "auto", found)


def test_targets_of_a_second_adapter_are_those_of_the_first():
    plain = ResNet(depth=20, num_classes=5)
    targets = {choice: resolve_targets(plain, choice, 2) for choice in CHOICES[:2]}
    blocks = resolve_blocks(plain, "residual_parallel")
    adapted = add_adapter(plain, LoraConfig(r=2))
    assert {choice: resolve_targets(adapted, choice, 2) for choice in CHOICES[:2]} == targets
    adapted = add_adapter(ResNet(depth=20, num_classes=5), ConvAdapterConfig("residual_parallel"))
    assert resolve_blocks(adapted, "residual_parallel") == blocks


@pytest.mark.parametrize("name", ["resnet20", "vit", "test_nfnet"])
def test_the_parameters_of_an_adapter_are_counted(name):
    plain = NETWORKS[name]()
    size = sum(parameter.numel() for parameter in plain.parameters())
    targets = resolve_targets(plain, "auto", 2)
    expected = {target: factors(plain.get_submodule(target), 2)[0] for target in targets}
    head = sum(parameter.numel() for parameter in plain.get_submodule(anatomy(plain).head[0]).parameters())
    model = add_adapter(plain, LoraConfig(r=2))
    counts = adapter_parameters(model)
    assert {row["name"]: row["parameters"] for row in counts["layers"]} == expected
    assert counts["base"] == size
    assert (counts["in_adapter"], counts["in_saved"]) == (sum(expected.values()), head)
    assert counts["trainable"] == sum(expected.values()) + head
    assert counts["share"] == counts["trainable"] / size
    again = NETWORKS[name]()
    for row in counts["layers"]:
        assert row["size"] == sum(parameter.numel() for parameter in again.get_submodule(row["name"]).parameters())


def test_counts_are_those_of_the_asked_adapter():
    model = add_adapter(ResNet(depth=20, num_classes=5), LoraConfig(r=2), "two")
    model = add_adapter(model, LoraConfig(r=3, target_modules=["layer1.0.conv1"]), "three", num_classes=9)
    assert adapter_parameters(model)["adapter"] == "three"
    assert adapter_parameters(model)["in_adapter"] == 3 * (16 * 9 + 16)
    assert adapter_parameters(model)["in_saved"] == 64 * 9 + 9
    assert adapter_parameters(model, "two")["in_saved"] == 64 * 5 + 5
    switch_adapter(model, "two")
    assert adapter_parameters(model) == adapter_parameters(model, "two")


def test_the_description_has_every_layer_and_the_totals():
    model = add_adapter(ResNet(depth=20, num_classes=5), LoraConfig(r=2, target_modules=["layer3.2.conv2"]))
    lines = describe_adapters(model).splitlines()
    assert re.fullmatch(r"layer3\.2\.conv2 +conv +64 x 64 x 3 x 3 +2 +1,280 +3\.5% of 36,864", lines[1])
    assert re.fullmatch(r"linear +trained in full +Linear +325", lines[2])
    total = sum(parameter.numel() for parameter in ResNet(depth=20, num_classes=5).parameters())
    assert lines[3] == (
        "1,280 parameters in 1 adapters, 325 in 1 modules trained in full; 1,605 parameters train, "
        f"{1605 / total:.2%} of the {total:,} of the network"
    )


def test_conv_adapters_are_described_by_their_blocks():
    model = add_adapter(ResNet(depth=20, num_classes=5), ConvAdapterConfig("residual_parallel"))
    counts = adapter_parameters(model)
    assert [row["name"] for row in counts["layers"]] == list(anatomy(ResNet(depth=20, num_classes=5)).blocks)
    assert {row["kind"] for row in counts["layers"]} == {"block"}
    own = sum(parameter.numel() for name, parameter in model.named_parameters() if "conv_adapter_" in name)
    assert counts["in_adapter"] == own
    assert "layer1.0" in describe_adapters(model)
    assert set(plain_modules(model)) == {name for name, _ in ResNet(depth=20, num_classes=5).named_modules()}
