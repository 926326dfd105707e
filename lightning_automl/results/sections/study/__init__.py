"""The sections of a study's page, one function each: record in, section out, or None where nothing is to be said."""

from collections.abc import Callable

from lightning_automl.results.page import Section
from lightning_automl.results.sections.study.architectures import architectures
from lightning_automl.results.sections.study.front import front
from lightning_automl.results.sections.study.population import population
from lightning_automl.results.sections.study.progress import cost, history, intermediate
from lightning_automl.results.sections.study.settings import commands, settings, versions
from lightning_automl.results.sections.study.space import importances, parallel, slices, space
from lightning_automl.results.sections.study.trials import best_trials, failures, retrained
from lightning_automl.results.sections.study.verdict import cautions, verdict
from lightning_automl.results.study import StudyRecord

__all__ = [
    "SECTIONS",
    "cautions",
    "commands",
    "cost",
    "failures",
    "history",
    "intermediate",
    "settings",
    "verdict",
    "versions",
]

#: In the order of the page.
SECTIONS: list[Callable[[StudyRecord], Section | None]] = [
    cautions,
    architectures,
    retrained,
    best_trials,
    front,
    population,
    history,
    importances,
    slices,
    parallel,
    intermediate,
    failures,
    cost,
    space,
    settings,
    versions,
    commands,
]
