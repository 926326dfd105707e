"""A study directory, read back: what a search has written of its trials, without the storage it came from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml

from lightning_automl.rundir import UserError, read_json

#: The order in which states are told. LOST are trials that ended with their worker, REFUSED those not trained at all.
STATES = ("COMPLETE", "PRUNED", "REFUSED", "FAIL", "LOST", "RUNNING", "WAITING")


@dataclass(frozen=True)
class TrialRecord:
    """What is known of one trial.

    Attributes:
        number: Of the trial, from 0.
        state: One of `STATES`.
        values: One an objective, NaN where it is not finite; of a pruned trial its last report; empty for none.
        params: By name, as the study has them.
        steps: Reports ``(epochs or folds done, value)``, oldest first.
        epochs: Trained for this trial; those of the one that it continues not included.
        seconds: Wall time.
        reason: Why it failed or was pruned, or "".
        directory: Of its files, relative to the study's, or "".
        started: When it began, or None.
        ended: When it ended, or None.
        retry_of: Number of the lost trial that it continues, or None.
        member: Whose segment it is in population based training, or None.
        parent: The trial from whose weights it started, or None.
        metrics: Further results.
    """

    number: int
    state: str
    values: tuple[float, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[tuple[int, float], ...] = ()
    epochs: int = 0
    seconds: float = 0.0
    reason: str = ""
    directory: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    retry_of: int | None = None
    member: int | None = None
    parent: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of ``trials`` in ``study.json``."""
        state = str(entry["state"])
        if entry.get("lost"):
            state = "LOST"
        elif entry.get("infeasible"):
            state = "REFUSED"
        return cls(
            int(entry["number"]),
            state,
            tuple(_number(value) for value in entry.get("values") or ()),
            dict(entry.get("params") or {}),
            tuple((int(step), _number(value)) for step, value in entry.get("intermediate") or ()),
            int(entry.get("epochs") or 0),
            float(entry.get("seconds") or 0.0),
            str(entry.get("reason") or ""),
            str(entry.get("directory") or ""),
            _time(entry.get("started")),
            _time(entry.get("ended")),
            _whole(entry.get("retry_of")),
            _whole(entry.get("member")),
            _whole(entry.get("parent")),
            dict(entry.get("metrics") or {}),
        )

    @property
    def usable(self) -> bool:
        """Whether it is complete, with finite values."""
        return self.state == "COMPLETE" and bool(self.values) and all(map(math.isfinite, self.values))


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter of the space, as far as a page shows it.

    Attributes:
        name: What the study calls it.
        label: Short, and unlike those of the others.
        path: Where it is in the run's config.
        kind: ``float``, ``int`` or ``choice``.
        low: The lower end of a range; None if it is not known.
        high: The upper end.
        log: Whether the range is searched on a logarithmic scale.
        step: Of the range, or None.
        choices: Of a choice, as the study has them.
        when: The values of other parameters with which it exists.
    """

    name: str
    label: str
    path: str
    kind: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)

    def place(self, value: Any) -> float:
        """A value as a number: itself, or the position of a choice; NaN for what is none of the parameter's."""
        if self.kind == "choice":
            found = (at for at, choice in enumerate(self.choices) if _same(choice, value))
            return float(next(found, math.nan))
        return math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


