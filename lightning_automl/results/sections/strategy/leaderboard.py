"""All arms beside each other: what was reached, at what cost, and which were not run and why."""

import json
import math
from dataclasses import dataclass
from typing import Any

from lightning_automl.results.page import Folded, Section, Table, Text, pictures
from lightning_automl.results.sections.strategy.words import cell, metric_name, time_words, unbroken
from lightning_automl.results.sections.wording import counted, number, with_interval
from lightning_automl.results.strategy import CandidateRecord, StrategyRecord

#: What was searched beside the arms, by its key in the plan.
_SEARCHED = {"policy_search": "searched augmentation policy", "architecture_search": "searched architecture"}
_PC_DARTS = "pcdarts"
_STATES = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed"}


@dataclass(frozen=True)
class Row:
    """An arm on the leaderboard.

    Attributes:
        title: Of the candidate, or of the arm.
        candidate: What is shown of it; None without a value.
        note: What is said in place of one.
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
    known = [row for row in rows if row.candidate is not None]
    for row in rows:
        each = row.candidate
        if each is None:
            standings.append(Standing(row.title, chosen=row.chosen, note=row.note))
        else:
            pruned, values = each.state != "COMPLETE", list(each.folds.values())
            standings.append(Standing(row.title, each.mean, each.low, each.high, values, row.chosen, pruned))
    blocks: list[Any] = []
    if known:
        mark = "chosen" if record.chosen is not None else "leads so far"
        figure = draw(standings, metric=metric_name(record.metric), maximize=record.maximize, mark=mark)
        head = ["", f"mean {metric_name(record.metric)}", "each fold", "folds", "epochs", "time", ""]
        blocks += [
            pictures(leaderboard=figure),
            Table(head, [_cells(record, row) for row in known]),
            Text(_text(record)),
        ]
    if len(known) < len(rows):
        blocks.append(Table(["without a value", ""], [[row.title, row.note] for row in rows if row.candidate is None]))
    if record.candidates:
        name = f"All {counted(len(record.candidates), 'candidate')}"
        blocks.append(Folded(name if len(record.candidates) > 1 else "The one candidate", _all(record)))
    return Section("Leaderboard", blocks)


def rows_of(record: StrategyRecord) -> list[Row]:
    """One row an arm, and one more for the chosen and the simple candidate where these are not the best of theirs.

    Arms that are planned, or could have been, are never left out: those without a value say why.
    """
    planned = [str(each["name"]) for each in record.plan.get("arms") or ()]
    arms = list(dict.fromkeys([*planned, *(each.arm for each in record.candidates)]))
    shown, without = list(record.challengers), []
    for arm in arms:
        own = [each for each in record.candidates if each.arm == arm]
        best = max(own, key=lambda each: _rank(record, each), default=None)
        shown += [each for each in own if each is best or each.key in (record.leader, record.simple_key)]
        if best is None and not any(each.arm == arm for each in record.challengers):
            without.append(Row(record.arm_titles.get(arm, arm), note=_missing(record)))
    shown.sort(key=lambda each: _rank(record, each), reverse=True)
    known = [Row(each.title, each, chosen=each.key == record.leader) for each in shown if math.isfinite(each.mean)]
    failed = [_without(record, each) for each in shown if not math.isfinite(each.mean)]
    return [*known, *failed, *without, *_not_run(record, arms)]


def _without(record: StrategyRecord, each: CandidateRecord) -> Row:
    """A row of a candidate that has no value; the only one is chosen without."""
    chosen = each.key == record.leader
    state = "chosen" if chosen else _STATES["FAIL"] if each.state == "FAIL" else "not judged"
    return Row(each.title, note=f"{state}: {each.reason or 'no reason is known'}", chosen=chosen)


def _rank(record: StrategyRecord, each: CandidateRecord) -> tuple[bool, bool, float, int]:
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
        if name not in _SEARCHED:  # the plan says of those whether and why not
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
    """Why a search has no row of its own among those with a value; "" if it has one."""
    kind = key.removesuffix("_search")
    listed = any(each.get("kind") == kind for each in record.comparison.get("challengers") or ())
    if listed or record.comparison.get("kind") == kind:
        return ""
    cut = (record.progress.get("cuts") or {}).get(key)
    if cut:
        return f"not run: {cut}"
    if record.plan.get(key):
        return "not run: the search has found nothing" if record.comparison else "not searched yet"
    why = (record.plan.get("why_not") or {}).get(key)
    return f"not run: {why or 'no reason is known'}"


def _cells(record: StrategyRecord, row: Row) -> list[Any]:
    each = row.candidate
    assert each is not None
    marks = [_STATES.get(each.state, each.state)]
    if each.key == record.simple_key:
        marks.append("the simple arm")
    if row.chosen:
        marks.insert(0, "chosen" if record.chosen is not None else "leads")
    return [
        row.title,
        with_interval((each.mean, each.low, each.high)),
        ", ".join(f"{value:.3f}" for value in each.folds.values()),
        _folds(record, each) if each.folds else "",
        f"{each.epochs:,}" if each.epochs else "",
        time_words(each.seconds) if math.isfinite(each.seconds) else "",
        ", ".join(marks),
    ]


def _folds(record: StrategyRecord, each: CandidateRecord) -> str:
    wanted = len(record.plan.get("search_folds") or record.look.get("search_folds") or each.folds)
    return unbroken(f"{len(each.folds)} of {wanted}")


def _text(record: StrategyRecord) -> str:
    folds = record.plan.get("search_folds") or record.look.get("search_folds") or ()
    return (
        f"Each value is the {metric_name(record.metric)} after the last epoch on images of train and validation that "
        f"the training had not seen, one training a fold ({counted(len(folds), 'fold')}), the same splits and one seed "
        "for every arm. Intervals are Student's over the folds; what was stopped early has fewer folds and is not "
        "comparable. Being the best of several noisy values flatters: the scores on the test split are what counts."
    )


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
                time_words(each.seconds),
                f"{state}: {each.reason}" if each.reason else state,
            ]
        )
    return Table(head, rows)


def _values(each: CandidateRecord) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {_value(value)}" for name, value in each.values.items())


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
