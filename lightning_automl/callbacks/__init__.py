"""Callbacks that watch a run."""

from lightning_automl.callbacks.adapter_statistics import AdapterStatistics, adapter_report
from lightning_automl.callbacks.batch_size import BatchSizeProbe
from lightning_automl.callbacks.heartbeat import Heartbeat
from lightning_automl.callbacks.hyperparameter_schedule import HyperparameterSchedule
from lightning_automl.callbacks.run_writer import AtomicCheckpointIO, RunWriter, mode_of
from lightning_automl.callbacks.trial_pruning import NonFiniteMetricError, TrialPruning, UnknownMetricError

__all__ = [
    "AdapterStatistics",
    "AtomicCheckpointIO",
    "BatchSizeProbe",
    "Heartbeat",
    "HyperparameterSchedule",
    "NonFiniteMetricError",
    "RunWriter",
    "TrialPruning",
    "UnknownMetricError",
    "adapter_report",
    "mode_of",
]
