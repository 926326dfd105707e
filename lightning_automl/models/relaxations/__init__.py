"""Relaxations: how operations are mixed in a search. Each is a class of its own for the slot ``relaxation``."""

from lightning_automl.models.relaxations.auxiliary_skip import AuxiliarySkip
from lightning_automl.models.relaxations.gumbel import GumbelSoftmax
from lightning_automl.models.relaxations.partial_channels import PartialChannels
from lightning_automl.models.relaxations.relaxation import Mixture, Relaxation
from lightning_automl.models.relaxations.softmax import SoftmaxRelaxation

__all__ = ["AuxiliarySkip", "GumbelSoftmax", "Mixture", "PartialChannels", "Relaxation", "SoftmaxRelaxation"]