@dataclass(frozen=True)
class StudyRecord:
    """The files of a study directory.

    Attributes:
        directory: Where it is.
        name: Of the study.
        storage: URL by which Optuna opens it, without password, or None.
        monitors: The metric of each objective.
        directions: ``maximize`` or ``minimize``, one an objective.
        search: The resolved config of the search.
        parameters: Of the space, by name.
        best: Number of the best complete trial, or of those on the Pareto front.
        importances: By method, shares by name; with several objectives by monitor and method.
        trials: By number.
        retrain: ``retrain.json``, or None.
        summary: ``summary.json``, or None.
        environment: ``environment.json``, or empty.
    """

    directory: Path
    name: str
    storage: str | None
    monitors: tuple[str, ...]
    directions: tuple[str, ...]
    search: Mapping[str, Any]
    parameters: Mapping[str, ParameterRecord]
    best: tuple[int, ...]
    importances: Mapping[str, Any]
    trials: tuple[TrialRecord, ...]
    retrain: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    environment: Mapping[str, Any]

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read a directory that ``search`` has written or is writing.

        Raises:
            UserError: If it is not the directory of a study, or a file of it is damaged.
        """
        directory = Path(directory)
        path = directory / "study.json"
        found = read_json(path)
        if found is None:
            raise UserError(
                f"{directory} is the directory of a search, but has no study.json yet; "
                "wait for its first trial, or give the search command again"
            )
        retrain, summary = read_json(directory / "retrain.json"), read_json(directory / "summary.json")
        try:
            trials = sorted((TrialRecord.of(entry) for entry in found["trials"]), key=lambda trial: trial.number)
            record = cls(
                directory,
                str(found["name"]),
                found.get("storage"),
                tuple(map(str, found["monitors"])),
                tuple(map(_direction, found["directions"])),
                dict(found.get("search") or {}),
                _parameters(found.get("space") or {}),
                tuple(int(number) for number in found.get("best") or ()),
                dict(found.get("importances") or {}),
                tuple(trials),
                None if retrain is None else dict(retrain),
                None if summary is None else dict(summary),
                dict(read_json(directory / "environment.json") or {}),
            )
            if len(record.monitors) != len(record.directions) or not record.monitors:
                raise ValueError(f"{len(record.monitors)} monitors and {len(record.directions)} directions")
            if missing := [number for number in record.best if number not in record.by_number]:
                raise ValueError(f"trial {missing[0]} is missing")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path} is not the record of a study ({what}); give the search command again, which writes it anew"
            ) from error
        return record

    @cached_property
    def by_number(self) -> dict[int, TrialRecord]:
        """The trials by their numbers."""
        return {trial.number: trial for trial in self.trials}

    def trial(self, number: int | None) -> TrialRecord | None:
        """The trial of a number, or None when there is none."""
        return None if number is None else self.by_number.get(number)

    @property
    def finished(self) -> bool:
        """Whether the search has come to its end."""
        return self.summary is not None and self.summary.get("status") == "finished"

    @property
    def several(self) -> bool:
        """Whether there are several objectives."""
        return len(self.monitors) > 1

    @cached_property
    def population(self) -> bool:
        """Whether trials are segments of the members of a population."""
        return any(trial.member is not None for trial in self.trials)

    @property
    def unit(self) -> str:
        """What a step of a report is."""
        return "fold" if self.folds else "epoch"

    @property
    def folds(self) -> int | None:
        """Folds that each trial is scored on; None if it is one run, as also in a search for a policy."""
        return None if self.search.get("method") else self.search.get("folds")

    def of_state(self, *states: str) -> list[TrialRecord]:
        """The trials of these states, by number."""
        return [trial for trial in self.trials if trial.state in states]

    def maximize(self, objective: int = 0) -> bool:
        """Whether more is better."""
        return self.directions[objective] == "maximize"

    @cached_property
    def usable(self) -> list[TrialRecord]:
        """Complete trials with finite values, by number."""
        return [trial for trial in self.trials if trial.usable]

    @cached_property
    def ranked(self) -> list[TrialRecord]:
        """The usable ones, the best first; with several objectives the Pareto front first, ordered by the first one."""
        sign = -1 if self.maximize() else 1
        return sorted(
            self.usable,
            key=lambda trial: (self.several and trial.number not in self.best, sign * trial.values[0], trial.number),
        )

    @property
    def winner(self) -> TrialRecord | None:
        """The best trial of a study with one objective."""
        return self.by_number[self.best[0]] if self.best and not self.several else None

    def trained(self, trial: TrialRecord) -> int:
        """Epochs that the trial and those that it continues were trained for."""
        chain = [trial]
        while (before := self.trial(chain[-1].retry_of)) is not None and before not in chain:
            chain.append(before)
        return sum(each.epochs for each in chain)

    def lineage(self, trial: TrialRecord) -> list[TrialRecord]:
        """The segments whose training made the weights of a trial, the first one first."""
        line = [trial]
        while (before := self.trial(line[-1].parent)) is not None and before not in line:
            line.append(before)
        return line[::-1]

    @property
    def unchanged(self) -> TrialRecord | None:
        """The trial of the run as it was given, if it was among those to try first, or what continued that trial."""
        first = [{}] if self.search.get("enqueued_default") else self.search.get("enqueue") or []
        trial = self.trial(first.index({})) if {} in first else None
        if trial is None or self.population:
            return None
        for each in self.trials:  # a continuation has a higher number than what it continues
            if each.retry_of == trial.number:
                trial = each
        return trial


def is_study(directory: Path) -> bool:
    """Whether a directory is that of a search, by its ``study.json``, or by a config that has a space and no model."""
    if (directory / "study.json").exists():
        return True
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and "space" in config and "model" not in config


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)  # JSON has neither NaN nor infinity


def _direction(text: Any) -> str:
    return "maximize" if str(text).lower().startswith("max") else "minimize"


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _time(text: Any) -> datetime | None:
    return None if not text else datetime.fromisoformat(str(text))


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _parameters(space: Mapping[str, Any]) -> dict[str, ParameterRecord]:
    labels = labels_of(space)
    return {name: _parameter(name, labels[name], entry) for name, entry in space.items()}


def _parameter(name: str, label: str, entry: Mapping[str, Any]) -> ParameterRecord:
    path, when = str(entry.get("path", name)), dict(entry.get("when") or {})
    for form in ("choice", "float", "int", "log_float", "log_int"):
        if form not in entry:
            continue
        if form == "choice":
            choices = tuple(choice if _is_single(choice) else _json(choice) for choice in entry[form])
            return ParameterRecord(name, label, path, form, choices=choices, when=when)
        span, kind = entry[form], form.removeprefix("log_")
        if not isinstance(span, Mapping):
            span = dict(zip(("low", "high", "step"), span, strict=False))
        log = bool(span.get("log", False)) or form != kind
        return ParameterRecord(
            name, label, path, kind, float(span["low"]), float(span["high"]), log, span.get("step"), when=when
        )
    raise ValueError(f"the range of {name} is {entry}")


def _is_single(choice: Any) -> bool:
    return choice is None or isinstance(choice, bool | int | float | str)


def _json(choice: Any) -> str:
    """A list or a mapping, as the study has it."""
    return json.dumps(choice, sort_keys=True, ensure_ascii=False)


def labels_of(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """The end of each dotted name that tells it from the others, without ``init_args`` and ``class_path``.

    ``model.init_args.optimizer.init_args.lr`` becomes ``lr``, or ``optimizer.lr`` beside ``scheduler.lr``.
    """
    parts = {
        name: [part for part in name.split(".") if part not in ("init_args", "class_path")] or [name] for name in names
    }
    labels = dict.fromkeys(parts, "")
    for name, own in parts.items():
        for length in range(1, len(own) + 1):
            labels[name] = ".".join(own[-length:])
            # A number alone tells nothing.
            if not own[-length].isdecimal() and not any(
                other != name and each[-length:] == own[-length:] for other, each in parts.items()
            ):
                break
        else:
            labels[name] = name
    return labels
