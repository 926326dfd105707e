"""All arms beside each other: what was reached, at what cost, and which were not run and why."""

import json
import math
from dataclasses import dataclass
from typing import Any

from lightning_automl.results.page import Folded, Section, Table, Text, pictures
from lightning_automl.results.sections.strategy.words import cell, ends, metric_name
from lightning_automl.results.sections.wording import counted, duration, number
from lightning_automl.results.strategy import CandidateRecord, StrategyRecord

#: What was searched beside the arms, by its key in the plan.
_SEARCHED = {"policy_search": "searched augmentation policy", "architecture_search": "searched architecture"}
_PC_DARTS = "pcdarts"
_STATES = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed"}


@dataclass(frozen=True)
class Row:
    """An arm on the leaderboard.

    Attributes:
        title: Of the arm.
        candidate: What is shown of it, or None.
        note: What is said in place of a value.
        chosen: Whether it is what was chosen, or leads so far.
    """

    title: str
    candidate: CandidateRecord | None = None
    note: str = ""
    chosen: bool = False


def leaderboard(record: StrategyRecord) -> Section | None:
    """The best candidate of each arm, the chosen one marked; all candidates on a click."""
    rows = rows_of(record)
    if not rows:
        return None
    from lightning_automl.plots import Standing
    from lightning_automl.plots import leaderboard as draw

    standings = []
    for row in rows:
        each = row.candidate
        if each is None or not math.isfinite(each.mean):
            standings.append(Standing(row.title, note=row.note))
            continue
        name = f"{row.title}: {each.words}"
        pruned = each.state != "COMPLETE"
        values = list(each.folds.values())
        standings.append(Standing(name, each.mean, each.low, each.high, values, row.chosen, pruned))
    figure = draw(standings, metric=metric_name(record.metric), maximize=record.maximize)
    blocks: list[Any] = [pictures(leaderboard=figure), _table(record, rows), Text(_text(record, rows))]
    if record.candidates:
        name = f"All {counted(len(record.candidates), 'candidate')}"
        blocks.append(Folded(name if len(record.candidates) > 1 else "The one candidate", _all(record)))
    return Section("Leaderboard", blocks)


def rows_of(record: StrategyRecord) -> list[Row]:
    """One row an arm, and one more for the chosen and the simple candidate where these are not the best of theirs.

    Arms that are planned, or could have been, are never left out: those without a value say why.
    """
    chosen = record.leader
    planned = [str(each["name"]) for each in record.plan.get("arms") or ()]
    arms = list(dict.fromkeys([*planned, *(each.arm for each in record.candidates)]))
    known, without = [], []
    for arm in arms:
        title = record.arm_titles.get(arm, arm)
        own = [each for each in record.candidates if each.arm == arm]
        best = max(own, key=lambda each: _rank(record, each), default=None)
        for each in own:
            if math.isfinite(each.mean) and (each is best or each.key in (chosen, record.simple_key)):
                known.append(Row(title, each, chosen=each.key == chosen))
        if best is None:
            without.append(Row(title, note=_missing(record)))
        elif not math.isfinite(best.mean):
            without.append(Row(title, best, note=f"{_STATES.get(best.state, best.state)}: {best.reason or 'no value'}"))
    known.sort(key=lambda row: _rank(record, row.candidate), reverse=True)
    return [*known, *without, *_not_run(record, arms)]


def _rank(record: StrategyRecord, each: CandidateRecord | None) -> tuple[bool, bool, float, int]:
    assert each is not None
    sign = 1 if record.maximize else -1
    mean = sign * each.mean if math.isfinite(each.mean) else -math.inf
    return math.isfinite(each.mean), each.state == "COMPLETE", mean, -each.number


def _missing(record: StrategyRecord) -> str:
    cut = record.selection.get("cut") or (record.progress.get("cuts") or {}).get("selection")
    if cut:
        return f"not run: {cut}"
    return "not run: no candidate of it was judged" if record.comparison or record.finished else "not judged yet"


