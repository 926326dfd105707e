"""The directory of a policy search, read back."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from lightning_automl.results.evidence import Evidence
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError, read_json

if TYPE_CHECKING:
    from lightning_automl.augment import OperationSpace

#: Of ``policy_search.json``.
VERSION = 1
#: What the arms of the acceptance are called.
ARMS = {"none": "no policy", "trivial_augment": "TrivialAugment", "searched": "searched policy"}
#: Keys of the config that the record repeats.
_FOLDS, _TRIALS = 5, 200


@dataclass(frozen=True)
class Arm:
    """One way of augmenting on the held-out folds.

    Attributes:
        name: Its name in the record.
        values: Fold, seed and value of each run; NaN where the value was not finite.
        mean: Of the values.
        low: Lower end of its interval, or NaN.
        high: Upper end.
    """

    name: str
    values: tuple[tuple[int, int, float], ...]
    mean: float
    low: float
    high: float

    @property
    def label(self) -> str:
        """What a reader calls it."""
        return ARMS.get(self.name, self.name)


@dataclass(frozen=True)
class Comparison:
    """The searched policy against a simple arm.

    Attributes:
        against: Name of the simple arm.
        difference: Searched minus simple, the mean over folds and seeds.
        low: Lower end of its interval, or NaN.
        high: Upper end.
        p_value: Of the paired test, or NaN.
        better: Whether the searched policy is better, and more than by chance.
    """

    against: str
    difference: float
    low: float
    high: float
    p_value: float
    better: bool

    @property
    def label(self) -> str:
        """What a reader calls the simple arm."""
        return ARMS.get(self.against, self.against)


@dataclass(frozen=True)
class Acceptance:
    """How the searched policy did on folds that the search had not seen.

    Attributes:
        metric: What was compared.
        maximize: Whether more is better.
        arms: The ways of augmenting.
        comparisons: Of the searched policy with each other one.
        adopted: Name of the arm that ``policy.json`` is.
    """

    metric: str
    maximize: bool
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    adopted: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Read ``acceptance`` of ``policy_search.json``."""
        arms = [
            Arm(
                str(name),
                tuple((int(each["fold"]), int(each["seed"]), _number(each["value"])) for each in own["values"]),
                *(_number(own.get(key)) for key in ("mean", "low", "high")),
            )
            for name, own in entry["arms"].items()
        ]
        comparisons = [
            Comparison(
                str(each["against"]),
                _number(each.get("difference")),
                _number(each.get("low")),
                _number(each.get("high")),
                _number(each.get("p_value")),
                bool(each["better"]),
            )
            for each in entry["comparisons"]
        ]
        maximize = str(entry["direction"]).lower().startswith("max")
        return cls(str(entry["metric"]), maximize, tuple(arms), tuple(comparisons), str(entry["adopted"]))


@dataclass(frozen=True)
class Kept:
    """A policy that the search has kept.

    Attributes:
        fold: Where it was found, from 0.
        round: Likewise.
        number: Of its trial.
        value: Its own; NaN where it is not finite.
        sub_policies: Each a sequence of steps: ``operation``, ``probability``, ``magnitude``.
    """

    fold: int
    round: int
    number: int
    value: float
    sub_policies: tuple[tuple[Mapping[str, Any], ...], ...]


