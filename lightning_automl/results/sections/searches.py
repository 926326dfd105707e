"""What pages of all searches say of their settings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_automl.results.page import Folded, Section, Table
from lightning_automl.results.sections.wording import value_text
from lightning_automl.rundir import flatten


def settings_section(rows: Sequence[Sequence[str]], own: Mapping[str, Any], run: Any, about_run: str) -> Section:
    """All settings of a search, and on a click those of its run.

    Args:
        rows: What to say first: key and text.
        own: Settings of the search.
        run: Its fit config, or the name of one.
        about_run: What to call the run.
    """
    table = [*rows, *([key, _text(value)] for key, value in flatten(dict(own)).items())]
    blocks: list[Any] = [Table(["key", "value"], table)]
    if isinstance(run, Mapping):
        of_run = Table(["key", "value"], [[key, _text(value)] for key, value in flatten(dict(run)).items()])
        blocks.append(Folded(about_run, of_run))
    elif run is not None:
        table.append(["run", str(run)])
    return Section("Settings of the search", blocks)


def _text(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value_text(value)
