"""Samplers that Optuna lacks; they stand beside Optuna's own in a config."""

from lightning_automl.search.samplers.groupwise import GroupwiseSampler
from lightning_automl.search.samplers.population import PopulationSampler, lineage

__all__ = ["GroupwiseSampler", "PopulationSampler", "lineage"]
