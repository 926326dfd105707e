"""Write the result of a benchmark as JSON, and make the tables of the READMEs from it."""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_automl import rundir


def write(folder: str | Path, config: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> Path:
    """Write ``results/<config>--<hardware>--<date>.json`` below ``folder``, atomically.

    A second run of a day on the same hardware replaces the first.

    Args:
        folder: Folder of the benchmark, which has the README.
        config: What was run, in a word.
        rows: What was measured, one mapping of plain values a row.
        facts: Whatever else a reader needs: budget, data, number of repeats.

    Returns:
        Path of the file.
    """
    hardware = rundir.hardware() | {"cpu": _cpu()}
    name = "-".join([*sorted(set(hardware["gpus"])), hardware["cpu"], f"{hardware['cores']} cores"])
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = Path(folder) / "results" / f"{config}--{slug}--{time.strftime('%Y-%m-%d')}.json"
    content = {
        "config": config,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["python", "-m", *_module(), *map(_without_place, sys.argv[1:])],
        "commit": rundir.commit(),
        "versions": rundir.environment(seed=None)["versions"],
        "hardware": hardware,
        **facts,
        "rows": list(rows),
    }
    rundir.write_json(path, content)
    return path


def _without_place(argument: str) -> str:
    """A path of this machine by its name; anything else as it is."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def table(folder: str | Path, columns: Sequence[str]) -> str:
    """A Markdown table of these columns of all rows of all results of ``folder``, after config, hardware and date."""
    lines = ["| " + " | ".join(["config", "hardware", "date", *columns]) + " |", "|---" * (3 + len(columns)) + "|"]
    for path in sorted((Path(folder) / "results").glob("*.json")):
        content = json.loads(path.read_text())
        hardware = content["hardware"]
        device = ", ".join(sorted(set(hardware["gpus"]))) or f"{hardware['cpu']}, {hardware['cores']} cores"
        for row in content["rows"]:
            cells = [content["config"], device, content["date"][:10], *(_cell(row.get(column)) for column in columns)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else str(rundir.hardware()["cpu"])


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name] if spec is not None else sys.argv[:1]
