"""Figures: data in, matplotlib figure out."""

from lightning_automl.plots.activations import activation_overlay, class_activations
from lightning_automl.plots.adapter_outputs import adapter_outputs
from lightning_automl.plots.architecture import Curve, edge_strengths, genotype_values, over_epochs
from lightning_automl.plots.calibration import reliability_diagram
from lightning_automl.plots.classes import class_counts, class_recall
from lightning_automl.plots.confusion import confusion_matrix
from lightning_automl.plots.curves import learning_curves
from lightning_automl.plots.dimensions import Dimension
from lightning_automl.plots.genotype import genotype_figure, operation_kind, write_genotype
from lightning_automl.plots.history import best_so_far, optimisation_history
from lightning_automl.plots.importances import parameter_importances
from lightning_automl.plots.intermediate import intermediate_values
from lightning_automl.plots.leaderboard import Standing, leaderboard
from lightning_automl.plots.parallel import parallel_coordinates
from lightning_automl.plots.pareto import pareto_front
from lightning_automl.plots.policies import (
    ImageRow,
    KeptOperation,
    acceptance_values,
    captioned_images,
    density_history,
    operations_kept,
    paired_differences,
)
from lightning_automl.plots.population import Segment, population_history, value_schedule
from lightning_automl.plots.seeds import seed_curves
from lightning_automl.plots.slices import value_slice

__all__ = [
    "Curve",
    "Dimension",
    "ImageRow",
    "KeptOperation",
    "Segment",
    "Standing",
    "acceptance_values",
    "activation_overlay",
    "adapter_outputs",
    "best_so_far",
    "captioned_images",
    "class_activations",
    "class_counts",
    "class_recall",
    "confusion_matrix",
    "density_history",
    "edge_strengths",
    "genotype_figure",
    "genotype_values",
    "intermediate_values",
    "leaderboard",
    "learning_curves",
    "operation_kind",
    "operations_kept",
    "optimisation_history",
    "over_epochs",
    "paired_differences",
    "parallel_coordinates",
    "parameter_importances",
    "pareto_front",
    "population_history",
    "reliability_diagram",
    "seed_curves",
    "value_schedule",
    "value_slice",
    "write_genotype",
]
