"""Figures: data in, matplotlib figure out."""

from lightning_automl.plots.confusion import confusion_matrix
from lightning_automl.plots.curves import learning_curves

__all__ = ["confusion_matrix", "learning_curves"]
