import pytest
import torch
from torch import nn
from torchvision.models import densenet121

from lightning_automl.models import DenseNet, parameter_count

SMALL = {"depth": 22, "growth": 4}
IMAGENET = {"blocks": (6, 12, 24, 16), "growth": 32, "stem": "imagenet"}


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"num_classes": 10, "depth": 100, "growth": 12}, 769_162),
        ({"num_classes": 1000, **IMAGENET}, 7_978_856),
        ({"num_classes": 1000, **IMAGENET, "blocks": (6, 12, 32, 32)}, 14_149_480),
        ({"num_classes": 1000, **IMAGENET, "blocks": (6, 12, 36, 24), "growth": 48}, 28_681_000),
    ],
    ids=["DenseNet-BC 100 12", "DenseNet-121", "DenseNet-169", "DenseNet-161"],
)
def test_parameters_of_published_networks(arguments, parameters):
    with torch.device("meta"):
        assert parameter_count(DenseNet(**arguments)) == parameters


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        ({"depth": 40, "growth": 12, "bottleneck": False, "compression": 1.0}, 1.0),
        ({"depth": 100, "growth": 12, "bottleneck": False, "compression": 1.0}, 7.0),
        ({"depth": 250, "growth": 24}, 15.3),
        ({"depth": 190, "growth": 40}, 25.6),
    ],
    ids=str,
)
def test_sizes_of_table_2(arguments, millions):
    with torch.device("meta"):
        assert parameter_count(DenseNet(10, **arguments)) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_depth_counts_the_layers_with_weights(bottleneck):
    network = DenseNet(10, depth=40, bottleneck=bottleneck)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == 40


def test_the_imagenet_form_gives_the_logits_of_torchvision_s_densenet121(warmed):
    theirs = warmed(densenet121(num_classes=5))
    ours = DenseNet(5, **IMAGENET).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 65, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_a_layer_sees_the_maps_of_all_layers_before_it():
    block = DenseNet(2, **SMALL).features.denseblock1.eval()
    features = torch.rand(2, 8, 5, 5)
    seen = [features]
    for layer in block:
        seen.append(layer(torch.cat(seen, 1)))
    assert torch.equal(block(features), torch.cat(seen, 1))
    assert torch.cat(seen, 1).shape[1] == 8 + 3 * 4


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("compression", [0.5, 1.0])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_kind_runs(bottleneck, compression, norm):
    network = DenseNet(3, **SMALL, bottleneck=bottleneck, compression=compression, norm=norm, dropout=0.2)
    assert network(torch.rand(2, 3, 17, 12)).shape == (2, 3)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == (norm == "batch")


def test_group_norm_does_not_mix_images():
    network = DenseNet(3, **SMALL, norm="group")
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(network(images)[:2], network(images[:2]))


def test_dropout_comes_after_every_convolution_but_the_first():
    network = DenseNet(3, **SMALL, dropout=0.5)
    hits = []
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, arguments, result: hits.append(module.p))
    network(torch.rand(2, 3, 8, 8))
    assert hits == [0.5] * (22 - 2)  # without the first convolution and the classifier


def test_activations_leave_what_hooks_saw_alone():
    network = DenseNet(3, **SMALL)
    norm = network.features.denseblock1.denselayer1.norm1
    kept = []
    norm.register_forward_hook(lambda module, arguments, result: kept.append((result, result.clone())))
    network(torch.rand(2, 3, 8, 8))
    result, copy = kept[0]
    assert (copy < 0).any()
    assert torch.equal(result, copy)


@pytest.mark.parametrize(("arguments", "smallest"), [(SMALL, 4), (IMAGENET | {"blocks": (1, 1, 1, 1)}, 29)], ids=str)
def test_the_smallest_images_run_and_smaller_ones_are_refused(arguments, smallest):
    network = DenseNet(2, **arguments).eval()
    assert network(torch.rand(1, 3, smallest, 40)).shape == (1, 2)
    with pytest.raises(ValueError, match=f"{smallest - 1} x 40 pixels.* until {smallest} are needed"):
        network(torch.rand(1, 3, smallest - 1, 40))


def test_normalization_is_kept_for_the_task():
    assert DenseNet(2, **SMALL).normalization is None
    assert DenseNet(2, **SMALL, mean=(0.1, 0.2, 0.3), std=[1, 2, 3]).normalization == ([0.1, 0.2, 0.3], [1, 2, 3])


def test_weights_are_loaded_also_under_the_names_of_torchvision_s_old_files(tmp_path):
    saved = DenseNet(5, **SMALL)
    state = {}
    for name, value in saved.state_dict().items():
        for part in ("norm", "conv"):  # as in densenet121-a639ec97.pth: denselayer1.norm.1.weight
            for number in "12":
                if "denselayer" in name:
                    name = name.replace(f".{part}{number}.", f".{part}.{number}.")
        state[name] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "densenet.pth")
    loaded = DenseNet(5, **SMALL, weights=str(tmp_path / "densenet.pth"))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(images), saved.eval()(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 41}, r"6n \+ 4 layers, not 41; try 40"),
        ({"depth": 4}, "try 10"),
        ({"depth": 41, "bottleneck": False}, r"3n \+ 4 layers, not 41; try 40"),
        ({"growth": 0}, "growth is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"compression": 0.0}, r"compression is 0.0.*\(0, 1\]"),
        ({"compression": 1.5}, "compression is 1.5"),
        ({"blocks": []}, r"blocks is \[\]"),
        ({"blocks": [3, 0]}, r"blocks is \[3, 0\]"),
        ({"stem": "large"}, "unknown stem 'large'; known: small, imagenet"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"dropout": 1.0}, r"dropout is 1.0; it is a probability in \[0, 1\)"),
        ({"mean": [0.5] * 3}, "std is missing"),
    ],
    ids=str,
)
def test_impossible_densenets_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseNet(**{"num_classes": 10} | arguments)
