"""The directory of `auto`, read back as far as it has come."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml

from lightning_automl.results.ensemble import combine_predictions, is_of_auto
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.policy_search import ARMS as POLICIES
from lightning_automl.results.run import Predictions, Run, read_predictions
from lightning_automl.results.study import StudyRecord
from lightning_automl.rundir import UserError, read_json

#: What kinds of searched candidates are called.
KINDS = {
    "hyper-parameters": "hyper-parameters",
    "policy": "augmentation policy",
    "architecture": "architecture",
}


@dataclass(frozen=True)
class CandidateRecord:
    """A candidate that was judged on the search folds.

    Attributes:
        number: Of the candidate, from 0.
        key: What its runs' directory is called.
        title: What it is called.
        arm: Its arm's name.
        policy: ``none``, ``trivial_augment``, ``searched`` or "" where it is not known.
        values: Of its space; empty for the default.
        default: Whether it is a default of its arm.
        state: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        reason: Why it was stopped, or failed, or "".
        folds: Value by fold; only finite ones.
        mean: Over the folds, or NaN.
        low: Lower end of the mean's interval, or NaN.
        high: Upper end, or NaN.
        seconds: Of a worker.
        epochs: Trained, all folds together.
    """

    number: int
    key: str
    title: str
    arm: str
    policy: str
    values: Mapping[str, Any]
    default: bool
    state: str
    reason: str
    folds: Mapping[int, float]
    mean: float
    low: float
    high: float
    seconds: float
    epochs: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of ``candidates`` in ``selection.json``."""
        folds = {int(fold): finite(value) for fold, value in (entry.get("folds") or {}).items()}
        return cls(
            int(entry["number"]),
            str(entry["key"]),
            str(entry.get("title") or entry["key"]),
            str(entry["arm"]),
            str(entry.get("policy") or "none"),
            dict(entry.get("values") or {}),
            bool(entry.get("default")),
            str(entry.get("state") or ""),
            str(entry.get("reason") or ""),
            {fold: value for fold, value in sorted(folds.items()) if math.isfinite(value)},
            finite(entry.get("mean")),
            finite(entry.get("low")),
            finite(entry.get("high")),
            float(entry.get("seconds") or 0.0),
            int(entry.get("epochs") or 0),
        )

    @classmethod
    def of_challenger(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of ``challengers`` in ``comparison.json``, of which the mean is known alone."""
        key, mean = str(entry["key"]), finite(entry.get("mean"))
        policy = "searched" if entry.get("kind") == "policy" else ""
        state, reason = ("COMPLETE", "") if math.isfinite(mean) else ("FAIL", "it has no value on every search fold")
        title, arm, nan = str(entry.get("title") or key), key.rpartition("-")[0], math.nan
        return cls(-1, key, title, arm, policy, {}, False, state, reason, {}, mean, nan, nan, nan, 0)

    @property
    def policy_name(self) -> str:
        """What its augmentation is called."""
        return POLICIES.get(self.policy, self.policy)


@dataclass(frozen=True)
class SeedRecord:
    """A final training.

    Attributes:
        seed: Its seed.
        directory: Of its run, relative to the strategy's.
        val: Metrics of the validation split by name, without the split's.
        test: Those of the test split.
        seconds: It took.
        epochs: It was trained for.
    """

    seed: int
    directory: str
    val: Mapping[str, float]
    test: Mapping[str, float]
    seconds: float
    epochs: int


@dataclass(frozen=True)
class ModelRecord:
    """A model that was judged on the test split: the chosen one, or the simple one beside it.

    Attributes:
        key: Of its candidate.
        title: What it is called.
        seeds: Its trainings.
        val: Metrics of their average on the validation split.
        test: Likewise on the test split.
        average: How they are put together: ``predictions``, ``weights`` or ``single``.
        temperature: By which its logits are divided.
    """

    key: str
    title: str
    seeds: tuple[SeedRecord, ...]
    val: Mapping[str, float]
    test: Mapping[str, float]
    average: str
    temperature: float

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of ``models`` in ``evaluation.json``."""
        seeds = [
            SeedRecord(
                int(each["seed"]),
                str(each.get("directory") or ""),
                _metrics(each.get("val")),
                _metrics(each.get("test")),
                float(each.get("seconds") or 0.0),
                int(each.get("epochs") or 0),
            )
            for each in entry.get("seeds") or ()
        ]
        key = str(entry["key"])
        title = str(entry.get("title") or key)
        average = str(entry.get("average") or ("predictions" if len(seeds) > 1 else "single"))
        temperature = float(entry.get("temperature") or 1.0)
        return cls(
            key, title, tuple(seeds), _metrics(entry.get("val")), _metrics(entry.get("test")), average, temperature
        )

    def predictions(self, directory: Path, split: str) -> Predictions | None:
        """What it gave for the images of a split, from what its runs have kept; None where that is not there.

        Args:
            directory: Of the strategy.
            split: ``val`` or ``test``.
        """
        places = [directory / each.directory for each in self.seeds]
        if self.average == "weights" and places:
            places = [places[0].parent / "averaged"]
        found = [read_predictions(place / f"evaluated_{split}.safetensors") for place in places]
        members = [each for each in found if each is not None]
        if not members or len(members) != len(found):
            return None
        return combine_predictions(members, self.temperature)


@dataclass(frozen=True)
class StrategyRecord:
    """The files of a directory that `auto` has written or is writing; empty mappings for those not there yet.

    Attributes:
        directory: Where it is.
        config: ``config.yaml``: what was given.
        look: ``look.json``: what was seen of the data.
        measured: ``measured.json``: what trainings cost.
        plan: ``plan.json``.
        progress: ``progress.json``: seconds spent, and what was cut.
        selection: ``selection.json``.
        comparison: ``comparison.json``: searched against simple.
        model: ``model.json``.
        evaluation: ``evaluation.json``.
        environment: ``environment.json``.
        summary: ``summary.json``, or None.
        candidates: Of the selection, by number.
        challengers: What was searched and is not among them, judged on the same folds.
        chosen: The chosen model, or None.
        simple: The simple one, where another one was chosen, or None.
    """

    directory: Path
    config: Mapping[str, Any]
    look: Mapping[str, Any]
    measured: Mapping[str, Any]
    plan: Mapping[str, Any]
    progress: Mapping[str, Any]
    selection: Mapping[str, Any]
    comparison: Mapping[str, Any]
    model: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    candidates: tuple[CandidateRecord, ...]
    challengers: tuple[CandidateRecord, ...]
    chosen: ModelRecord | None
    simple: ModelRecord | None

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read a directory that `auto` has written or is writing.

        Raises:
            UserError: If it is another directory, or a file of it is damaged.
        """
        directory = Path(directory)
        config = _config(directory)
        if not is_of_auto(directory):
            raise UserError(f"{directory} is not the directory of an auto command; give its --dir")
        names = ("look", "measured", "plan", "progress", "selection", "comparison", "model", "evaluation")
        files = {name: _mapping(directory / f"{name}.json") for name in (*names, "environment")}
        summary = _mapping(directory / "summary.json")
        name = "selection"
        try:
            candidates = [CandidateRecord.of(entry) for entry in files["selection"].get("candidates") or ()]
            name = "comparison"
            known = {each.key for each in candidates}
            others = files[name].get("challengers") or ()
            challengers = [CandidateRecord.of_challenger(entry) for entry in others if entry["key"] not in known]
            name = "evaluation"
            models = files["evaluation"].get("models") or {}
            chosen, simple = (
                ModelRecord.of(models[which]) if models.get(which) else None for which in ("chosen", "simple")
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{directory / name}.json cannot be understood ({what}); remove it and give the auto command again"
            ) from error
        return cls(
            directory,
            config,
            **files,
            summary=summary or None,
            candidates=tuple(sorted(candidates, key=lambda each: each.number)),
            challengers=tuple(challengers),
            chosen=chosen,
            simple=simple,
        )

    @property
    def finished(self) -> bool:
        """Whether the command has come to its end."""
        return self.summary is not None and self.summary.get("status") == "finished"

    @property
    def metric(self) -> str:
        """What decides."""
        found = next((own["metric"] for own in (self.selection, self.plan, self.config) if own.get("metric")), None)
        return str(found or "val_balanced_accuracy")

    @property
    def maximize(self) -> bool:
        """Whether more of it is better."""
        direction = self.selection.get("direction") or self.plan.get("direction")
        return str(direction or "maximize").startswith("max")

    @property
    def instead_of(self) -> str | None:
        """The key of what was adopted, where none of its final trainings gave a model and the simple one is used."""
        return _key((self.evaluation.get("instead_of") or {}).get("key"))

    @property
    def seconds(self) -> float:
        """Spent so far, all commands of this directory together; NaN where it is not known."""
        return finite(self.progress.get("seconds", (self.summary or {}).get("seconds")))

    @property
    def budget(self) -> float:
        """Seconds that were given, or NaN."""
        return finite(self.plan.get("budget") or self.config.get("budget"))

    @cached_property
    def arm_titles(self) -> dict[str, str]:
        """What arms are called."""
        planned = [*(self.plan.get("arms") or ()), *(self.plan.get("not_run") or ())]
        return {str(each["name"]): str(each.get("title") or each["name"]) for each in planned}

    def title(self, key: str | None) -> str:
        """What the candidate of a key is called."""
        for model in (self.chosen, self.simple):
            if model is not None and model.key == key:
                return model.title
        found = next((each for each in (*self.candidates, *self.challengers) if each.key == key), None)
        return str(key) if found is None else found.title

    def candidate(self, key: str | None) -> CandidateRecord | None:
        """The candidate of a key, if the selection has one."""
        return next((each for each in self.candidates if each.key == key), None)

    @property
    def leader(self) -> str | None:
        """The key of what was chosen, or would be by now."""
        if self.chosen is not None:
            return self.chosen.key
        if (adopted := self.comparison.get("adopted")) in ("simple", "searched"):
            return _key(self.comparison.get(adopted) or self.selection.get(adopted))
        return _key((self.selection.get("leaders") or [self.selection.get("simple")])[0])

    @property
    def simple_key(self) -> str | None:
        """The key of the simple arm that what was searched has to beat."""
        return _key(self.comparison.get("simple") or self.selection.get("simple"))

    @cached_property
    def evidence(self) -> Evidence | None:
        """What the sections of a run's page can be made from for the chosen model; None before it was judged."""
        if self.chosen is None or not self.chosen.seeds:
            return None
        try:
            run = Run.read(self.directory / self.chosen.seeds[0].directory)
        except UserError:  # its directory was removed
            return None
        environment = {**self.environment, "network": run.environment.get("network", {}), "precision": "32-true"}
        data = dict(_mapping(self.directory / "data.json")) or run.data
        summary = dict(self.summary or {})
        opened = int(self.evaluation.get("opened") or 0)
        summary["test_opened"] = max(opened, int(summary.get("test_opened") or 0))
        evidence = Evidence(Run(self.directory, run.config, summary, environment, data, run.epochs))
        return None if evidence.judged is None else evidence

    @cached_property
    def study(self) -> StudyRecord | None:
        """The selection as a study, if it has left one."""
        return StudyRecord.read(self.directory) if (self.directory / "study.json").exists() else None


def finite(value: Any) -> float:
    """A number, NaN for what is none: JSON has no NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _key(value: Any) -> str | None:
    return None if value is None else str(value)


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _mapping(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if content is not None and not isinstance(content, Mapping):
        raise UserError(f"{path} cannot be understood; remove it and give the auto command again")
    return content or {}


def _metrics(entry: Any) -> dict[str, float]:
    """By name without the split's, finite ones only."""
    found = {
        str(name).removeprefix("val_").removeprefix("test_"): finite(value) for name, value in (entry or {}).items()
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}
