"""The plan, what made the model, and how to repeat and to use it."""

import shlex
from typing import Any

from lightning_automl.results.page import Commands, Folded, Notes, Section, Table
from lightning_automl.results.sections.provenance import version_table
from lightning_automl.results.sections.strategy.words import stage_name
from lightning_automl.results.sections.wording import value_text
from lightning_automl.results.strategy import StrategyRecord, finite


def plan(record: StrategyRecord) -> Section | None:
    """What was planned, in its own sentences, and why some things were not."""
    if not record.plan:
        return None
    notes = [str(each) for each in record.plan.get("sentences") or ()]
    notes += [
        f"No {stage_name(str(key))}: {str(why).removesuffix('.')}."
        for key, why in (record.plan.get("why_not") or {}).items()
        if not any(str(why).removesuffix(".") in each for each in notes)
    ]
    settings = Table(["", ""], [[key, value_text(value)] for key, value in record.config.items()])
    blocks: list[Any] = [Notes(notes), Folded("What was asked for", settings)]
    return Section("Plan", blocks)


def versions(record: StrategyRecord) -> Section | None:
    """What has to be the same for the same numbers."""
    return version_table(record.environment)


def commands(record: StrategyRecord) -> Section:
    """How to go on or repeat, and how to use what there is."""
    directory = shlex.quote(str(record.directory))
    again = _command(record)
    if not record.finished:
        return Section("Commands", [Commands([f"{again} --dir {directory}    # goes on", *_use(record, directory)])])
    lines = _use(record, directory)
    budget = finite(record.config.get("budget"))
    lines += [
        f"{again} --dir {directory}-again",
        f"{_command(record, 2 * budget)} --dir {directory}    # continues with more time",
    ]
    return Section("Commands", [Commands(lines)])


def _use(record: StrategyRecord, directory: str) -> list[str]:
    if record.chosen is None or not record.model:
        return []
    return [
        f"lightning-automl classify {directory} new_images --out predictions.csv",
        f"lightning-automl export {directory} --format onnx",
    ]


def _command(record: StrategyRecord, budget: float | None = None) -> str:
    """The command line that this directory was given."""
    parts = ["lightning-automl auto", shlex.quote(str(record.config["auto"]))]
    for key, value in record.config.items():
        if key == "auto" or value is None or (key == "seed" and value == 0):
            continue
        if key == "budget":
            parts.append(f"--budget {time_text(finite(budget or value))}")
        else:
            parts.append(f"--{key} {shlex.quote(value_text(value))}")
    return " ".join(parts)


def time_text(seconds: float) -> str:
    """Seconds as the command line takes them: ``90s``, ``30m``, ``2h``."""
    for unit, letter in ((3600, "h"), (60, "m")):
        if seconds >= unit and seconds % unit == 0:
            return f"{int(seconds // unit)}{letter}"
    return f"{seconds:g}s"
