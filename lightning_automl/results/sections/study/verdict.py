"""What a reader of a study's page has to know first: the verdict, and what limits it."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning_automl.results.control import Control
from lightning_automl.results.page import Notes, Section
from lightning_automl.results.sections.study.architectures import control_verdict
from lightning_automl.results.sections.wording import counted, duration, joined, metric, number
from lightning_automl.results.study import ParameterRecord, StudyRecord, TrialRecord

#: With fewer complete trials the best one says little of the space.
FEW = 10
#: From this share on failures are worth a look.
MANY_FAILURES = 0.2
#: A value in this share of a range, at either end, lies at its border.
BORDER = 0.05
#: Runs that tell the spread over seeds.
SEEDS = 5

_TOLD = {
    "COMPLETE": ("is complete", "are complete"),
    "PRUNED": ("was pruned", "were pruned"),
    "REFUSED": ("was refused before training", "were refused before training"),
    "FAIL": ("failed", "failed"),
    "LOST": ("was lost with its worker", "were lost with their workers"),
    "RUNNING": ("is running", "are running"),
    "WAITING": ("is waiting", "are waiting"),
}
#: Objectives that are the same whenever they are measured.
_EXACT = ("parameters", "flops")


def verdict(record: StudyRecord) -> list[str]:
    """What a reader has to know, in one to four sentences."""
    control = Control.of(record)
    if control is not None:  # the best one of all runs is not what such a study is for
        return [each for each in (_state(record), *control_verdict(control), _tested(record)) if each]
    best = _front(record) if record.several else _best(record)
    return [each for each in (_state(record), best, _gain(record), _tested(record)) if each]


def _state(record: StudyRecord) -> str:
    reason = (record.summary or {}).get("reason") or "not finished"
    beginning = ""
    if record.summary is not None and record.summary.get("status") == "failed":
        beginning = f"This search was not finished ({reason}): " if reason != "not finished" else ""
    if not record.finished and not beginning:
        beginning = "This search is not finished: "
    if not record.trials:
        return _sentence(f"{beginning}no trial has begun yet.")
    counts = Counter(trial.state for trial in record.trials)
    parts = [f"{counts[state]:,} {words[counts[state] != 1]}" for state, words in _TOLD.items() if counts[state]]
    many = len(record.trials) > 1
    if len(parts) == 1:  # one state of all
        parts = [f"{'all' if many else 'which'} {parts[0].split(' ', 1)[1]}"]
    noun = "segment" if record.population else "trial"
    members = len({trial.member for trial in record.trials} - {None})
    of = f" of the training of {counted(members, 'member')}" if record.population else ""
    seconds = math.fsum(trial.seconds for trial in record.trials)
    epochs = sum(trial.epochs for trial in record.trials)
    return _sentence(
        f"{beginning}of {counted(len(record.trials), noun)}{of}, {joined(parts)}; {'they' if many else 'it'} took "
        f"{counted(epochs, 'epoch')} and {duration(seconds)}."
    )


def _best(record: StudyRecord) -> str:
    winner, monitor = record.winner, record.monitors[0]
    if winner is None or not winner.usable:
        return "None is complete, so that there is no best one yet." if record.trials else ""
    sentence = f"The best {monitor} is {metric(winner.values[0])}, of trial {winner.number}"
    if monitor in _EXACT:
        return f"{sentence}."
    extreme, others = ("largest", "less") if record.maximize() else ("smallest", "more")
    count = len(record.usable)
    if count == 1:
        return f"{sentence}, the only complete one."
    return (
        f"{sentence}; chosen as the {extreme} of {count:,} noisy validation values it is optimistic: expect somewhat "
        f"{others} on new images."
    )


def _front(record: StudyRecord) -> str:
    chosen = [record.by_number[each] for each in record.best if record.by_number[each].usable]
    if not chosen:
        return "None is complete, so that there is no best one yet." if record.trials else ""
    text = (
        f"{len(chosen)} of {counted(len(record.usable), 'complete trial')} {_be(len(chosen))} on the Pareto front of "
        f"{joined(record.monitors)}: none is better in one of them without being worse in another"
    )
    ends = []
    for at, monitor in enumerate(record.monitors):
        values = [trial.values[at] for trial in chosen]
        trial = chosen[values.index(max(values) if record.maximize(at) else min(values))]
        rest = joined([f"{name} {metric(value)}" for name, value in _others(record, trial, at)])
        ends.append(f"the best value of {monitor} is {metric(trial.values[at])}, with {rest} (trial {trial.number})")
    return f"{text}. {_sentence('; '.join(ends))}; chosen among noisy validation values, they are optimistic."


def _others(record: StudyRecord, trial: TrialRecord, at: int) -> list[tuple[str, float]]:
    return [(name, trial.values[index]) for index, name in enumerate(record.monitors) if index != at]


def _gain(record: StudyRecord) -> str:
    """Whether the search was worth it."""
    trial, winner = record.unchanged, record.winner
    if trial is None or winner is None or not winner.usable:
        return ""
    name = f"The unchanged run (trial {trial.number})"
    if trial.state != "COMPLETE" or not trial.usable:
        words = {"PRUNED": f"was pruned after {counted(len(trial.steps), record.unit)}"}
        became = words.get(trial.state, _TOLD.get(trial.state, (trial.state.lower(),))[0])
        return f"{name} {became}, so that it is not known how much was gained."
    if trial.number == winner.number:
        return "No trial was better than the unchanged run, which is this one."
    best, own = metric(winner.values[0]), metric(trial.values[0])
    if best == own:
        return f"{name} has {own} too: nothing was gained."
    return f"{name} has {own}: the best is {_difference(winner.values[0], trial.values[0])} better, on validation."


def _difference(one: float, other: float) -> str:
    """Of the numbers as they are shown, so that a reader who subtracts them gets the same."""
    shown = [float(metric(each).replace(",", "")) for each in (one, other)]
    return metric(round(abs(shown[0] - shown[1]), 10))


def _tested(record: StudyRecord) -> str:
    """What the test split says."""
    found = record.retrain
    if not found or not found.get("metrics"):
        return ""
    name = test_metric(record.monitors[0], list(found["metrics"]))
    each, seeds = found["metrics"][name], len(found.get("runs") or found.get("seeds") or ())
    trial = found.get("trial")
    which = "" if trial is None or trial in record.best[:1] else f" the config of trial {trial}, the best one then,"
    value = metric(_float(each.get("mean")))
    if seeds < 2:
        return (
            f"Trained anew on train and val with one seed,{which or ' its config'} has a {name} of {value}; the test "
            "split was opened once, and the spread over seeds is not known."
        )
    low, high = _float(each.get("low")), _float(each.get("high"))
    interval = f" (95 % interval over the seeds {metric(low)} to {metric(high)})" if math.isfinite(low) else ""
    return (
        f"Trained anew on train and val with {seeds} seeds,{which or ' its config'} has a mean {name} of {value}"
        f"{interval}; the test split was opened {seeds} times, once a seed."
    )


def test_metric(monitor: str, names: Sequence[str]) -> str:
    """The test metric that belongs to a monitored one, else the accuracy, else the first."""
    wanted = f"test_{monitor.removeprefix('val_')}"
    return next((name for name in (wanted, "test_accuracy") if name in names), names[0])


def cautions(record: StudyRecord) -> Section:
    """What limits the numbers of this page."""
    folds = record.folds
    notes = []
    if record.trials and not record.population and 0 < len(record.usable) < FEW:
        complete = counted(len(record.usable), "complete trial")
        notes.append(f"There {_be(len(record.usable))} only {complete}: the best of so few says little of the space.")
    notes += _failures(record)
    notes += [_border(*each) for each in at_border(record)]
    directory = shlex.quote(str(record.directory))
    if record.best and record.retrain is None:
        notes.append(
            "Nothing was tested yet: all values are of validation images that the search has chosen by. "
            f"lightning-automl search --dir {directory} --retrain {SEEDS} trains the best config on train and val with "
            f"{SEEDS} seeds and opens the test split once for each."
        )
    elif record.retrain is not None and record.best and record.retrain.get("trial") not in (None, record.best[0]):
        notes.append(
            f"The test metrics are of trial {record.retrain['trial']}; the best one is {record.best[0]} by now."
        )
    opened, runs = int((record.summary or {}).get("test_opened") or 0), len((record.retrain or {}).get("runs") or ())
    if opened > runs > 0:
        notes.append(f"The test split was opened {opened} times in all: what was chosen in between has seen it.")
    if record.retrain is not None:
        notes.append(
            "The interval of the test metric tells how much seeds differ, not how another test split would. Choosing "
            "again by what the test split says would use it up."
        )
    if record.usable and record.unchanged is None and not record.population and Control.of(record) is None:
        notes.append("The unchanged run was not tried, so that it is not known whether the search gained anything.")
    spread = f"of {folds} folds" if folds else "of one seed"
    notes.append(f"Each value is {spread}: trials that differ by less than another seed would change are equally good.")
    notes.append("The numbers hold for images like these. This program is not a medical device.")
    return Section("To keep in mind", [Notes(notes)])


def _failures(record: StudyRecord) -> list[str]:
    ended = [trial for trial in record.trials if trial.state in ("COMPLETE", "PRUNED", "REFUSED", "FAIL")]
    notes = []
    for state, what in (("FAIL", "failed"), ("REFUSED", "had values that were refused before training")):
        found = [trial for trial in ended if trial.state == state]
        if len(found) < 2 or len(found) < MANY_FAILURES * len(ended):
            continue
        reason, times = commonest_reason(found)
        notes.append(f"{len(found)} of {len(ended)} trials {what}, most often ({times} times) with: {reason}.")
    return notes


def commonest_reason(trials: Sequence[TrialRecord]) -> tuple[str, int]:
    """The reason that most trials give, the first of equals, and how many do."""
    counts = Counter(short_reason(trial.reason) or "no reason was given" for trial in trials)
    return counts.most_common(1)[0]


def short_reason(reason: str) -> str:
    """Without the file to look into, which is another one for each trial."""
    return re.sub(r"\s*\(see [^()]*\)\s*$", "", reason).rstrip(".")


def at_border(record: StudyRecord) -> list[tuple[ParameterRecord, Any, str]]:
    """The parameters whose best value lies at an end of their range, with it and ``lower`` or ``upper``.

    That is within `BORDER` of the range, on its own scale, or for few whole numbers or steps at the very end.
    """
    winner, found = record.winner, []
    if winner is None:
        return []
    for name, value in winner.params.items():
        parameter = record.parameters.get(name)
        if parameter is None or parameter.low is None or parameter.high is None or parameter.low >= parameter.high:
            continue
        low, high, place = parameter.low, parameter.high, parameter.place(value)
        if parameter.log and low > 0:
            low, high, place = (math.log(each) if each > 0 else math.nan for each in (low, high, place))
        share = (place - low) / (high - low)
        if share <= BORDER or share >= 1 - BORDER:
            found.append((parameter, value, "lower" if share < 0.5 else "upper"))
    return found


def _border(parameter: ParameterRecord, value: Any, end: str) -> str:
    limit = parameter.low if end == "lower" else parameter.high
    assert limit is not None
    beyond = f"{'below' if end == 'lower' else 'above'} {number(limit)}"
    return (
        f"The best {parameter.label}, {number(value)}, lies at the {end} end of its range: if values {beyond} are "
        "possible, widen it and search again in another directory."
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