def _not_run(record: StrategyRecord, arms: list[str]) -> list[Row]:
    reasons: dict[str, tuple[str, str]] = {}
    for name, why in (record.measured.get("not_run") or {}).items():
        reasons[str(name)] = record.arm_titles.get(str(name), str(name)), str(why)
    for each in record.plan.get("not_run") or ():
        reasons[str(each["name"])] = (
            str(each.get("title") or each["name"]),
            str(each.get("why") or "no reason is known"),
        )
    found = [Row(title, note=f"not run: {why}") for name, (title, why) in reasons.items() if name not in arms]
    for key, title in _SEARCHED.items():
        if key == "architecture_search" and _PC_DARTS in (*arms, *reasons):
            continue
        if record.plan and (note := _searched(record, key)):
            found.append(Row(title, note=note))
    return found


def _searched(record: StrategyRecord, key: str) -> str:
    """What became of a search whose result is not among the candidates."""
    kind = key.removesuffix("_search")
    if record.comparison.get("kind") == kind and record.comparison.get("searched"):
        return (
            "" if record.candidate(record.comparison["searched"]) else "judged by the comparison below, on other folds"
        )
    if any(each.policy == "searched" for each in record.candidates) and kind == "policy":
        return ""
    cut = (record.progress.get("cuts") or {}).get(key)
    if cut:
        return f"not run: {cut}"
    if record.plan.get(key):
        return "found, and not compared" if record.comparison or record.finished else "not searched yet"
    why = (record.plan.get("why_not") or {}).get(key)
    return f"not run: {why or 'no reason is known'}"


def _table(record: StrategyRecord, rows: list[Row]) -> Table:
    name = metric_name(record.metric)
    head = ["arm", "candidate", f"mean {name}", "95 % interval", "each fold", "folds", "epochs", "time", ""]
    return Table(head, [_cells(record, row) for row in rows])


def _cells(record: StrategyRecord, row: Row) -> list[Any]:
    each = row.candidate
    if each is None or not math.isfinite(each.mean):
        return [row.title, row.note, *[""] * 7]
    marks = [_STATES.get(each.state, each.state)]
    if each.key == record.simple_key:
        marks.append("the simple arm")
    if row.chosen:
        marks.insert(0, "chosen" if record.chosen is not None else "leads")
    return [
        row.title,
        each.words,
        cell(each.mean),
        ends(each.low, each.high),
        ", ".join(map(cell, each.folds.values())),
        _folds(record, each),
        f"{each.epochs:,}",
        duration(each.seconds),
        ", ".join(marks),
    ]


def _folds(record: StrategyRecord, each: CandidateRecord) -> str:
    wanted = len(record.plan.get("search_folds") or record.look.get("search_folds") or each.folds)
    return f"{len(each.folds)} of {wanted}"


def _text(record: StrategyRecord, rows: list[Row]) -> str:
    folds = record.plan.get("search_folds") or record.look.get("search_folds") or ()
    text = (
        f"Each value is the {metric_name(record.metric)} after the last epoch on images of train and validation that "
        f"the training had not seen, one training a fold ({counted(len(folds), 'fold')}), the same splits and one seed "
        "for every arm. Intervals are Student's over the folds; what was stopped early has fewer folds and is not "
        "comparable. Being the best of several noisy values flatters: compare the test scores below."
    )
    if any("not run" in row.note for row in rows):
        text += " Arms that were not run are listed with the reason."
    return text


def _all(record: StrategyRecord) -> Table:
    head = ["", "arm", "augmentation", "values", f"mean {metric_name(record.metric)}", "folds", "epochs", "time", ""]
    rows = []
    for each in record.candidates:
        state = _STATES.get(each.state, each.state)
        rows.append(
            [
                each.number,
                record.arm_titles.get(each.arm, each.arm),
                each.policy_name,
                "default" if each.default else _values(each),
                cell(each.mean),
                len(each.folds),
                f"{each.epochs:,}",
                duration(each.seconds),
                f"{state}: {each.reason}" if each.reason else state,
            ]
        )
    return Table(head, rows)


def _values(each: CandidateRecord) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {_value(value)}" for name, value in each.values.items())


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
