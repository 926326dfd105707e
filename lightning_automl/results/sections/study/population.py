"""Population based training: the members, and the schedule of the best one."""

from typing import Any

from lightning_automl.results.page import Section, Text, pictures
from lightning_automl.results.sections.study.space import dimension
from lightning_automl.results.sections.wording import counted
from lightning_automl.results.study import StudyRecord, TrialRecord


def population(record: StudyRecord) -> Section | None:
    """How the members went, and which values the best weights were trained with."""
    shown = [trial for trial in record.trials if trial.member is not None and trial.state == "COMPLETE"]
    if record.several or not shown:
        return None
    from lightning_automl.plots import Segment, population_history, value_schedule

    winner = record.winner
    line = [] if winner is None else record.lineage(winner)
    leading = {trial.number for trial in line}
    segments = [
        Segment(_points(record, trial), _copied(record, trial), trial.number in leading)
        for trial in shown
        if _points(record, trial)
    ]
    history = population_history(segments, maximize=record.maximize(), name=record.monitors[0])
    members = len({trial.member for trial in shown})
    copies = sum(_copied(record, trial) for trial in shown)
    text = (
        f"{counted(members, 'member')}; {counted(copies, 'time')} one of the worst took over weights and values of one "
        "of the best, and went on with varied values (dashed)."
    )
    blocks: list[Any] = [pictures(population=history), Text(text)]
    schedules = {}
    for name, parameter in record.parameters.items():
        spans = [
            (_begin(record, trial), _end(record, trial), parameter.place(trial.params[name]))
            for trial in line
            if name in trial.params
        ]
        if spans:
            schedules[f"schedule_{name}"] = value_schedule(dimension(parameter), spans)
    if schedules and winner is not None:
        blocks += [
            Text(
                f"What was found is a schedule: the values with which the best weights (trial {winner.number}, member "
                f"{winner.member}) were trained, from the first epoch on. best.yaml trains with them anew."
            ),
            pictures(**schedules),
        ]
    blocks.append(
        Text(
            "Importances and slices are left out: the value of a segment hangs more on how long its weights had been "
            "trained than on the values of its parameters."
        )
    )
    return Section("Population", blocks)


def _end(record: StudyRecord, trial: TrialRecord) -> int:
    """Epochs that the weights were trained for at the end of a segment."""
    return trial.steps[-1][0] if trial.steps else sum(each.epochs for each in record.lineage(trial))


def _begin(record: StudyRecord, trial: TrialRecord) -> int:
    parent = record.trial(trial.parent)
    return 0 if parent is None else _end(record, parent)


def _last(record: StudyRecord, trial: TrialRecord) -> list[tuple[float, float]]:
    if trial.steps:
        return [trial.steps[-1]]
    return [(_end(record, trial), trial.values[0])] if trial.values else []


def _points(record: StudyRecord, trial: TrialRecord) -> list[tuple[float, float]]:
    """The reports of a segment, after the last one of the segment before it."""
    parent = record.trial(trial.parent)
    before = [] if parent is None else _last(record, parent)
    return [*before, *(trial.steps or _last(record, trial))]


def _copied(record: StudyRecord, trial: TrialRecord) -> bool:
    parent = record.trial(trial.parent)
    return parent is not None and parent.member != trial.member