@dataclass(frozen=True)
class PolicySearchRecord:
    """The files of a policy search.

    Attributes:
        directory: Where it is.
        config: ``config.yaml``.
        record: ``policy_search.json``; empty until the search has written it.
        kept: Policies that it has kept.
        acceptance: The comparison on held-out folds, or None.
        summary: ``summary.json``, or None.
        environment: ``environment.json``, or empty.
    """

    directory: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    kept: tuple[Kept, ...]
    acceptance: Acceptance | None
    summary: Mapping[str, Any] | None
    environment: Mapping[str, Any]

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read a directory that a policy search has written or is writing.

        Raises:
            UserError: If it is not one, or a file of it is damaged.
        """
        directory = Path(directory)
        if not is_policy_search(directory):
            raise UserError(f"{directory} is not the directory of a policy search; give the --dir of one")
        path = directory / "policy_search.json"
        found = read_json(path)
        try:
            record = dict(found or {})
            if record and record.get("version") != VERSION:
                raise ValueError(f"its version is {record.get('version')}, and {VERSION} is known")
            entries = record.get("kept") or ()
            kept = tuple(
                Kept(
                    int(each["fold"]),
                    int(each["round"]),
                    int(each["number"]),
                    _number(each["value"]),
                    tuple(tuple(dict(step) for step in steps) for steps in each["sub_policies"]),
                )
                for each in entries
            )
            for step in (step for each in kept for steps in each.sub_policies for step in steps):
                _ = step["operation"], float(step["probability"]), float(step["magnitude"])
            acceptance = None if record.get("acceptance") is None else Acceptance.of(record["acceptance"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path} is not the record of a policy search ({what}); give the search command again, which writes "
                "it anew"
            ) from error
        config, summary = _config(directory), read_json(directory / "summary.json")
        environment = read_json(directory / "environment.json") or {}
        return cls(directory, config, record, kept, acceptance, summary, environment)

    @property
    def finished(self) -> bool:
        """Whether the search has come to its end."""
        return self.summary is not None and self.summary.get("status") == "finished"

    @property
    def method(self) -> str:
        """Name of the search's class."""
        given = self.config.get("method")
        name = given.get("class_path", "") if isinstance(given, Mapping) else given or ""
        return str(self.record.get("method") or name).rpartition(".")[2]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of that class."""
        given = self.config.get("method")
        own = given.get("init_args") if isinstance(given, Mapping) else None
        return self.record.get("arguments") or own or {}

    @property
    def folds(self) -> int:
        """Folds that policies are searched on."""
        return int(self.record.get("folds") or self.config.get("folds") or _FOLDS)

    @property
    def rounds(self) -> int:
        """Searches on each fold, one after the other."""
        return int(self.arguments.get("rounds") or 1)

    @property
    def trials(self) -> int:
        """Policies of each round."""
        return int(self.record.get("trials") or self.config.get("trials") or _TRIALS)

    @property
    def by_density(self) -> bool:
        """Whether policies are scored by networks that were trained without them, and not by training with each."""
        return self.method != "AutoAugmentSearch" and not (self.directory / "study.json").exists()

    @cached_property
    def searched(self) -> list[str]:
        """The operations that policies were made of, as far as it is known."""
        if self.arguments.get("operations"):
            return list(self.arguments["operations"])
        for path in sorted((self.directory / "density").glob("*.jsonl")):
            header = next(iter(_lines(path)), {})
            return list((header.get("policies") or {}).get("operations") or ())
        parameters = (read_json(self.directory / "study.json") or {}).get("space") or {}
        choices = [each.get("choice") or () for name, each in parameters.items() if name.endswith(".operation")]
        return list(dict.fromkeys(choice for each in choices for choice in each))

    @property
    def objective(self) -> str:
        """What the values of trials are."""
        what = str(self.arguments.get("objective") or "loss")
        return f"{what} on augmented images"

    @cached_property
    def trained_folds(self) -> int:
        """Folds whose network is trained."""
        summaries = (read_json(path) for path in sorted((self.directory / "folds").glob("*/summary.json")))
        return sum(each is not None and each.get("status") == "finished" for each in summaries)

    @cached_property
    def compared_runs(self) -> int:
        """Runs of the acceptance that are finished."""
        summaries = (read_json(path) for path in sorted((self.directory / "acceptance").glob("*/*/summary.json")))
        return sum(each is not None and each.get("status") == "finished" for each in summaries)

    @cached_property
    def values(self) -> dict[tuple[int, int], list[float]]:
        """Values of the trials of each fold and round, in their order; NaN for one that has failed."""
        found: dict[tuple[int, int], list[float]] = {}
        paths = sorted((self.directory / "density").glob("fold-*-round-*.jsonl"))
        if paths:
            for path in paths:
                _, fold, _, number = path.stem.split("-")
                if fold.isdecimal() and number.isdecimal():
                    # The first line says what the others are of.
                    found[int(fold), int(number)] = [_value(entry) for entry in _lines(path) if "number" in entry]
            return {key: found[key] for key in sorted(found)}
        table = self.directory / "trials.csv"
        if self.by_density and table.exists():
            with table.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("fold") and row.get("round"):
                        value = _value({**row, "value": float(row["value"]) if row.get("value") else None})
                        found.setdefault((int(row["fold"]), int(row["round"])), []).append(value)
        return found

    @property
    def clean(self) -> Mapping[int, float]:
        """The value of unchanged images by fold, as far as it is known."""
        known = self.record.get("identity_values")
        if known is None:
            of_folds = (read_json(self.directory / "density" / f"fold-{fold}.json") for fold in range(self.folds))
            known = [(each or {}).get("identity") for each in of_folds]
        return {fold: float(value) for fold, value in enumerate(known) if value is not None}

    @cached_property
    def evidence(self) -> Evidence | None:
        """A run of the search whose data can be shown, opened without its policy; None until there is one."""
        for pattern in ("folds/*", "trials/*", "acceptance/*/*"):
            for directory in sorted(self.directory.glob(pattern)):
                if (directory / "config.yaml").exists() and (directory / "data.json").exists():
                    run = Run.read(directory)
                    data = dict(run.config.get("data") or {})
                    data["init_args"] = {**(data.get("init_args") or {}), "train_policy": None}
                    return Evidence(replace(run, config={**run.config, "data": data}))
        return None

    @property
    def space_name(self) -> str:
        """Of the space that is searched, or ""."""
        spec = self.record.get("space") or self.arguments.get("space") or ""
        return str(spec.get("name", "") if isinstance(spec, Mapping) else Path(str(spec)).stem)

    def open_space(self) -> "OperationSpace | None":
        """The space that is searched, or None where it is not known.

        Raises:
            UserError: If it is no space.
        """
        spec = self.record.get("space") or self.arguments.get("space")
        if spec is None:
            return None
        from lightning_automl.augment import load_space

        return load_space(spec)


def is_policy_search(directory: Path) -> bool:
    """Whether a directory is that of a policy search, by its record, or by a config with a method and no model."""
    if (directory / "policy_search.json").exists():
        return True
    config = _config(directory)
    return "method" in config and "model" not in config


def read_policy(path: Path) -> Any:
    """The policy of a file, or None where there is no file.

    Raises:
        UserError: If it is no policy.
    """
    if not path.exists():
        return None
    from lightning_automl.augment import load_policy

    return load_policy(path)


def _config(directory: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The entries of a file of JSON lines; a line that was cut off is left out."""
    found: list[Mapping[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _value(entry: Mapping[str, Any]) -> float:
    return _number(entry.get("value")) if entry.get("state", "COMPLETE") == "COMPLETE" else math.nan


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)  # JSON has neither NaN nor infinity


def failed(values: Sequence[float]) -> int:
    """How many of these values are those of failed trials."""
    return sum(not math.isfinite(value) for value in values)
