"""The sections of a run's page, one function each: evidence in, section out, or None where nothing is to be said."""

from collections.abc import Callable

from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Section
from lightning_automl.results.sections.adapters import adapters
from lightning_automl.results.sections.architecture import architecture, architecture_search, search_progress
from lightning_automl.results.sections.compression import compression
from lightning_automl.results.sections.data import data
from lightning_automl.results.sections.images import least_sure, most_wrong
from lightning_automl.results.sections.policy import augmentation
from lightning_automl.results.sections.predictions import calibration, confusion, recall, scores
from lightning_automl.results.sections.provenance import commands, versions
from lightning_automl.results.sections.training import configuration, cost, curves
from lightning_automl.results.sections.verdict import cautions, verdict

__all__ = ["SECTIONS", "verdict"]

#: In the order of the page.
SECTIONS: list[Callable[[Evidence], Section | None]] = [
    cautions,
    architecture_search,
    search_progress,
    scores,
    confusion,
    recall,
    calibration,
    most_wrong,
    least_sure,
    data,
    augmentation,
    architecture,
    curves,
    adapters,
    configuration,
    cost,
    compression,
    versions,
    commands,
]
