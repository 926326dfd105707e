"""Networks, what they cost, and how their weights are loaded."""

from lightning_automl.models.cnn import TunableCNN
from lightning_automl.models.cost import flop_count, parameter_count
from lightning_automl.models.densenet import DenseNet
from lightning_automl.models.pretrained import Backbone
from lightning_automl.models.resnet import ResNet
from lightning_automl.models.scaling import EfficientNet, Scaling, compound_scaling, round_channels, round_repeats
from lightning_automl.models.weights import LoadReport, load_weights, without_loading

__all__ = [
    "Backbone",
    "DenseNet",
    "EfficientNet",
    "LoadReport",
    "ResNet",
    "Scaling",
    "TunableCNN",
    "compound_scaling",
    "flop_count",
    "load_weights",
    "parameter_count",
    "round_channels",
    "round_repeats",
    "without_loading",
]
