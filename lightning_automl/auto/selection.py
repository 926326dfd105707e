"""The competition of arms on the search folds: first their defaults, then tuned values, the worse ones stopped early.

It is replayed as a whole by each command: what was trained is read, so that a killed one comes to the same.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_automl.auto.arms import Arm, space_of
from lightning_automl.auto.candidates import Candidate, candidate_of, write_simple_policies
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.runs import BUDGET, Job, Outcome, Runs
from lightning_automl.auto.shares import seconds_for
from lightning_automl.auto.standings import Standings
from lightning_automl.rundir import read_json
from lightning_automl.search.generations import Request, Scored, search
from lightning_automl.search.spaces import Space
from lightning_automl.studies.progress import bar, spoken

log = logging.getLogger("lightning_automl")

#: Name of the stage in the plan.
STAGE = "selection"

#: A rung is begun if it takes at most so many times what is left for it: estimates are not better than that.
_SLACK = 1.2


@dataclass(frozen=True)
class Selection:
    """What the competition came to.

    Attributes:
        simple: The best of the defaults.
        searched: The best of the tuned ones, if its mean is above that of the simple one.
        candidates: All, by their keys.
        leaders: Keys, the best first: those on most folds before the others, then by their means.
    """

    simple: Candidate
    searched: Candidate | None
    candidates: Mapping[str, Candidate]
    leaders: Sequence[str]


def select(
    runs: Runs, directory: Path, facts: Facts, plan: Mapping[str, Any], arms: Sequence[Arm], seed: int
) -> Selection:
    """Let the planned arms compete, within the time that the plan's later stages leave.

    Each candidate is trained on the search folds, one after the other, with the same seed; see
    :func:`~lightning_automl.search.generations.search` for who goes on. Leaves ``selection.json``, ``trials.csv``,
    ``study.json`` and ``policies/``, which are kept up to date after each rung.

    Args:
        runs: Train.
        directory: Of the strategy.
        facts: What was seen of the data.
        plan: Which arms with which policies, and how many candidates in each generation.
        arms: Those of the plan, at least.
        seed: Of all runs and of the sampler.

    Raises:
        StudyFailed: If no default could be trained.
        UserError: If all runs are refused.
        DiskFullError: If there is no space left.
    """
    write_simple_policies(directory, facts.space)
    planned = {arm["name"]: arm for arm in plan["arms"]}
    spaces = {arm.name: Space.parse(space_of(arm, facts)) for arm in arms if arm.name in planned}
    standings = Standings(plan, study_space(plan["arms"], spaces), seed)
    rungs = _Rungs(runs, directory, plan, spaces, standings)
    defaults, sizes = rungs.defaults(), plan["generations"][1:]
    if len(defaults) == 1 and not sum(sizes):
        log.info("selection: %s is the only candidate, there is nothing to choose", standings.candidates[0].title)
        standings.scored = [Scored(0, 0, defaults[0], state="PRUNED")]
    else:
        _, whole = search(
            *(standings.space, defaults, sizes, len(standings.folds), rungs.evaluate),
            direction=plan["direction"],
            seed=seed,
            reduction=plan["reduction"],
            patience=plan["patience"],
            on_rung=rungs.keep,
        )
        if not whole:
            log.warning("%s", standings.cut_sentence())
            runs.clock.cut(STAGE, standings.cut_sentence())
    rungs.write(final=True)
    return _result(standings)


def study_space(planned: Sequence[Mapping[str, Any]], spaces: Mapping[str, Space]) -> Space:
    """The space of all arms together: which arm, which policy, and the parameters ``ARM.NAME`` of the arm.

    Args:
        planned: Entries of the plan: ``name`` and ``policies``.
        spaces: By name of the arm.
    """
    entries: dict[str, Any] = {"arm": {"choice": [arm["name"] for arm in planned]}}
    for arm in planned:
        name, policy = arm["name"], policy_name(planned, arm["name"])
        condition = {} if policy == "policy" else {"when": {"arm": name}}
        entries[policy] = {"choice": list(arm["policies"]), **condition}
        for own, parameter in spaces[name].parameters.items():
            conditions = {f"{name}.{other}": list(wanted) for other, wanted in parameter.when.items()}
            described = {**parameter.describe(), "path": parameter.path, "when": {"arm": name, **conditions}}
            entries[f"{name}.{own}"] = described
    return Space.parse(entries)


def policy_name(planned: Sequence[Mapping[str, Any]], arm: str) -> str:
    """What the policy of an arm is called in the space of all: one parameter if all have the same policies."""
    shared = all(each["policies"] == planned[0]["policies"] for each in planned)
    return "policy" if shared else f"{arm}.policy"


class _Rungs:
    """Trains the candidates that the search for generations asks for, as far as there is time."""

    def __init__(
        self,
        runs: Runs,
        directory: Path,
        plan: Mapping[str, Any],
        spaces: Mapping[str, Space],
        standings: Standings,
    ) -> None:
        self.runs = runs
        self.directory = directory
        self.plan = plan
        self.spaces = spaces
        self.standings = standings
        self.rung = 0
        self.best = ""
        former = (read_json(directory / "selection.json") or {}).get("cut_at")
        # Where a former command with this budget has ended the selection: what it had is all that counts there.
        self.cut_at: int | None = former["rung"] if former and former["budget"] == plan["budget"] else None

    def defaults(self) -> list[dict[str, Any]]:
        """Values of the first generation, for the sampler: all arms with their simplest policy, then with the next."""
        planned = self.plan["arms"]
        most = max(len(arm["policies"]) for arm in planned)
        pairs = [
            (arm, arm["policies"][place]) for place in range(most) for arm in planned if place < len(arm["policies"])
        ]
        found = []
        for number, (arm, policy) in enumerate(pairs[: self.plan["generations"][0]]):
            name = arm["name"]
            candidate = candidate_of(self.directory, arm, policy)
            self.standings.candidates[number] = candidate
            own = self.spaces[name].values_in(candidate.config)
            values = {f"{name}.{key}": value for key, value in own.items()}
            found.append({"arm": name, policy_name(planned, name): policy, **values})
        return found

    def evaluate(self, requests: Sequence[Request]) -> dict[int, float | None]:
        """The value of each candidate on a fold, by number; those without time are missing."""
        self.rung += 1
        fold, generation = self.standings.folds[requests[0].step], requests[0].generation
        jobs = [Job(self._candidate(each), fold, self.standings.seed) for each in requests]
        chosen = self._affordable(jobs)
        outcomes = self._train([jobs[place] for place in chosen], f"selection, generation {generation}")
        found: dict[int, float | None] = {}
        for place, outcome in zip(chosen, outcomes, strict=True):
            if outcome.reason != BUDGET:
                number = requests[place].number
                self.standings.outcomes[number].append(outcome)
                found[number] = outcome.value
        if len(found) < len(requests) and self.cut_at is None:
            self.cut_at = self.rung
        return found

    def keep(self, scored: Sequence[Scored]) -> None:
        """Write what is known after a rung; end if no default is left."""
        self.standings.scored = list(scored)
        if leaders := self.standings.ranked():
            title = self.standings.candidates[leaders[0].number].title
            self.best = f"{title} {leaders[0].mean():.4f}"
        self.write(final=False)
        self.standings.simple()

    def write(self, *, final: bool) -> None:
        """Write all files of the selection."""
        cut = self.cut_at is not None and self.rung >= self.cut_at
        self.standings.write(
            self.directory,
            final=final,
            cut=self.standings.cut_sentence() if cut else None,
            cut_at=None if self.cut_at is None else {"rung": self.cut_at, "budget": self.plan["budget"]},
        )

    def _candidate(self, request: Request) -> Candidate:
        known = self.standings.candidates
        if request.number not in known:
            arm = request.values["arm"]
            policy, space = policy_name(self.plan["arms"], arm), self.spaces[arm]
            names = [name for name in request.values if name not in ("arm", policy)]
            own = {name.removeprefix(f"{arm}."): request.values[name] for name in names}
            values = {name: space.parameters[name].decode(value) for name, value in own.items()}
            planned = next(each for each in self.plan["arms"] if each["name"] == arm)
            known[request.number] = candidate_of(self.directory, planned, request.values[policy], values, space)
        return known[request.number]

    def _affordable(self, jobs: Sequence[Job]) -> list[int]:
        """Places of the jobs that there is time for: all, or those that are settled.

        Of the very first rung the first ones that fit, one at least, since something has to come of any budget.
        """
        everything = list(range(len(jobs)))
        settled = [place for place in everything if self.runs.is_settled(jobs[place])]
        if self.cut_at is not None:
            return everything if self.rung < self.cut_at else settled
        most = _SLACK * max(0.0, seconds_for(STAGE, self.plan, self.runs.clock))
        if self.runs.wall_seconds(jobs) <= most:
            return everything
        if self.rung > 1:
            return settled
        fitting = [count for count in everything if self.runs.wall_seconds(jobs[:count]) <= most]
        return sorted({*everything[: max(1, *fitting)], *settled})

    def _train(self, jobs: Sequence[Job], what: str) -> list[Outcome]:
        """Train what is not trained yet, and tell of it."""
        waiting = {job.candidate.key: job for job in jobs if not self.runs.is_settled(job)}
        total, done = len(waiting), 0
        needed, left = self.runs.wall_seconds(jobs), seconds_for(STAGE, self.plan, self.runs.clock)
        with bar("runs", total) as advance:

            def told(job: Job, outcome: Outcome) -> None:
                nonlocal done
                if waiting.pop(job.candidate.key, None) is None:
                    return
                done += 1
                rest = self.runs.wall_seconds(list(waiting.values()))
                best = f"; best {self.best}" if self.best else ""
                more = f", about {spoken(rest)} left of the rung" if rest else ""
                log.info("%s: %d/%d %s%s%s", what, done, total, self._words(job, outcome), best, more)
                advance(done, self.best)

            return self.runs.each(
                jobs,
                at_least=1 if self.rung == 1 else 0,
                # At most half of what is meant for later stages: a wrong estimate should not cost all of them.
                within=max(1.5 * needed, (left + self.runs.clock.left()) / 2),
                on_run=told,
            )

    def _words(self, job: Job, outcome: Outcome) -> str:
        run = f"{job.candidate.title}, fold {job.fold}"
        if outcome.value is None:
            return f"{run}: {'no time left' if outcome.reason == BUDGET else outcome.reason}"
        return f"{run}: {self.standings.metric} {outcome.value:.4f} ({outcome.seconds:.0f} s)"


def _result(standings: Standings) -> Selection:
    simple, searched = standings.simple(), standings.searched()
    for what, each in (("the best default is", simple), ("above it is", searched)):
        if each is not None:
            folds = f"{len(each.results)} fold{'' if len(each.results) == 1 else 's'}"
            value = f" ({standings.metric} {each.mean():.4f} on {folds})" if each.results else ""
            log.info("selection: %s %s%s", what, standings.candidates[each.number].title, value)
    return Selection(
        standings.candidates[simple.number],
        None if searched is None else standings.candidates[searched.number],
        {each.key: each for each in reversed(standings.candidates.values())},
        standings.leaders(),
    )
