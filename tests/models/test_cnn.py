import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from lightning_automl.models import TunableCNN, parameter_count


def kinds(network, *types):
    return [type(module).__name__ for module in network.modules() if isinstance(module, types)]


def test_parameters_by_hand():
    network = TunableCNN(num_classes=5, in_channels=3, image_size=9, filters=[4, 6], kernels=[3, 5], units=[7])
    first = 3 * 4 * 9 + 2 * 4  # convolution without bias, batch norm
    second = 4 * 6 * 25 + 2 * 6
    hidden = (6 * 2 * 2) * 7 + 7  # 9 -> 4 -> 2 pixels
    assert parameter_count(network) == first + second + hidden + 7 * 5 + 5


def test_a_block_is_convolution_norm_activation_pool_dropout():
    network = TunableCNN(2, filters=[4, 4], pools=["avg", "none"], conv_dropout=[0.0, 0.2], activation="gelu", units=[])
    assert [[type(layer) for layer in block] for block in network.features] == [
        [nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.AvgPool2d],
        [nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.Dropout],
    ]
    assert network.linear.in_features == 4 * 16 * 16


def test_one_value_is_that_of_every_layer():
    one = TunableCNN(3, filters=[4, 8], kernels=5, pools="avg", conv_dropout=0.1, units=[9, 6], fc_dropout=0.3)
    each = TunableCNN(
        3,
        filters=[4, 8],
        kernels=[5, 5],
        pools=["avg"] * 2,
        conv_dropout=[0.1] * 2,
        units=[9, 6],
        fc_dropout=[0.3] * 2,
    )
    assert str(one) == str(each)


def test_counters_take_the_first_entries_of_every_list():
    searched = TunableCNN(
        num_classes=3,
        filters=[4, 8, 16],
        kernels=[3, 5, 3],
        pools=["max", "none", "avg"],
        conv_dropout=[0.1, 0.2, 0.3],
        units=[9, 6],
        fc_dropout=[0.4, 0.5],
        n_conv=2,
        n_fc=1,
    )
    plain = TunableCNN(
        num_classes=3,
        filters=[4, 8],
        kernels=[3, 5],
        pools=["max", "none"],
        conv_dropout=[0.1, 0.2],
        units=[9],
        fc_dropout=[0.4],
    )
    assert str(searched) == str(plain)


def test_no_hidden_layer_is_left_at_zero():
    network = TunableCNN(2, units=[64, 64], n_fc=0)
    assert kinds(network, nn.Linear) == ["Linear"]


def test_norm_none_gives_the_convolutions_a_bias():
    network = TunableCNN(2, filters=[4], norm="none")
    assert network.features[0][0].bias is not None
    assert kinds(network, nn.BatchNorm2d, nn.GroupNorm) == []


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (16, 8), (4, 4), (6, 6), (9, 3), (1, 1), (11, 1)])
def test_group_norm_has_at_most_eight_groups_that_divide_the_channels(channels, groups):
    assert TunableCNN(2, filters=[channels], norm="group").features[0][1].num_groups == groups


def test_oblong_images_and_the_deepest_network_of_the_study():
    assert TunableCNN(2, image_size=(8, 20))(torch.rand(2, 3, 8, 20)).shape == (2, 2)
    network = TunableCNN(100, filters=[32] * 6, kernels=5, pools=["max"] * 5 + ["none"])  # 32 pixels halved five times
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 100)


def test_two_networks_share_no_parameter():
    first, second = TunableCNN(2), TunableCNN(2)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": []}, "no convolution block"),
        ({"n_conv": 0}, "no convolution block"),
        ({"n_conv": -1}, "n_conv is -1"),
        ({"n_conv": 4}, "n_conv is 4, but filters has 3"),
        ({"n_fc": 2}, "n_fc is 2, but units has 1"),
        ({"filters": [8, 0, 8]}, "filters is 0"),
        ({"units": [0]}, "units is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"kernels": [3, 3]}, "kernels has 2 values for 3 convolution blocks"),
        ({"pools": ["max"] * 4}, "pools has 4 values for 3"),
        ({"n_conv": 2, "conv_dropout": [0.1]}, "conv_dropout has 1 value for 2"),
        ({"fc_dropout": [0.1, 0.1]}, "fc_dropout has 2 values for 1 hidden"),
        ({"kernels": 4}, "must be odd"),
        ({"kernels": 33}, "larger than images of 32 x 32"),
        ({"filters": [8] * 6}, "can be halved 5 times, but the pool of block 5"),
        ({"image_size": (32, 4)}, "can be halved 2 times"),
        ({"conv_dropout": 1.0}, r"conv_dropout is 1.0; it is a probability in \[0, 1\)"),
        ({"fc_dropout": [-0.1]}, "fc_dropout is -0.1"),
        ({"pools": "min"}, "unknown pool 'min'; known: none, max, avg"),
        ({"activation": "relo"}, "unknown activation 'relo'; known: relu"),
        ({"norm": "layer"}, "unknown norm 'layer'; known: batch"),
    ],
    ids=str,
)
def test_impossible_networks_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        TunableCNN(**{"num_classes": 10} | arguments)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"28 x 28 pixels.*\[28, 28\]"):
        TunableCNN(2)(torch.rand(1, 3, 28, 28))


def test_lists_are_parsed_from_yaml_and_from_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TunableCNN, "model")
    text = "{num_classes: 4, image_size: [16, 20], filters: [4, 8], kernels: [3, 5], pools: [max, none], units: []}"
    from_yaml = parser.instantiate(parser.parse_object({"model": yaml.safe_load(text)})).model
    flags = ["num_classes=4", "image_size=[16,20]", "filters=[4,8]", "kernels=[3,5]", "pools=[max,none]", "units=[]"]
    from_flags = parser.instantiate(parser.parse_args([f"--model.{flag}" for flag in flags])).model
    assert (
        str(from_yaml) == str(from_flags) == str(TunableCNN(4, 3, (16, 20), [4, 8], [3, 5], ["max", "none"], units=[]))
    )
