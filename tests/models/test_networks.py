"""What holds for every network that ``lightning_automl.models`` exports; a new one joins by being exported."""

import inspect

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_automl import models

NETWORKS = {
    name: value
    for name in models.__all__
    if inspect.isclass(value := getattr(models, name)) and issubclass(value, nn.Module)
    if "num_classes" in inspect.signature(value).parameters
}


#: What a network cannot be built without, or would be too slow without.
EXTRA = {
    "Backbone": {"name": "resnet18", "pretrained": False},
    "DartsSpace": {"channels": 4, "cells": 3},
    "GenotypeNetwork": {"channels": 4, "cells": 5},
    "NasBench201Network": {"cells_per_stage": 1},
    "NasBench201Space": {"channels": 4, "cells_per_stage": 1},
}


def build(name, classes=2, channels=3, size=28):
    network = NETWORKS[name]
    sized = {"image_size": size} if "image_size" in inspect.signature(network).parameters else {}
    return network(num_classes=classes, in_channels=channels, **sized, **EXTRA.get(name, {}))


def test_there_are_networks():
    assert {"TunableCNN", "ResNet", "DenseNet", "EfficientNet", "Backbone"} <= NETWORKS.keys()
    assert {"GenotypeNetwork", "NasBench201Network", "DartsSpace"} <= NETWORKS.keys()


@pytest.mark.parametrize("size", [8, 28, 33])
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_a_column_a_class_and_every_parameter_gets_a_finite_gradient(name, channels, classes, size):
    network = build(name, classes, channels, size)
    logits = network(torch.rand(4, channels, size, size))
    assert logits.shape == (4, classes)
    logits.square().sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last_gives_the_same_logits(name, warmed):
    network = warmed(build(name).double(), size=28)  # in float32 the norms of a few pixels blow up what is rounded
    images = torch.rand(4, 3, 28, 28, dtype=torch.float64)
    expected = network(images)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_images_with_other_channels_are_refused(name):
    with pytest.raises(ValueError, match="in_channels"):
        build(name)(torch.rand(2, 1, 28, 28))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_state_dict_is_restored_into_a_new_network(name):
    first, second = build(name).eval(), build(name).eval()
    images = torch.rand(2, 3, 28, 28)
    assert not torch.equal(first(images), second(images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_command_line_parses_every_network_and_its_printed_config(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model")
    given = {"class_path": f"lightning_automl.models.{name}", "init_args": {"num_classes": 3} | EXTRA.get(name, {})}
    config = parser.parse_object({"model": given})
    again = parser.parse_string(parser.dump(config))
    assert isinstance(parser.instantiate(again).model, NETWORKS[name])
