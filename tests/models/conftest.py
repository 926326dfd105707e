"""What tests of networks share."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def warmed():
    """Take the norms' statistics of a network from random images, so that its logits differ from image to image.

    A deep network at its start gives about the same logits, or zeros, for everything: to compare them shows nothing.
    """

    def warm(network, channels=3, size=64):
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.train()
        images = torch.rand(4, channels, size, size, dtype=next(network.parameters()).dtype)
        with torch.no_grad():
            network(images)
            logits = network.eval()(images)
        assert (logits[0] - logits[1]).abs().max() > 0.01
        return network

    return warm
