"""How a study went, and what it cost."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from lightning_automl.results.page import Section, Table, Text, pictures
from lightning_automl.results.sections.wording import counted, duration, hardware_text, percent
from lightning_automl.results.study import StudyRecord, TrialRecord


def history(record: StudyRecord) -> Section | None:
    """The best value so far, against trials and against epochs."""
    drawn = [trial for trial in record.trials if trial.state in ("COMPLETE", "PRUNED") and trial.values]
    if not drawn:
        return None
    from lightning_automl.plots import optimisation_history

    figures = {}
    for at, monitor in enumerate(record.monitors):
        figures[f"history{at}"] = optimisation_history(
            [trial.number for trial in drawn],
            [trial.values[at] for trial in drawn],
            [trial.state == "COMPLETE" for trial in drawn],
            maximize=record.maximize(at),
            name=monitor,
        )
    spent = epochs_spent(record)
    if not record.several and any(spent.values()):
        ended = sorted(drawn, key=lambda trial: (spent[trial.number], trial.number))
        figures["history_epochs"] = optimisation_history(
            [spent[trial.number] for trial in ended],
            [trial.values[0] for trial in ended],
            [trial.state == "COMPLETE" for trial in ended],
            maximize=record.maximize(),
            name=record.monitors[0],
            along="epochs spent",
        )
    return Section("How the best value grew", [pictures(**figures)])


def epochs_spent(record: StudyRecord) -> dict[int, int]:
    """Epochs that had been trained, by all trials, when each one ended, by number; those not ended count at the end."""
    order = sorted(record.trials, key=lambda trial: (trial.ended is None, _moment(trial), trial.number))
    total, spent = 0, {}
    for trial in order:
        total += trial.epochs
        spent[trial.number] = total
    return spent


def _moment(trial: TrialRecord) -> float:
    return trial.ended.timestamp() if trial.ended is not None else math.inf


def intermediate(record: StudyRecord) -> Section | None:
    """How the trials went while they were trained."""
    if record.several or record.population:
        return None
    drawn = [trial for trial in record.trials if trial.steps and trial.state != "LOST"]
    if not drawn or all(len(trial.steps) < 2 for trial in drawn):
        return None
    from lightning_automl.plots import intermediate_values

    winner = record.winner
    figure = intermediate_values(
        [trial.steps for trial in drawn],
        [trial.state.lower() for trial in drawn],
        maximize=record.maximize(),
        name=record.monitors[0],
        unit=record.unit,
        best=next((at for at, trial in enumerate(drawn) if winner is not None and trial.number == winner.number), None),
    )
    pruned = len(record.of_state("PRUNED"))
    blocks: list[Any] = [pictures(intermediate=figure)]
    if pruned:
        blocks.append(
            Text(f"{counted(pruned, 'trial')} {'was' if pruned == 1 else 'were'} pruned, where the crosses are.")
        )
    return Section(f"Each trial over its {record.unit}s", blocks)


@dataclass(frozen=True)
class Spending:
    """Epochs of a study.

    Attributes:
        total: Trained in all.
        pruned: Of them for pruned trials, and for those that these continued.
        wasted: Of them for trials that failed, and lost ones that nothing continued.
        longest: Of the complete trial that was trained longest.
        saved: That pruned trials would have been trained for in addition, had they run as long as that one.
    """

    total: int
    pruned: int
    wasted: int
    longest: int
    saved: int


def spending(record: StudyRecord) -> Spending:
    """What epochs were spent on, and how many pruning has saved."""
    continued = {trial.retry_of for trial in record.trials}
    pruned = [record.trained(trial) for trial in record.of_state("PRUNED")]
    wasted = [trial for trial in record.of_state("FAIL", "LOST") if trial.number not in continued]
    longest = max((record.trained(trial) for trial in record.of_state("COMPLETE")), default=0)
    return Spending(
        total=sum(trial.epochs for trial in record.trials),
        pruned=sum(pruned),
        wasted=sum(map(record.trained, wasted)),
        longest=longest,
        saved=sum(max(0, longest - epochs) for epochs in pruned),
    )


def cost(record: StudyRecord) -> Section | None:
    """Epochs, time and hardware."""
    if not record.trials:
        return None
    spent = spending(record)
    rows: list[list[Any]] = []
    if spent.total:
        rows.append(["epochs in all", f"{spent.total:,}"])
        if spent.pruned:
            rows.append(["of them for pruned trials", f"{spent.pruned:,} ({percent(spent.pruned / spent.total)})"])
        if spent.wasted:
            rows.append(
                ["of them for failed or lost trials", f"{spent.wasted:,} ({percent(spent.wasted / spent.total)})"]
            )
    if spent.saved:
        rows.append(["epochs saved by pruning", f"{spent.saved:,}"])
    rows.append(["time of all trials together", duration(math.fsum(trial.seconds for trial in record.trials))])
    times = [trial.seconds for trial in record.of_state("COMPLETE") if trial.seconds]
    if times:
        rows.append(["time of a complete trial (median)", duration(statistics.median(times))])
    if record.summary is not None and record.summary.get("seconds"):
        rows.append(["time of the search, retraining included", duration(float(record.summary["seconds"]))])
    if record.environment.get("hardware"):
        rows.append(["hardware", hardware_text(record.environment["hardware"])])
    blocks: list[Any] = [Table(["", ""], rows)]
    if spent.saved:
        blocks.append(
            Text(
                f"Saved against a search without pruning, in which every pruned trial had run for "
                f"{counted(spent.longest, 'epoch')}, as the longest complete one did."
            )
        )
    return Section("Cost", blocks)
