"""Whether what was searched is adopted: it has to beat the best simple arm on folds that no choice has seen."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_automl.auto.candidates import Candidate
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.runs import BUDGET, Job, Outcome, Runs
from lightning_automl.auto.shares import seconds_for
from lightning_automl.rundir import read_json

log = logging.getLogger("lightning_automl")

#: Name of the stage in the plan.
STAGE = "comparison"
#: First seed of the comparison, beside the one that choices were made with.
FRESH = 1000

#: What was searched, with its verb, by the kind of search.
_SUBJECTS = {
    "hyper-parameters": ("The tuned hyper-parameters", "are"),
    "policy": ("The searched augmentation policy", "is"),
    "architecture": ("The searched architecture", "is"),
}

_Values = dict[tuple[int, int], float]


def compare(
    runs: Runs,
    plan: Mapping[str, Any],
    facts: Facts,
    simple: Candidate,
    searched: Candidate | None,
    kind: str,
    *,
    seed: int = 0,
    tried: int = 1,
    why: str = "",
) -> dict[str, Any]:
    """Train both on the comparison folds with fresh seeds, the same for both, and judge the searched one.

    The value of a run is the metric after its last epoch. The searched one is adopted if the interval of the paired
    differences (:func:`~lightning_automl.metrics.comparison.corrected_resampled_t_test`) excludes zero in its favour.
    Equal arms, a single pair and a run that has failed claim nothing. Seeds that do not fit into the time are left out,
    which is noted as a cut.

    Args:
        runs: Trains them, once, and knows how much time is left.
        plan: Says in ``comparison`` how many ``seeds``, and when to end.
        facts: Knows the comparison folds.
        simple: The best simple arm.
        searched: What is to beat it; None if there is nothing.
        kind: Of what was searched: ``hyper-parameters``, ``policy`` or ``architecture``.
        seed: Of the strategy; the runs have seeds that begin ``FRESH`` later.
        tried: How many challengers ``searched`` is the best of.
        why: A sentence for ``searched`` of None, where a comparison was planned.

    Returns:
        What ``comparison.json`` holds.
    """
    record = {"metric": plan["metric"], "direction": plan["direction"], "simple": simple.key}
    wanted = plan[STAGE]
    if searched is None or wanted is None or searched.key == simple.key:
        reason = (plan.get("why_not") or {}).get(STAGE, "") if wanted is None else why
        reason = reason.strip().removesuffix(".") or "There was nothing to compare"
        sentence = f"{reason[0].upper()}{reason[1:]}; the simple arm is kept."
        return record | {"adopted": "simple", "sentence": sentence}
    outcomes = _trained(runs, plan, facts, (simple, searched), seed, int(wanted["seeds"]))
    values = _values(outcomes, (simple, searched))
    record |= {
        **{"searched": searched.key, "kind": kind},
        "values": {name: _rows(own) for name, own in zip(("simple", "searched"), values, strict=True)},
    }
    if not values[1]:
        record |= dict.fromkeys(("difference", "low", "high", "p_value"))
        sentence = f"{_SUBJECTS[kind][0]} could not be compared, since the time was over; the simple arm is kept."
        return record | {"adopted": "simple", "better": False, "sentence": sentence}
    from lightning_automl.studies.acceptance import paired  # brings torch

    found = paired(values[1], values[0], plan["direction"], *_images(outcomes))
    record |= {**found, "adopted": "searched" if found["better"] else "simple"}
    failed = next((each.reason for _, each in outcomes if each.value is None and each.reason != BUDGET), "")
    return record | {"sentence": _sentence(record, values[1], simple, searched, failed, tried)}


class Challenger(NamedTuple):
    """What a search has found.

    Args:
        candidate: To be trained.
        kind: ``hyper-parameters``, ``policy`` or ``architecture``.
    """

    candidate: Candidate
    kind: str


class Choice(NamedTuple):
    """Which of several challengers is compared.

    Args:
        challenger: None if none is better than the simple arm on the search folds.
        tried: How many have values there.
        means: ``key``, ``title``, ``kind`` and ``mean`` of all, the simple arm's first; the mean is None where a run
            has no value. Empty without challengers.
        sentence: Why there is none, or which it is.
    """

    challenger: Challenger | None
    tried: int
    means: list[dict[str, Any]]
    sentence: str


def best_challenger(
    runs: Runs,
    plan: Mapping[str, Any],
    simple: Candidate,
    challengers: Sequence[Challenger],
    *,
    seed: int = 0,
) -> Choice:
    """The challenger with the best mean on the search folds, if that is better than the simple arm's.

    So only one has to stand the comparison, which then needs no correction for several. Challengers whose runs do not
    fit into the time any more are left out, which is noted as a cut.

    Args:
        runs: Trains them, once; those of the selection are there already.
        plan: Says which folds and metric.
        simple: The best simple arm.
        challengers: What was found by searches.
        seed: Of the runs, that of the selection.
    """
    unique = {each.candidate.key: each for each in (*reversed(challengers), Challenger(simple, "simple"))}
    challengers = [each for each in challengers if unique[each.candidate.key] is each]
    if not challengers:
        return Choice(None, 0, [], "Nothing that was searched is left to compare.")
    known = (Challenger(simple, "simple"), *challengers)
    outcomes = _on_search_folds(runs, plan, known, seed)
    means = [
        {"key": own.key, "title": own.title, "kind": kind, "mean": _mean(found)}
        for (own, kind), found in zip(known, outcomes, strict=True)
    ]
    tried = sum(row["mean"] is not None for row in means[1:])
    if means[0]["mean"] is None or not tried:
        return Choice(None, tried, means, "What was searched has no value on every search fold.")
    sign = 1 if plan["direction"] == "maximize" else -1
    rated = [-math.inf if row["mean"] is None else sign * row["mean"] for row in means]
    best = rated.index(max(rated))  # of equal ones the first, so that the simple arm is left for better ones alone
    if best == 0:
        top = max(range(1, len(means)), key=rated.__getitem__)
        subject = (
            _SUBJECTS[challengers[top - 1].kind][0]
            if len(challengers) == 1
            else f"None of {tried} searched challengers"
        )
        verb = "did not outperform" if len(challengers) == 1 else "outperformed"
        numbers = f"{plan['metric']} {means[top]['mean']:.4f}, and {means[0]['mean']:.4f} of {simple.title}"
        return Choice(None, tried, means, f"{subject} {verb} the simple arm on the search folds ({numbers})")
    chosen = challengers[best - 1]
    log.info("%s is the best of %d that were searched, on the search folds", chosen.candidate.title, tried)
    return Choice(chosen, tried, means, f"{chosen.candidate.title} is the best on the search folds")


def _on_search_folds(
    runs: Runs, plan: Mapping[str, Any], known: Sequence[Challenger], seed: int
) -> list[list[Outcome]]:
    """What came of each one's runs, all trained together; nothing of those that there is no time for."""
    clock = runs.clock
    left = seconds_for(STAGE, plan, clock) - _kept_for_half(runs, plan, known[0].candidate, seed)
    jobs: dict[int, list[Job]] = {}
    for number, (candidate, kind) in enumerate(known):
        own = [Job(candidate, fold, seed) for fold in plan["search_folds"]]
        needed = runs.wall_seconds([*_all(jobs), *own])
        if all(map(runs.is_settled, own)) or (needed <= left and _judgement(kind) not in clock.cuts):
            jobs[number] = own
        else:
            clock.cut(_judgement(kind), f"No time was left to judge {candidate.title}.")
    everything = _all(jobs)
    within = max(1.5 * runs.wall_seconds(everything), seconds_for(STAGE, plan, clock))
    found = iter(runs.each(everything, within=within))
    outcomes = [[next(found) for _ in jobs.get(number, ())] for number in range(len(known))]
    for (candidate, kind), own_outcomes in zip(known, outcomes, strict=True):
        if any(each.reason == BUDGET for each in own_outcomes):
            clock.cut(_judgement(kind), f"No time was left to judge {candidate.title} on all folds.")
    return outcomes


