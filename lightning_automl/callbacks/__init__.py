"""Callbacks that watch a run."""

from lightning_automl.callbacks.adapter_statistics import AdapterStatistics, adapter_report
from lightning_automl.callbacks.batch_size import BatchSizeProbe
from lightning_automl.callbacks.drop_path import DropPathSchedule
from lightning_automl.callbacks.genotype_writer import GenotypeWriter
from lightning_automl.callbacks.guards import EigenvalueStop, SearchGuard, SkipStop, Verdict
from lightning_automl.callbacks.heartbeat import Heartbeat
from lightning_automl.callbacks.hyperparameter_schedule import HyperparameterSchedule
from lightning_automl.callbacks.run_writer import AtomicCheckpointIO, RunWriter, mode_of
from lightning_automl.callbacks.trial_pruning import NonFiniteMetricError, TrialPruning, UnknownMetricError

__all__ = [
    "AdapterStatistics",
    "AtomicCheckpointIO",
    "BatchSizeProbe",
    "DropPathSchedule",
    "EigenvalueStop",
    "GenotypeWriter",
    "Heartbeat",
    "HyperparameterSchedule",
    "NonFiniteMetricError",
    "RunWriter",
    "SearchGuard",
    "SkipStop",
    "TrialPruning",
    "UnknownMetricError",
    "Verdict",
    "adapter_report",
    "mode_of",
]
