"""Networks, what they cost, and how their weights are loaded."""

from lightning_automl.models.cnn import TunableCNN
from lightning_automl.models.cost import flop_count, parameter_count
from lightning_automl.models.resnet import ResNet
from lightning_automl.models.weights import LoadReport, load_weights

__all__ = ["LoadReport", "ResNet", "TunableCNN", "flop_count", "load_weights", "parameter_count"]
