"""Runs of candidates: each in a directory named by what it is, trained once, read ever after."""

import logging
import math
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_automl.auto.candidates import Candidate
from lightning_automl.auto.clock import Clock
from lightning_automl.auto.costs import together
from lightning_automl.auto.facts import Facts
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError, read_json, write_json
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.configs import closed, of_fold, to_its_end
from lightning_automl.studies.workers import Workers

log = logging.getLogger("lightning_automl")

#: Reason of a run that was not started, or not ended, since the time is short.
BUDGET = "budget"

_FAILURE = "failure.json"


@dataclass(frozen=True)
class Job:
    """A run that is wanted.

    Args:
        candidate: What is trained.
        fold: Number of the fold that it is validated on, and not trained on; None for the data's own splits.
        seed: Of the run.
        final: Whether its network is wanted, and not only its value; always so on the data's own splits.
    """

    candidate: Candidate
    fold: int | None
    seed: int
    final: bool = False

    @property
    def is_final(self) -> bool:
        """Whether its network is wanted."""
        return self.final or self.fold is None

    @property
    def name(self) -> str:
        """Of its directory within the candidate's."""
        parts = ["final"] if self.is_final else []
        parts += [] if self.fold is None else [f"fold-{self.fold}"]
        return "-".join([*parts, f"seed-{self.seed}"])

    @property
    def title(self) -> str:
        """For a person."""
        part = "" if self.fold is None else f"fold {self.fold}, "
        return f"{self.candidate.title}, {part}seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        value: Of the metric: after the last epoch on a fold, of the best epoch on the data's own validation split, see
            :meth:`Runs.config_of`. None if there is none.
        reason: Why there is none, a sentence; :data:`BUDGET` if it was the time; else "".
        seconds: That the run took, in all its tries.
        epochs: That it was trained for.
        place: Its directory.
    """

    value: float | None
    reason: str
    seconds: float
    epochs: int
    place: Path


class Runs:
    """Trains what is not trained yet, several at once, and reads what is.

    A run that fails is an outcome with its reason, and the others go on. It is not tried again until there is a plan
    with another budget, so that a repeated command comes to the same.

    Args:
        workers: Do the work.
        directory: Of the strategy; runs are in ``runs/KEY/fold-F-seed-S``, those of search folds that are trained
            on all other folds in ``fold-F-all-seed-S``, and final ones in ``final-seed-S`` or ``final-fold-F-seed-S``.
        facts: What is known of the data.
        plan: Which folds, which metric, and how long a run of an arm may take.
        clock: Tells how much time is left.
    """

    def __init__(self, workers: Workers, directory: Path, facts: Facts, plan: Mapping[str, Any], clock: Clock) -> None:
        self.workers = workers
        self.directory = directory
        self.folds = facts.folds
        self.plan = plan
        self.clock = clock
        self.metric: str = plan["metric"]
        self._searched: list[int] = plan["search_folds"]
        # Folds that choices do not see: of two folds nothing would be left to train on.
        kept = plan["comparison"] is not None and len(self._searched) > 1
        self._apart: list[int] = plan["comparison_folds"] if kept else []
        self._few = facts.few
        self._planned = _planned(plan)
        self._learned: dict[tuple[str, str], dict[Path, float]] = defaultdict(dict)
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._accepted = False

    def place(self, job: Job) -> Path:
        """The directory of a run."""
        # Of the same fold there may be both, when a longer budget adds a comparison.
        both = self._kind(job) == "search" and not self._apart
        own = job.name.replace("-seed-", "-all-seed-") if both else job.name
        return self.directory / "runs" / job.candidate.key / own

    def is_finished(self, job: Job) -> bool:
        """Whether it was trained to its end."""
        return (read_json(self.place(job) / "summary.json") or {}).get("status") == "finished"

    def is_settled(self, job: Job) -> bool:
        """Whether it is finished, or has failed and is not to be tried again."""
        return self.is_finished(job) or self._failure(job) is not None

    def _failure(self, job: Job) -> str | None:
        """Why it has failed with this budget, if it has."""
        known = read_json(self.place(job) / _FAILURE)
        return known["reason"] if known is not None and known["budget"] == self.plan["budget"] else None

    def config_of(self, job: Job) -> dict[str, Any]:
        """The ``fit`` config of a run. It opens no test split.

        On a fold it goes to its last epoch, which counts: a better one would be chosen on the images that are to judge
        it. If there is a comparison to come, it does without the images of the folds that are kept for that. Of a final
        run the best epoch on the validation split counts, and the last one where that has fewer than 30 images.
        """
        config = closed(job.candidate.config, self.directory) | {"seed_everything": job.seed}
        if job.is_final and self._few:  # of a handful of images the best epoch is one of luck
            config |= {"monitor": "epoch", "mode": "max"}
        if job.fold is None:
            return config
        without = self._apart if self._kind(job) == "search" else ()
        return to_its_end(of_fold(config, job.fold, self.folds, without))

    def seconds(self, job: Job) -> float:
        """How long a run will take, by those of its arm that have ended, else by the plan."""
        arm, kind = job.candidate.arm, self._kind(job)
        planned = self._planned.get((arm, kind), max(self._planned.values(), default=0.0))
        with self._lock:
            learned = {own: sum(times.values()) / len(times) for own, times in self._learned.items()}
        if (arm, kind) in learned:
            return learned[arm, kind]
        # Runs of another kind, else of other arms, tell how far the plan is from the truth.
        known = [own for own in learned if self._planned.get(own)]
        known = [own for own in known if own[0] == arm] or known
        if not known:
            return planned
        return planned * max(1.0, sum(learned[own] for own in known) / sum(self._planned[own] for own in known))

    def wall_seconds(self, jobs: Sequence[Job]) -> float:
        """How long several will take together, those that are settled not counted: the longest first."""
        return together((self.seconds(job) for job in jobs if not self.is_settled(job)), self.workers.number)

    def each(
        self,
        jobs: Sequence[Job],
        *,
        at_least: int = 0,
        within: float | None = None,
        on_run: Callable[[Job, Outcome], None] = lambda job, outcome: None,
    ) -> list[Outcome]:
        """Train several, the longest first, each if it can end within the budget.

        Args:
            jobs: What is wanted.
            at_least: So many of the first ones are started whatever the clock says.
            within: Seconds after which what is running is stopped; the same run goes on another time.
            on_run: Called, one at a time, with each run and what came of it.

        Returns:
            The outcomes in the jobs' order.

        Raises:
            UserError: If every one is refused, and no run was ever accepted: the mistake concerns all.
            DiskFullError: If a run found no space left.
        """
        workers = self.workers if within is None else self.workers.within(within)
        refusals: list[UserError] = []
        failures: list[Outcome] = []
        outcomes: dict[int, Outcome] = {}

        def work(number: int) -> None:
            try:
                outcome = self._one(workers, jobs[number], number < at_least)
            except (StudyFailed, UserError) as error:
                # Nobody's fault if all was stopped; what is there of it is gone on from.
                reason = BUDGET if workers.is_set() else str(error)
                outcome = Outcome(None, reason, *self._cost(jobs[number]), self.place(jobs[number]))
                with self._lock:
                    if reason != BUDGET:
                        failures.append(outcome)
                        refusals.extend([error] if isinstance(error, UserError) else [])
            with self._lock:
                outcomes[number] = outcome
                self._accepted |= outcome.value is not None
            with self._telling:
                on_run(jobs[number], outcome)

        for candidate in {job.candidate.key: job.candidate for job in jobs}.values():
            self._describe(candidate)
        order = sorted(range(len(jobs)), key=lambda number: (number >= at_least, -self.seconds(jobs[number])))
        workers.each(work, order)
        if refusals and len(refusals) == len(jobs) and not self._accepted:
            raise refusals[0]
        for outcome in failures:
            write_json(outcome.place / _FAILURE, {"reason": outcome.reason, "budget": self.plan["budget"]})
        return [outcomes[number] for number in range(len(jobs))]

    def _one(self, workers: Workers, job: Job, forced: bool) -> Outcome:
        place = self.place(job)
        if not self.is_finished(job):
            if (failure := self._failure(job)) is not None:
                return Outcome(None, failure, *self._cost(job), place)
            if not forced and self.clock.left() < self.seconds(job):
                return Outcome(None, BUDGET, *self._cost(job), place)
            started = time.monotonic()
            workers.fit(job.title, self._config(job), place)
            self._learn(job, time.monotonic() - started)
        value = self._value(job)
        seconds, epochs = self._cost(job)
        self._learn(job, seconds)
        if not job.is_final:  # its value is all that is wanted; the networks of many would fill the disk
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
        reason = "" if math.isfinite(value) else f"it has diverged: {self.metric} is {value}"
        return Outcome(None if reason else value, reason, seconds, epochs, place)

    def _config(self, job: Job) -> dict[str, Any]:
        """What to hand to ``fit``: for a run that goes on the config that it has written, in more words."""
        place = self.place(job)
        if (place / "checkpoints" / "last.ckpt").exists():
            kept: dict[str, Any] = yaml.safe_load((place / "config.yaml").read_text())
            return kept
        return self.config_of(job)

    def _value(self, job: Job) -> float:
        from lightning_automl.studies.acceptance import last_value  # brings torch

        run = Run.read(self.place(job))
        if job.fold is not None:
            return last_value(run, self.metric)
        value = ((run.summary or {}).get("metrics") or {}).get(self.metric)
        return math.nan if value is None else float(value)

    def _cost(self, job: Job) -> tuple[float, int]:
        """Seconds and epochs that a run has taken so far, finished or not."""
        place = self.place(job)
        if not (place / "config.yaml").exists():
            return 0.0, 0
        run = Run.read(place)
        epochs = int(run.epochs[-1]["epoch"]) + 1 if run.epochs else 0
        return float((run.summary or {}).get("seconds", 0.0)), epochs

    def _describe(self, candidate: Candidate) -> None:
        """Write down what a directory is of, or see that it is the same."""
        path = self.directory / "runs" / candidate.key / "candidate.json"
        before = read_json(path)
        if before is None:
            write_json(path, candidate.to_dict())
        elif before["identity"] != candidate.identity:
            raise RuntimeError(f"{path.parent} is of another candidate, whose name comes to the same digits")

    def _kind(self, job: Job) -> str:
        """Runs of a kind train on about as many images."""
        if job.is_final:
            return "final"
        return "search" if job.fold in self._searched else "comparison"

    def _learn(self, job: Job, seconds: float) -> None:
        with self._lock:  # the first counts: the time that passed says more than what the run knows of itself
            self._learned[job.candidate.arm, self._kind(job)].setdefault(self.place(job), seconds)


def _planned(plan: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Seconds of a run by arm and kind."""
    arms = list(plan["arms"])
    if searched := plan.get("architecture_search"):
        arms.append(searched["arm"])
    kinds = ("search", "comparison", "final")
    return {
        (arm["name"], kind): float((arm.get("seconds") or {}).get(kind, arm["run_seconds"]))
        for arm in arms
        for kind in kinds
    }