def _kept_for_half(runs: Runs, plan: Mapping[str, Any], simple: Candidate, seed: int) -> float:
    """Seconds that are left to the comparison itself: half of its seeds, with runs as long as the simple arm's."""
    seeds = math.ceil((plan[STAGE] or {"seeds": 0})["seeds"] / 2)
    fresh = [Job(simple, fold, seed + FRESH + number) for number in range(seeds) for fold in plan["comparison_folds"]]
    return runs.wall_seconds([*fresh, *fresh])


def _all(jobs: Mapping[int, Sequence[Job]]) -> list[Job]:
    return [job for own in jobs.values() for job in own]


def _judgement(kind: str) -> str:
    """Name of a cut."""
    return f"judgement of the {kind}"


def _trained(
    runs: Runs, plan: Mapping[str, Any], facts: Facts, both: tuple[Candidate, Candidate], seed: int, seeds: int
) -> list[tuple[Job, Outcome]]:
    """The runs that there is time for, as many seeds at once as the workers can do, and what came of each."""
    folds, clock = facts.comparison_folds, runs.clock
    at_once = max(1, runs.workers.number // (len(both) * len(folds)))
    found: list[tuple[Job, Outcome]] = []
    for first in range(0, seeds, at_once):
        fresh = [seed + FRESH + number for number in range(first, min(first + at_once, seeds))]
        jobs = [Job(own, fold, each) for each in fresh for fold in folds for own in both]
        needed, left = runs.wall_seconds(jobs), seconds_for(STAGE, plan, clock)
        cut = f"The comparison was cut after {first} of {seeds} seeds, for lack of time."
        if needed and needed > left and STAGE not in clock.cuts:
            clock.cut(STAGE, cut)
        if STAGE in clock.cuts:  # what was cut stays so
            jobs = [job for job in jobs if runs.is_settled(job)]
        # At most half of what is meant for the final runs: a wrong estimate should not cost all of them.
        outcomes = runs.each(jobs, within=max(1.5 * needed, (left + clock.left()) / 2)) if jobs else []
        if any(each.reason == BUDGET for each in outcomes):
            clock.cut(STAGE, cut)
        found += zip(jobs, outcomes, strict=True)
    return found


def _values(outcomes: Sequence[tuple[Job, Outcome]], both: tuple[Candidate, Candidate]) -> tuple[_Values, _Values]:
    """By fold and seed, of pairs that the time has allowed; what has failed is NaN."""
    simple, searched = (
        {
            (job.fold, job.seed): math.nan if each.value is None else each.value
            for job, each in outcomes
            if job.candidate is own and job.fold is not None and each.reason != BUDGET
        }
        for own in both
    )
    pairs = [key for key in simple if key in searched]
    return {key: simple[key] for key in pairs}, {key: searched[key] for key in pairs}


def _rows(values: _Values) -> list[dict[str, Any]]:
    return [{"fold": fold, "seed": seed, "value": value} for (fold, seed), value in values.items()]


def _images(outcomes: Sequence[tuple[Job, Outcome]]) -> tuple[int, int]:
    """Images that a run was trained and validated on, the mean of those that have ended."""
    records = [read_json(each.place / "data.json") for _, each in outcomes if each.value is not None]
    counts = [record["counts"] for record in records if record]
    if not counts:  # nothing is claimed then
        return 1, 1
    train, val = (round(sum(sum(each[split]) for each in counts) / len(counts)) for split in ("train", "val"))
    return train, val


def _mean(outcomes: Sequence[Outcome]) -> float | None:
    values = [each.value for each in outcomes if each.value is not None]
    return math.fsum(values) / len(values) if values and len(values) == len(outcomes) else None


def _sentence(
    record: Mapping[str, Any], values: _Values, simple: Candidate, searched: Candidate, failed: str, tried: int
) -> str:
    """What came of the comparison, for a person, by rule."""
    from lightning_automl.studies.acceptance import difference_words

    kind = record["kind"]
    subject, verb = _SUBJECTS[kind]
    subject += " with tuned hyper-parameters" if kind != "hyper-parameters" and searched.values else ""
    subject += f", the best of {tried} searched challengers," if tried > 1 else ""
    same = (simple.arm, simple.policy) == (searched.arm, searched.policy)
    against = "the defaults" if same and kind == "hyper-parameters" else f"the simple arm ({simple.title})"
    if not math.isfinite(record["difference"]):
        return f"{subject} could not be compared with {against}: a run has failed ({failed}); the simple arm is kept."
    folds, seeds = (len({key[place] for key in values}) for place in (0, 1))
    where = f"on {folds} held-out {'fold' if folds == 1 else 'folds'} with {seeds} {'seed' if seeds == 1 else 'seeds'}"
    numbers = f"{difference_words(record['metric'], record)} {where}{' each' if folds > 1 else ''}"
    if record["better"]:
        return f"{subject} outperformed {against} ({numbers}) and {verb} adopted."
    alone = ", a single pair, which shows nothing" if len(values) == 1 else ""
    return f"{subject} did not outperform {against} ({numbers}{alone}); the simple arm is kept."
