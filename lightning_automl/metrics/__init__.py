"""Metrics, intervals and tests: functions of labels and predictions."""

from lightning_automl.metrics.classification import StageOutputs, classification_metrics

__all__ = ["StageOutputs", "classification_metrics"]
