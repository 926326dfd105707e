"""Searches: a space of values, a sampler that chooses among them, and a score."""

from lightning_automl.search.records import best_trials, importances, pareto_front, write_records
from lightning_automl.search.spaces import Parameter, Space, differences

__all__ = [
    "Parameter",
    "Space",
    "best_trials",
    "differences",
    "importances",
    "pareto_front",
    "write_records",
]
