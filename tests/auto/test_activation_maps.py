"""Class activation maps by hand, by finite differences, and of every network of the package."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_automl.adapters import ConvAdapterConfig, LoraConfig, add_adapter
from lightning_automl.models import Backbone, DenseNet, GenotypeNetwork, NasBench201Network, ResNet, TunableCNN
from lightning_automl.models.activation import class_activation_maps
from lightning_automl.plots import activation_overlay, class_activations


class TwoChannels(nn.Module):
    """A 1 x 1 convolution that gives x and 1 - x, a mean over pixels, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.linear = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, 1.0]))
            self.linear.weight.copy_(torch.tensor([[3.0, 1.0], [-2.0, 4.0]]))

    def forward(self, images):
        return self.linear(self.conv(images).mean((2, 3)))


IMAGE = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]]]])


def test_a_map_by_hand():
    # dy / dA_k is w_k / 4 at each pixel: class 0 gives (3 x + 1 (1 - x)) / 4 = (1 + 2 x) / 4, whose maximum is 3/4.
    found = class_activation_maps(TwoChannels(), IMAGE, torch.tensor([0]))
    assert found.maps == pytest.approx(((1 + 2 * IMAGE[:, 0]) / 3).numpy())
    # Class 1: (-2 x + 4 (1 - x)) / 4 = (4 - 6 x) / 4, negative for x = 1, which the positive part leaves out.
    found = class_activation_maps(TwoChannels(), IMAGE, torch.tensor([1]))
    assert found.maps[0].flatten().tolist() == pytest.approx([1.0, 0.25, 0.625, 0.0])


def test_without_a_class_the_predicted_one_is_shown():
    network = TwoChannels()
    images = torch.cat([IMAGE, torch.zeros_like(IMAGE)])
    found = class_activation_maps(network, images)
    assert found.classes.tolist() == network(images).argmax(1).tolist() == [0, 1]
    assert found.maps[0] == pytest.approx(class_activation_maps(network, IMAGE, torch.tensor([0])).maps[0].numpy())


def test_one_logit_is_that_of_class_1_and_its_negative_that_of_class_0():
    network = TwoChannels()
    network.linear = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.linear.weight.copy_(torch.tensor([[-1.0, 0.0]]))  # the logit is -x
    for_zero = class_activation_maps(network, IMAGE, torch.tensor([0])).maps
    assert for_zero == pytest.approx(IMAGE[:, 0].numpy())
    assert not class_activation_maps(network, IMAGE, torch.tensor([1])).maps.any()


def test_channels_weigh_what_a_small_change_of_them_does():
    """Finite differences: to add e to a whole channel changes the logit by e times pixels times its weight."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Identity(), nn.Flatten(), nn.Linear(4 * 36, 5), nn.Tanh()
    ).double()
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    features = network[:3](image)
    weights = torch.empty(4, dtype=torch.float64)
    step = 1e-6
    for channel in range(4):
        moved = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
        moved[:, channel] = step
        change = network[3:](features + moved) - network[3:](features - moved)
        weights[channel] = change[0, 2] / (2 * step) / 36
    expected = (weights[:, None, None] * features[0]).sum(0).relu()
    found = class_activation_maps(network, image, torch.tensor([2])).maps[0]
    torch.testing.assert_close(found.double(), expected / expected.max(), atol=1e-5, rtol=0)


def test_the_map_is_of_the_size_of_the_image():
    network = nn.Sequential(nn.Conv2d(3, 2, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 6 * 8, 3)).eval()
    found = class_activation_maps(network, torch.rand(2, 3, 12, 16))
    assert found.maps.shape == (2, 12, 16)
    assert found.maps.dtype == torch.float32


NETWORKS = {
    "cnn": lambda: TunableCNN(num_classes=3, in_channels=3, image_size=32),
    "cnn of one pixel": lambda: TunableCNN(num_classes=3, image_size=32, filters=[4] * 5, units=[]),
    "resnet": lambda: ResNet(num_classes=3, depth=8, width=4),
    "densenet": lambda: DenseNet(num_classes=3, depth=10, growth=4),
    "genotype": lambda: GenotypeNetwork(num_classes=3, channels=4, cells=3, auxiliary=True),
    "nas-bench-201": lambda: NasBench201Network(num_classes=3, channels=4, cells_per_stage=1),
    "torchvision": lambda: Backbone("mobilenet_v3_small", num_classes=3, pretrained=False),
    "resized": lambda: Backbone("resnet18", num_classes=3, pretrained=False, resize=(64, 48)),
    "channels last within": lambda: Backbone("convnext_tiny", num_classes=3, pretrained=False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolutional_network_has_maps(name, warmed):
    network = NETWORKS[name]()
    warmed(network, size=32)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = class_activation_maps(network, torch.rand(2, 3, 32, 32))
    assert found.maps.shape == (2, 32, 32)
    assert found.maps.amin() >= 0
    assert found.maps.amax((1, 2)) == pytest.approx([1, 1])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("kind", ["lora", "conv_adapter"])
def test_adapters_and_frozen_layers_have_maps(kind, warmed):
    config = LoraConfig(r=2) if kind == "lora" else ConvAdapterConfig()
    network = warmed(add_adapter(ResNet(num_classes=3, depth=8, width=4), config, "default"), size=16)
    for parameter in network.parameters():
        parameter.requires_grad = False
    assert class_activation_maps(network, torch.rand(2, 3, 16, 16)).maps.shape == (2, 16, 16)


def test_a_transformer_that_ends_in_tokens_has_none():
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3).eval()
    assert class_activation_maps(network, torch.rand(2, 3, 32, 32)) is None


def test_a_transformer_that_ends_in_a_map_has_one():
    network = Backbone("swin_t", num_classes=3, pretrained=False).eval()
    assert class_activation_maps(network, torch.rand(2, 3, 64, 64)).maps.shape == (2, 64, 64)


def test_a_network_without_a_feature_map_has_none():
    assert class_activation_maps(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(2, 3, 2, 2)) is None


def test_where_a_map_is_zero_the_image_is_seen_in_grey():
    image = np.array([[[10, 200]], [[20, 200]], [[30, 200]]], np.uint8)
    seen = activation_overlay(image, np.array([[0.0, 1.0]]))
    assert seen[:, 0, 0].tolist() == [20, 20, 20]
    assert seen[:, 0, 1].tolist() != [200, 200, 200]
    assert activation_overlay(image[:1], np.zeros((1, 2))).tolist() == [[[10, 200]]] * 3


def test_recognised_and_mistaken_images_are_drawn_apart():
    images, maps = np.zeros((5, 1, 4, 4), np.uint8), np.zeros((5, 4, 4))
    figure = class_activations(images, maps, np.array([0, 1, 0, 1, 1]), np.array([0, 1, 0, 0, 1]), ["ill", "$well"])
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "recognised"
    assert words.count("mistaken") == 1
    assert words[-2:] == ["is $well", "seen as ill"]
    assert len(figure.axes) == 10
