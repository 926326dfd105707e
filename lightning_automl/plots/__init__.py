"""Figures: data in, matplotlib figure out."""

from lightning_automl.plots.calibration import reliability_diagram
from lightning_automl.plots.classes import class_counts, class_recall
from lightning_automl.plots.confusion import confusion_matrix
from lightning_automl.plots.curves import learning_curves

__all__ = ["class_counts", "class_recall", "confusion_matrix", "learning_curves", "reliability_diagram"]
