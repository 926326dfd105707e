import math

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet_b0

from lightning_automl.models import (
    EfficientNet,
    compound_scaling,
    flop_count,
    parameter_count,
    round_channels,
    round_repeats,
)


def test_phi_zero_scales_nothing():
    assert compound_scaling(0) == (1, 1, 1)
    assert EfficientNet(2, phi=0.0).resolution is None


def test_the_paper_s_numbers_nearly_double_the_operations():
    depth, width, resolution = compound_scaling(1)
    assert (depth, width, resolution) == (1.2, 1.1, 1.15)
    assert depth * width**2 * resolution**2 == pytest.approx(1.92027, abs=5e-6)


def test_two_units_are_one_unit_twice():
    twice = [value**2 for value in compound_scaling(1, 1.3, 1.2, 1.1)]
    assert compound_scaling(2, 1.3, 1.2, 1.1) == pytest.approx(twice)


def test_channels_are_the_nearest_multiple_of_eight_and_never_below_nine_tenths():
    for tenth in range(10, 20_000):
        channels = tenth / 10
        rounded = round_channels(channels)
        assert rounded % 8 == 0
        assert rounded >= 0.9 * channels
        assert rounded >= 8
        if channels >= 8:
            assert rounded - channels <= 8
            assert abs(rounded - channels) <= 4 or rounded - 8 < 0.9 * channels


@pytest.mark.parametrize(
    ("channels", "rounded"), [(1, 8), (11, 16), (12, 16), (19, 24), (35.2, 32), (36, 40), (44, 48)]
)
def test_channels_by_hand(channels, rounded):
    assert round_channels(channels) == rounded


@pytest.mark.parametrize(("repeats", "rounded"), [(1.0, 1), (1.2, 2), (4 * 1.2, 5), (10 * 1.1, 11), (0.2, 1)])
def test_repeats_are_rounded_up(repeats, rounded):
    assert round_repeats(repeats) == rounded


def test_b0_has_the_parameters_of_the_paper_s_network():
    with torch.device("meta"):
        assert parameter_count(EfficientNet(1000)) == 5_288_548


def test_phi_zero_gives_the_logits_of_torchvision_s_b0(warmed):
    theirs = warmed(efficientnet_b0(num_classes=5))
    ours = EfficientNet(5, image_size=64).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_width_depth_and_resolution_follow_phi():
    with torch.device("meta"):
        network = EfficientNet(2, image_size=(100, 60), phi=2.0)
    assert network.scaling == pytest.approx((1.44, 1.21, 1.3225))
    assert network.resolution == (132, 79)
    assert [len(stage) for stage in network.features[1:8]] == [math.ceil(1.44 * n) for n in (1, 2, 2, 3, 3, 4, 1)]
    assert network.features[0][0].out_channels == 40  # 38.72
    assert network.features[7][0].out_channels == 384  # 387.2


def test_images_are_resized_to_the_resolution():
    seen = []
    network = EfficientNet(2, image_size=16, phi=1.0).eval()
    network.features.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[2:]))
    for size in (16, 18, 40):
        assert network(torch.rand(1, 3, size, size)).shape == (1, 2)
    assert seen == [(18, 18)] * 3


# Repeats are rounded up, which weighs less the more there are.
@pytest.mark.parametrize(("phi", "excess"), [(1, 1.35), (4, 1.25), (7, 1.1)])
def test_operations_grow_as_the_paper_says(phi, excess):
    with torch.device("meta"):
        small, large = (flop_count(EfficientNet(9, image_size=224, phi=value), (3, 224, 224)) for value in (0, phi))
    assert 1 < large / small / 1.92027**phi < excess


def test_negative_phi_makes_it_smaller():
    with torch.device("meta"):
        small, usual = EfficientNet(10, phi=-2), EfficientNet(10)
        assert small.resolution == (24, 24)
        assert parameter_count(small) < 0.75 * parameter_count(usual)


@pytest.mark.parametrize(("arguments", "stride"), [({}, 1), ({"image_size": 33}, 2), ({"stem_stride": 2}, 2)], ids=str)
def test_small_images_are_not_halved_by_the_first_convolution(arguments, stride):
    with torch.device("meta"):
        assert EfficientNet(2, **arguments).features[0][0].stride == (stride, stride)


def test_dropout_and_stochastic_depth_arrive():
    with torch.device("meta"):
        network = EfficientNet(2, dropout=0.3, stochastic_depth=0.4)
    assert network.classifier[0].p == 0.3
    drops = [module.p for name, module in network.named_modules() if name.endswith("stochastic_depth")]
    assert drops == pytest.approx([0.4 * index / 16 for index in range(16)])


def test_activations_are_not_in_place():
    with torch.device("meta"):
        network = EfficientNet(2)
    assert any(isinstance(module, nn.SiLU) for module in network.modules())
    assert not any(getattr(module, "inplace", False) for module in network.modules())


def test_weights_and_normalization_are_taken(tmp_path):
    saved = EfficientNet(4, image_size=8)
    torch.save(saved.state_dict(), tmp_path / "b0.pt")
    loaded = EfficientNet(4, image_size=8, weights=str(tmp_path / "b0.pt"), mean=[0.1] * 3, std=[0.2] * 3)
    assert loaded.normalization == ([0.1] * 3, [0.2] * 3)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(images), saved.eval()(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.9}, "alpha is 0.9"),
        ({"beta": math.nan}, "beta is nan"),
        ({"gamma": math.inf}, "gamma is inf"),
        ({"phi": math.inf}, "phi is inf"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"image_size": (32, 0)}, "image_size is 0"),
        ({"stem_stride": 3}, "stem_stride is 3"),
        ({"dropout": 1.0}, r"dropout is 1.0; it is a probability"),
        ({"stochastic_depth": -0.1}, "stochastic_depth is -0.1"),
        ({"std": [0.5] * 3}, "mean is missing"),
    ],
    ids=str,
)
def test_impossible_networks_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientNet(**{"num_classes": 10} | arguments)
