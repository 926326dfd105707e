"""Losses of logits and labels."""

from lightning_automl.losses.binary import BinaryCrossEntropy
from lightning_automl.losses.focal import FocalLoss

__all__ = ["BinaryCrossEntropy", "FocalLoss"]
