import pytest
import torch
from torch import nn

from lightning_automl.models import ResNet, parameter_count


def test_resnet_20_has_the_parameters_of_the_paper_s_network():
    assert parameter_count(ResNet(num_classes=10)) == 269_722


@pytest.mark.parametrize(("depth", "millions"), [(32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_sizes_of_table_6(depth, millions):
    assert parameter_count(ResNet(num_classes=10, depth=depth)) / 1e6 == pytest.approx(millions, abs=0.03)


def test_depth_counts_the_layers_with_weights():
    network = ResNet(num_classes=10, depth=32)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == 32


def test_shortcut_a_takes_every_other_pixel_between_channels_of_zeros():
    shortcut = ResNet(num_classes=2, width=4).layer2[0].shortcut
    features = torch.rand(2, 4, 6, 5)
    result = shortcut(features)
    assert result.shape == (2, 8, 3, 3)
    assert torch.equal(result[:, 2:6], features[:, :, ::2, ::2])
    assert not result[:, [0, 1, 6, 7]].any()


def test_shortcut_b_adds_a_convolution_and_a_norm_in_two_places():
    added = parameter_count(ResNet(10, shortcut="B")) - parameter_count(ResNet(10, shortcut="A"))
    assert added == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("width", [3, 16])
def test_every_kind_runs(norm, shortcut, width):
    network = ResNet(3, depth=8, width=width, shortcut=shortcut, norm=norm)
    assert network(torch.rand(2, 3, 17, 12)).shape == (2, 3)


def test_group_norm_does_not_mix_images():
    network = ResNet(3, depth=8, norm="group")
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(network(images)[:2], network(images[:2]))


def test_normalization_is_kept_for_the_task():
    assert ResNet(2).normalization is None
    assert ResNet(2, mean=(0.1, 0.2, 0.3), std=[1, 2, 3]).normalization == ([0.1, 0.2, 0.3], [1, 2, 3])


def test_weights_are_loaded(tmp_path):
    saved = ResNet(5, depth=8)
    torch.save({"state_dict": {f"module.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "resnet.th")
    loaded = ResNet(5, depth=8, weights=str(tmp_path / "resnet.th"))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(images), saved.eval()(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "6n .* not 18; try 20"),
        ({"depth": 2}, "try 8"),
        ({"width": 0}, "width is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"shortcut": "C"}, "unknown shortcut 'C'"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"mean": [0.5] * 3}, "std is missing"),
        ({"std": [0.5] * 3}, "mean is missing"),
        ({"mean": [0.5], "std": [0.5] * 3}, "mean has 1 numbers for 3 channels"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}, "above 0"),
    ],
    ids=str,
)
def test_impossible_resnets_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{"num_classes": 10} | arguments)
