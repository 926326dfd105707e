"""Sections about how a run was trained: curves, settings, cost."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_automl.results.configuration import Setting, differing_settings
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Section, Table, Text, pictures
from lightning_automl.results.sections.wording import duration, hardware_text, value_text


def curves(evidence: Evidence) -> Section | None:
    """How loss and accuracy went."""
    epochs = evidence.run.epochs
    if not epochs:
        return None
    from lightning_automl.plots import learning_curves

    monitor = evidence.run.config.get("monitor", "val_accuracy")
    text = f"{epochs_done(evidence).capitalize()}."
    best = (evidence.run.summary or {}).get("metrics", {}).get("best_epoch")
    if best is not None:
        text += f" By {monitor} epoch {best + 1:.0f} is the best, and it is the one judged here."
    drawn = {metric: learning_curves(epochs, [metric]) for metric in ("loss", "balanced_accuracy")}
    return Section("Learning curves", [pictures(**drawn), Text(text)])


def configuration(evidence: Evidence) -> Section:
    """What was set otherwise than by default."""
    rows = [
        [each.key, "drawn above" if _is_genotype(each) else value_text(each.value), value_text(each.default)]
        for each in differing_settings(evidence.run.config)
    ]
    return Section("Configuration that differs from the defaults", [Table(["key", "value", "default"], rows)])


def _is_genotype(setting: Setting) -> bool:
    return isinstance(setting.value, Mapping) and setting.key.endswith(".genotype")


def cost(evidence: Evidence) -> Section | None:
    """Time, size and hardware."""
    run = evidence.run
    rows: list[list[Any]] = []
    network = run.environment.get("network", {})
    if network:
        rows.append(["network", network["class"]])
        rows.append(["parameters", f"{network['parameters']:,}"])
    if network.get("trained_parameters"):
        share = f"{network['trained_parameters']:,} ({network['trained_share']:.2%})"
        rows.append(["parameters that are trained", share])
    if network.get("flops"):
        rows.append(["operations an image", f"{network['flops'] / 1e6:,.1f} million (a multiply-add counts as two)"])
    if run.summary:
        rows.append(["time in all", duration(run.summary["seconds"])])
    seconds = [row["seconds"] for row in run.epochs if "seconds" in row]
    if seconds:
        rows.append(["time an epoch (median)", duration(float(np.median(seconds)))])
    if run.environment.get("hardware"):
        rows.append(["hardware", hardware_text(run.environment["hardware"])])
        rows.append(["precision", run.environment.get("precision", "")])
    return Section("Cost", [Table(["", ""], rows)]) if rows else None


def epochs_done(evidence: Evidence) -> str:
    """How far the run has come."""
    done = len(evidence.run.epochs)
    wanted = evidence.run.config["trainer"].get("max_epochs")
    return f"{done}{f' of {wanted}' if wanted and wanted > 0 else ''} epochs are done"
