"""Sections about what made a run, and how to use what it left."""

import shlex
from collections.abc import Mapping
from typing import Any

from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Commands, Section, Table, Text


def versions(evidence: Evidence) -> Section | None:
    """What has to be the same for the same numbers."""
    return version_table(evidence.run.environment)


def version_table(environment: Mapping[str, Any]) -> Section | None:
    """The versions of an ``environment.json``, or None when it is empty."""
    if not environment:
        return None
    rows = [[name, version] for name, version in environment.get("versions", {}).items()]
    rows += [["commit", environment.get("commit") or "unknown"], ["seed", environment.get("seed")]]
    rows += [["started", environment.get("started", "")]]
    blocks: list[Any] = [Table(["", ""], rows)]
    if environment.get("continued"):
        times = len(environment["continued"])
        blocks.append(Text(f"The run was continued {times} time{'s' * (times > 1)}."))
    return Section("Versions", blocks)


def commands(evidence: Evidence) -> Section:
    """How to repeat the run and to use what it left."""
    directory = shlex.quote(str(evidence.run.directory))
    lines = [f"lightning-automl fit --config {directory}/config.yaml --dir {directory}-again"]
    if evidence.run.best_checkpoint.exists():
        lines += [
            f"lightning-automl export {directory} --format onnx",
            f"lightning-automl classify {directory} new_images --out labels.csv",
        ]
    if not evidence.run.finished:
        lines.insert(0, f"lightning-automl fit --dir {directory}    # goes on")
    return Section("Commands", [Commands(lines)])
