"""Metrics, intervals and tests: functions of labels and predictions."""

from lightning_automl.metrics.binary import PredictiveValues, Rates, predictive_values, rates
from lightning_automl.metrics.calibration import Reliability, expected_calibration_error, fit_temperature, reliability
from lightning_automl.metrics.classification import StageOutputs, classification_metrics
from lightning_automl.metrics.comparison import (
    PairedDifference,
    ResampledTTest,
    SampleDifference,
    corrected_resampled_t_test,
    difference_from_sample,
    paired_bootstrap,
)
from lightning_automl.metrics.intervals import (
    BootstrapInterval,
    Interval,
    bootstrap_interval,
    clopper_pearson,
    mean_recall_interval,
)
from lightning_automl.metrics.scores import SCORES, auroc_by_class, average_precision_by_class

__all__ = [
    "SCORES",
    "BootstrapInterval",
    "Interval",
    "PairedDifference",
    "PredictiveValues",
    "Rates",
    "Reliability",
    "ResampledTTest",
    "SampleDifference",
    "StageOutputs",
    "auroc_by_class",
    "average_precision_by_class",
    "bootstrap_interval",
    "classification_metrics",
    "clopper_pearson",
    "corrected_resampled_t_test",
    "difference_from_sample",
    "expected_calibration_error",
    "fit_temperature",
    "mean_recall_interval",
    "paired_bootstrap",
    "predictive_values",
    "rates",
    "reliability",
]
