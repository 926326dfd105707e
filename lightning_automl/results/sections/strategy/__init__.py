"""The sections of the page of `auto`, one function each: record in, section out, or None if nothing is to be said."""

from collections.abc import Callable, Sequence

from lightning_automl.results.page import Section
from lightning_automl.results.sections.strategy.activations import activations
from lightning_automl.results.sections.strategy.calibration import calibration
from lightning_automl.results.sections.strategy.cautions import cautions
from lightning_automl.results.sections.strategy.comparison import comparison
from lightning_automl.results.sections.strategy.cost import cost
from lightning_automl.results.sections.strategy.decisions import operating_point, unsure
from lightning_automl.results.sections.strategy.leaderboard import leaderboard
from lightning_automl.results.sections.strategy.models import models
from lightning_automl.results.sections.strategy.of_run import (
    augmentation,
    confusion,
    data,
    differing,
    least_sure,
    most_wrong,
    recall,
    scores,
)
from lightning_automl.results.sections.strategy.provenance import commands, plan, versions
from lightning_automl.results.sections.strategy.searched import architecture, importances, policy, slices
from lightning_automl.results.sections.strategy.training import curves
from lightning_automl.results.sections.strategy.verdict import verdict
from lightning_automl.results.strategy import StrategyRecord

__all__ = ["SECTIONS", "page", "verdict"]

#: In the order of the page.
SECTIONS: list[Callable[[StrategyRecord], Section | None]] = [
    cautions,
    leaderboard,
    models,
    comparison,
    scores,
    operating_point,
    unsure,
    confusion,
    recall,
    calibration,
    activations,
    most_wrong,
    least_sure,
    data,
    augmentation,
    policy,
    architecture,
    importances,
    slices,
    curves,
    cost,
    plan,
    differing,
    versions,
    commands,
]


def page(record: StrategyRecord) -> tuple[Sequence[str], list[Section]]:
    """The sentences and the sections of the page."""
    return verdict(record), [section for make in SECTIONS if (section := make(record)) is not None]
