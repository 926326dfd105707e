"""How candidates stand: who is the best default, who is above it, and what is kept of it in files."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_automl.auto.candidates import Candidate
from lightning_automl.auto.runs import Outcome
from lightning_automl.rundir import write_json
from lightning_automl.search.generations import Scored, study_of
from lightning_automl.search.records import importances, write_records
from lightning_automl.search.spaces import Space
from lightning_automl.search.study import StudyFailed


class Standings:
    """What the selection knows of its candidates.

    Args:
        plan: The plan.
        space: Of all arms together.
        seed: Of the runs and the sampler.

    Attributes:
        candidates: By number.
        outcomes: Of each one's runs, in the order of the folds, by number.
        scored: As the search for generations has them, by number.
    """

    def __init__(self, plan: Mapping[str, Any], space: Space, seed: int) -> None:
        self.metric, self.direction = str(plan["metric"]), str(plan["direction"])
        self.folds: list[int] = list(plan["search_folds"])
        self.generations: list[int] = list(plan["generations"])
        self.space = space
        self.seed = seed
        self.candidates: dict[int, Candidate] = {}
        self.outcomes: dict[int, list[Outcome]] = defaultdict(list)
        self.scored: Sequence[Scored] = ()
        self._sign = 1 if self.direction == "minimize" else -1

    def ranked(self, some: Sequence[Scored] | None = None) -> list[Scored]:
        """Those with a value: on most folds first, then by their means, then the earlier one."""
        there = [each for each in (self.scored if some is None else some) if each.results and each.state != "FAIL"]
        return sorted(there, key=lambda each: (-len(each.results), self._sign * each.mean(), each.number))

    def simple(self) -> Scored:
        """The best default; the first one, which is the plan's favourite, if there was no time for any.

        Raises:
            StudyFailed: If all of them have failed.
        """
        defaults = [each for each in self.scored if each.generation == 0]
        ranked = self.ranked(defaults) or [each for each in defaults if each.state != "FAIL"]
        if not ranked:
            first = defaults[0].number
            what, why = self.candidates[first].title, self.outcomes[first][-1].reason
            raise StudyFailed(f"no arm could be trained; {what}: {why}")
        return ranked[0]

    def searched(self) -> Scored | None:
        """The best tuned one if it is above the best default, on the folds that both have."""
        tuned, simple = self.ranked([each for each in self.scored if each.generation > 0]), self.simple()
        if not tuned or not simple.results:
            return None
        common = min(len(tuned[0].results), len(simple.results))
        above = self._sign * tuned[0].mean(common) < self._sign * simple.mean(common)
        return tuned[0] if above else None

    def leaders(self) -> list[str]:
        """Keys, the best first."""
        return list(dict.fromkeys(self.candidates[each.number].key for each in self.ranked()))

    def cut_sentence(self) -> str:
        """What came of a selection that the time was too short for."""
        planned = max(sum(self.generations), len(self.scored))
        trained = sum(bool(each.results) or each.state == "FAIL" for each in self.scored)
        whole = sum(len(each.results) == len(self.folds) for each in self.scored)
        return (
            f"The selection was cut short by the budget: of {planned} planned candidates {trained} were trained, "
            f"{whole} of them on all {len(self.folds)} folds."
        )

    def record(self) -> dict[str, Any]:
        """What ``selection.json`` holds, but for what was cut."""
        decided = any(each.state != "FAIL" for each in self.scored if each.generation == 0)
        simple, searched = (self.simple(), self.searched()) if decided else (None, None)
        return {
            "metric": self.metric,
            "direction": self.direction,
            "candidates": [self._entry(each) for each in self.scored],
            "simple": None if simple is None else self.candidates[simple.number].key,
            "searched": None if searched is None else self.candidates[searched.number].key,
            "leaders": self.leaders(),
        }

    def write(self, directory: Path, *, final: bool, **further: Any) -> None:
        """Write ``selection.json`` and, as soon as there are values, ``trials.csv`` and ``study.json``.

        Args:
            directory: Of the strategy.
            final: Whether nothing follows, so that what takes long is worth while.
            further: For ``selection.json``.
        """
        write_json(directory / "selection.json", self.record() | further)
        if any(each.results for each in self.scored):
            self._write_study(directory, final)

    def _write_study(self, directory: Path, final: bool) -> None:
        attributes = {
            each.number: {
                "seconds": self._seconds(each.number),
                "epochs": self._epochs(each.number),
                "reason": self._reason(each),
                "directory": f"runs/{self.candidates[each.number].key}",
            }
            for each in self.scored
        }
        search = {
            "name": "selection",
            "monitor": self.metric,
            "direction": self.direction,
            "folds": len(self.folds),
            "generations": self.generations,
            "seed": self.seed,
            "sampler": "optuna.samplers.TPESampler",
            "importances_by": "their values on the first fold",
        }
        # Few come to the last fold, and the means of the others are of other folds.
        first = [
            dataclasses.replace(each, results=each.results[:1], state="COMPLETE" if each.results else "FAIL")
            for each in self.scored
        ]
        write_records(
            study_of(self.space, self.scored, self.direction, name="selection", attributes=attributes),
            self.space,
            directory,
            monitors=[self.metric],
            search=search,
            shares=importances(study_of(self.space, first, self.direction), self.space, fanova=final),
        )

    def _entry(self, scored: Scored) -> dict[str, Any]:
        candidate = self.candidates[scored.number]
        interval: Mapping[str, float] = {}
        if len(scored.results) > 1:
            from lightning_automl.studies.retrain import mean_over_seeds

            interval = mean_over_seeds(scored.results, bounded=not self.metric.endswith("loss"))
        return {
            "number": scored.number,
            "key": candidate.key,
            "title": candidate.title,
            "arm": candidate.arm,
            "policy": candidate.policy,
            "values": dict(candidate.values),
            "default": candidate.default,
            "state": scored.state,
            "reason": self._reason(scored),
            "folds": {str(fold): value for fold, value in zip(self.folds, scored.results, strict=False)},
            "mean": scored.mean() if scored.results else None,
            "low": interval.get("low"),
            "high": interval.get("high"),
            "seconds": self._seconds(scored.number),
            "epochs": self._epochs(scored.number),
            "generation": scored.generation,
        }

    def _seconds(self, number: int) -> float:
        return round(math.fsum(each.seconds for each in self.outcomes[number]), 3)

    def _epochs(self, number: int) -> int:
        return sum(each.epochs for each in self.outcomes[number])

    def _reason(self, scored: Scored) -> str:
        if scored.state == "FAIL":
            return self.outcomes[scored.number][-1].reason
        if scored.dropped:
            count = len(scored.results)
            return f"others were better on {'the first fold' if count == 1 else f'the first {count} folds'}"
        if scored.state == "PRUNED":
            alone = len(self.scored) == 1 and sum(self.generations) <= 1
            return "the only candidate, so that there was nothing to choose" if alone else "no time was left for it"
        return ""
