"""Callbacks that watch a run."""

from lightning_automl.callbacks.batch_size import BatchSizeProbe
from lightning_automl.callbacks.heartbeat import Heartbeat
from lightning_automl.callbacks.hyperparameter_schedule import HyperparameterSchedule
from lightning_automl.callbacks.run_writer import AtomicCheckpointIO, RunWriter, mode_of
from lightning_automl.callbacks.trial_pruning import NonFiniteMetricError, TrialPruning, UnknownMetricError

__all__ = [
    "AtomicCheckpointIO",
    "BatchSizeProbe",
    "Heartbeat",
    "HyperparameterSchedule",
    "NonFiniteMetricError",
    "RunWriter",
    "TrialPruning",
    "UnknownMetricError",
    "mode_of",
]
