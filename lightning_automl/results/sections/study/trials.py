"""Tables of single trials: the best ones, those that failed, and the runs of the best config with several seeds."""

import math
from typing import Any

from lightning_automl.results.page import Folded, Section, Table, Text
from lightning_automl.results.sections.study.space import choice_text
from lightning_automl.results.sections.study.verdict import commonest_reason, short_reason
from lightning_automl.results.sections.wording import counted, duration, metric, number
from lightning_automl.results.study import StudyRecord, TrialRecord

_BEST = 10
_FAILURES = 20


def best_trials(record: StudyRecord) -> Section | None:
    """The best ten with their values."""
    chosen = record.ranked[:_BEST]
    if not chosen:
        return None
    names = [name for name in record.parameters if any(name in trial.params for trial in chosen)]
    epochs = "until epoch" if record.population else f"{record.unit}s"
    head = ["trial", *record.monitors, epochs, "time", *(record.parameters[name].label for name in names)]
    rows = [
        [
            f"{trial.number}{_unbroken(' *') * (record.several and trial.number in record.best)}",
            *map(metric, trial.values),
            _length(record, trial),
            _unbroken(duration(trial.seconds)),
            *(_cell(record, trial, name) for name in names),
        ]
        for trial in chosen
    ]
    blocks: list[Any] = [Table(head, rows)]
    text = f"All {counted(len(record.trials), 'trial')} with their exact values are in trials.csv."
    if record.several:
        text = f"* on the Pareto front, ordered by {record.monitors[0]}. {text}"
    return Section("Best trials", [*blocks, Text(text)])


def _length(record: StudyRecord, trial: TrialRecord) -> int:
    if record.unit == "fold":
        return len(trial.steps)
    return trial.steps[-1][0] if record.population and trial.steps else record.trained(trial)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _cell(record: StudyRecord, trial: TrialRecord, name: str) -> str:
    if name not in trial.params:
        return "-"
    value = trial.params[name]
    parameter = record.parameters[name]
    text = number(value) if isinstance(value, float) else choice_text(parameter, value)
    return _unbroken(text) if len(text) < 16 else text


def failures(record: StudyRecord) -> Section | None:
    """Which trials gave nothing, why, and where to read more."""
    found = record.of_state("FAIL", "REFUSED", "LOST")
    if not found:
        return None
    words = {"FAIL": "failed", "REFUSED": "refused", "LOST": "lost"}
    rows = [
        [trial.number, words[trial.state], short_reason(trial.reason) or "no reason was given", _log(record, trial)]
        for trial in found
    ]
    reason, times = commonest_reason(found)
    blocks: list[Any] = []
    if times > 1:
        blocks.append(Text(f"The commonest reason, {times} of {len(found)}: {reason}."))
    if record.of_state("LOST"):
        text = "A lost trial ended with its worker or its machine, not by itself: it does not count, and is repeated."
        blocks.append(Text(text))
    head = ["trial", "", "reason", "log"]
    blocks.append(Table(head, rows[:_FAILURES]))
    if len(rows) > _FAILURES:
        blocks.append(Folded(f"{len(rows) - _FAILURES} more", Table(head, rows[_FAILURES:])))
    return Section("Trials that gave no value", blocks)


def _log(record: StudyRecord, trial: TrialRecord) -> str:
    if not trial.directory:
        return ""
    for name in ("output.txt", "log.txt"):
        if (record.directory / trial.directory / name).exists():
            return f"{trial.directory}/{name}"
    return trial.directory


def retrained(record: StudyRecord) -> Section | None:
    """The test metrics of the best config over seeds."""
    found = record.retrain
    if not found or not found.get("metrics"):
        return None
    runs = found.get("runs") or []
    many = len(runs) > 1
    head = ["", *(["mean", "95 % interval", "deviation"] * many), *(_unbroken(f"seed {run['seed']}") for run in runs)]
    rows = []
    for name, each in found["metrics"].items():
        mean, low, high, std = (_short(each.get(key)) for key in ("mean", "low", "high", "std"))
        summary = [mean, _unbroken(f"{low} to {high}") if low else "", std] if many else []
        rows.append([name, *summary, *(_short(run["metrics"].get(name)) for run in runs)])
    text = "Trained on train and val together, with the last epoch's weights, since no split is left to choose one by. "
    text += "The intervals are Student's, over the seeds." if many else ""
    trial = found.get("trial")
    title = f"Test of the best config{'' if trial is None else f' (trial {trial})'}"
    return Section(title, [Table(head, rows), Text(text)])


def _short(value: Any) -> str:
    return "" if value is None or not math.isfinite(value) else metric(value)
