"""What each stage cost, as planned and as it was."""

import math
from typing import Any

from lightning_automl.results.page import Section, Table, Text
from lightning_automl.results.sections.strategy.words import stage_name, time_words
from lightning_automl.results.sections.wording import counted, hardware_text
from lightning_automl.results.strategy import StrategyRecord, finite


def cost(record: StrategyRecord) -> Section | None:
    """Planned and real seconds of each stage."""
    planned = {str(each["name"]): finite(each.get("seconds")) for each in record.plan.get("stages") or ()}
    real = {str(name): finite(seconds) for name, seconds in (record.progress.get("stages") or {}).items()}
    if not planned and not real:
        return None
    rows: list[list[Any]] = [
        [stage_name(name), _time(planned.get(name)), _time(real.get(name)), _what(record, name)]
        for name in _order(planned, real)
    ]
    rows.append(
        [
            "in all",
            _time(math.fsum(each for each in planned.values() if math.isfinite(each))),
            _time(record.seconds),
            "",
        ]
    )
    blocks: list[Any] = [Table(["stage", "planned", "taken", ""], rows)]
    said = []
    if math.isfinite(record.budget):
        said.append(f"The budget was {time_words(record.budget)}.")
    workers = record.measured.get("workers")
    if workers:
        said.append(f"Wall time; {counted(int(workers), 'training')} ran at once.")
    if record.environment.get("hardware"):
        said.append(f"On {hardware_text(record.environment['hardware'])}.")
    blocks.append(Text(" ".join(said)))
    if (arms := _arms(record)) is not None:
        blocks.append(arms)
    return Section("Cost", blocks)


def _order(planned: dict[str, float], real: dict[str, float]) -> list[str]:
    """Those that have run in their order, then those still to come in that of the plan."""
    first = [name for name in real if name not in planned]
    return [*first, *planned] if planned else first


def _time(seconds: float | None) -> str:
    return "" if seconds is None or not math.isfinite(seconds) else time_words(seconds)


def _what(record: StrategyRecord, stage: str) -> str:
    if stage == "selection" and record.candidates:
        runs, epochs = (
            sum(len(each.folds) for each in record.candidates),
            sum(each.epochs for each in record.candidates),
        )
        return (
            f"{counted(len(record.candidates), 'candidate')}, {counted(runs, 'training')}, {counted(epochs, 'epoch')}"
        )
    if stage == "comparison" and record.comparison.get("values"):
        return counted(sum(map(len, record.comparison["values"].values())), "training")
    if stage == "final" and record.chosen is not None:
        seeds = [each for model in (record.chosen, record.simple) if model is not None for each in model.seeds]
        return f"{counted(len(seeds), 'training')}, {counted(sum(each.epochs for each in seeds), 'epoch')}"
    return ""


def _arms(record: StrategyRecord) -> Table | None:
    """What a training of each arm was measured to cost."""
    rows = []
    for name, each in (record.measured.get("arms") or {}).items():
        parameters = each.get("parameters")
        rows.append(
            [
                record.arm_titles.get(str(name), str(name)),
                f"{int(parameters):,}" if parameters else "",
                _time(each.get("epoch_seconds")),
                _time(each.get("overhead_seconds")),
            ]
        )
    return Table(["arm", "parameters", "an epoch", "a training without its epochs"], rows) if rows else None
