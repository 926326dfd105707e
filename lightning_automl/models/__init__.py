"""Networks, the spaces that some are found in, what they cost, and how their weights are loaded."""

from lightning_automl.models.architecture_cost import ArchitectureCost
from lightning_automl.models.cnn import TunableCNN
from lightning_automl.models.cost import flop_count, parameter_count
from lightning_automl.models.densenet import DenseNet
from lightning_automl.models.genotype import Genotype, load_genotype
from lightning_automl.models.genotype_network import GenotypeNetwork
from lightning_automl.models.nasbench201 import NasBench201Network
from lightning_automl.models.nasbench201_space import NasBench201Space
from lightning_automl.models.operation_costs import measure_latencies, save_latencies
from lightning_automl.models.pretrained import Backbone
from lightning_automl.models.resnet import ResNet
from lightning_automl.models.scaling import EfficientNet, Scaling, compound_scaling, round_channels, round_repeats
from lightning_automl.models.supernet import DartsSpace, Supernet
from lightning_automl.models.weights import LoadReport, load_weights, without_loading

__all__ = [
    "ArchitectureCost",
    "Backbone",
    "DartsSpace",
    "DenseNet",
    "EfficientNet",
    "Genotype",
    "GenotypeNetwork",
    "LoadReport",
    "NasBench201Network",
    "NasBench201Space",
    "ResNet",
    "Scaling",
    "Supernet",
    "TunableCNN",
    "compound_scaling",
    "flop_count",
    "load_genotype",
    "load_weights",
    "measure_latencies",
    "parameter_count",
    "round_channels",
    "round_repeats",
    "save_latencies",
    "without_loading",
]
