"""Generations of candidates that are judged rung by rung, in an order that does not depend on who is done first.

Successive halving (Jamieson and Talwalkar, AISTATS 2016, https://arxiv.org/abs/1502.07943) where a rung is one more
fold and not more epochs: a candidate that is scored on another fold is as far trained as on the first one, so that its
values can be averaged. A generation is asked for as a whole, from what all former ones came to, and a rung is decided
when all of it is there. The asynchronous rule (Li et al., MLSys 2020) would need no waiting, but then the candidates
depend on which of two parallel runs was faster, and a search that was killed would not come to the same again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import allowing_experiments
from lightning_automl.search.study import derived_seed

#: Values that are new are asked for so many times, then drawn at random so many times; a small space has no more.
_TRIES, _RANDOM_TRIES = 5, 50

#: Of the first generation so many go on at least, that a lucky fold does not decide alone.
_LEAST = 2


@dataclass(frozen=True)
class Request:
    """A candidate that is to be scored.

    Args:
        number: Of the candidate, from 0.
        generation: From 0, that of the defaults.
        values: By name, as the study has them.
        step: On what: 0 for the first fold.
    """

    number: int
    generation: int
    values: Mapping[str, Any]
    step: int


#: Scores requests: the value of each by its number, None where it failed. Those that are missing were not scored, as
#: there was no time left; then nothing more is asked.
Evaluate = Callable[[Sequence[Request]], Mapping[int, float | None]]


@dataclass
class Scored:
    """A candidate and what it came to.

    Attributes:
        number: From 0, in the order in which they were asked for.
        generation: From 0, that of the defaults.
        values: By name, as the study has them; a default may lack some.
        results: Values of the steps so far.
        state: ``COMPLETE`` on all steps, ``PRUNED`` if it was dropped or there was no time, ``FAIL`` if a step failed;
            ``RUNNING`` before.
        dropped: Whether others were better, as against no time.
    """

    number: int
    generation: int
    values: dict[str, Any]
    results: list[float] = field(default_factory=list)
    state: str = "RUNNING"
    dropped: bool = False

    def mean(self, steps: int | None = None) -> float:
        """Over the first steps, or all so far; NaN without any."""
        some = self.results[:steps]
        return math.fsum(some) / len(some) if some else math.nan


def search(
    space: Space,
    defaults: Sequence[Mapping[str, Any]],
    sizes: Sequence[int],
    steps: int,
    evaluate: Evaluate,
    *,
    direction: str,
    seed: int,
    reduction: int = 3,
    patience: int = 1,
    on_rung: Callable[[Sequence[Scored]], None] = lambda scored: None,
) -> tuple[list[Scored], bool]:
    """Score the defaults and then generations of what a sampler proposes, the worse ones on few steps only.

    Of the defaults the best of ``reduction`` go on to the next step, two at least. One of a later generation goes on
    when it is among the best of ``reduction`` of all that were ever scored on its steps. They are compared by their
    means; of equal ones the earlier is better. Before ``patience`` steps all go on.

    Args:
        space: Of the values.
        defaults: Values of the first generation; what a default has no value for may be missing.
        sizes: Of the later generations; smaller where the space has no more values.
        steps: On how many steps, as folds, a candidate is scored at most, at least 1.
        evaluate: Scores a rung.
        direction: ``maximize`` or ``minimize``.
        seed: Of the sampler, together with the generation's number.
        reduction: Of how many one goes on, at least 2.
        patience: Steps that say enough to drop a candidate, at least 1: of few images one fold is luck.
        on_rung: Called with all candidates so far when a rung is decided.

    Returns:
        The candidates by number, and whether all were scored that should be. More sizes only add to them.
    """
    if min(steps, patience) < 1 or reduction < 2 or not defaults:
        raise ValueError(
            f"{len(defaults)} defaults, {steps} steps, reduction {reduction} and patience {patience} make no search"
        )
    scored: list[Scored] = []
    for generation, size in enumerate((len(defaults), *sizes)):
        if generation:
            values = propose(space, scored, size, direction=direction, seed=derived_seed(seed, generation))
        else:
            values = [dict(each) for each in defaults]
        new = [Scored(len(scored) + index, generation, each) for index, each in enumerate(values)]
        scored += new
        sign = 1 if direction == "minimize" else -1
        for _ in _climb(new, scored, steps, evaluate, sign, reduction, patience):
            on_rung(scored)
        if any(each.state == "PRUNED" and not each.dropped for each in new):
            return scored, False
    return scored, True


def _climb(
    new: list[Scored],
    scored: list[Scored],
    steps: int,
    evaluate: Evaluate,
    sign: int,
    reduction: int,
    patience: int,
) -> Iterator[int]:
    """Score a generation step by step, as far as there is time; each step when it is decided."""
    going = new
    for step in range(steps):
        found = evaluate([Request(each.number, each.generation, each.values, step) for each in going]) if going else {}
        for each in going:
            value = found.get(each.number)
            if value is not None:
                each.results.append(value)
            elif each.number in found:
                each.state = "FAIL"
        going = [each for each in going if each.state != "FAIL"]
        if any(each.number not in found for each in going):
            for each in going:
                each.state = "PRUNED"
            going = []
        elif step + 1 < steps:
            best = _best(scored, step + 1, sign, reduction)
            for each in going:
                if step + 1 >= patience and each.number not in best:
                    each.state, each.dropped = "PRUNED", True
            going = [each for each in going if not each.dropped]
        else:
            for each in going:
                each.state = "COMPLETE"
        yield step


def _best(scored: Sequence[Scored], steps: int, sign: int, reduction: int) -> set[int]:
    """Numbers of the best of all that have values of so many steps."""
    there = [each for each in scored if len(each.results) >= steps and each.state != "FAIL"]
    there.sort(key=lambda each: (sign * each.mean(steps), each.number))
    least = _LEAST if all(each.generation == 0 for each in there) else 1
    return {each.number for each in there[: max(least, math.ceil(len(there) / reduction))]}


def propose(space: Space, scored: Sequence[Scored], size: int, *, direction: str, seed: int) -> list[dict[str, Any]]:
    """Values of a generation, by TPE from what is known of others; none are among these, and none come twice.

    Bergstra et al., *Algorithms for Hyper-Parameter Optimization*, NeurIPS 2011. Those of a generation know of each
    other ("constant liar"), so that they spread. It begins to learn from the first value on: the defaults are a sample
    already, and to draw at random first would take most of what a small search has.

    Returns:
        At most ``size``; fewer where the space holds no more.
    """
    with allowing_experiments():
        sampler = TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=1, seed=seed)
    drawn = RandomSampler(seed=seed)
    study = study_of(space, scored, direction, sampler=sampler)
    known = [dict(each.values) for each in scored]
    found: list[dict[str, Any]] = []
    for _ in range(size):
        for attempt in range(_TRIES + _RANDOM_TRIES):
            # Where all is a choice TPE may come to what it thinks best again and again.
            study.sampler = sampler if attempt < _TRIES else drawn
            trial = study.ask()
            values = space.suggest(trial)
            if values not in known:
                known.append(values)
                found.append(values)
                break
            study.tell(trial, state=TrialState.FAIL)
        else:
            break
    return found


def study_of(
    space: Space,
    scored: Sequence[Scored],
    direction: str,
    *,
    name: str = "generations",
    sampler: optuna.samplers.BaseSampler | None = None,
    attributes: Mapping[int, Mapping[str, Any]] | None = None,
) -> optuna.Study:
    """A study in memory with a trial a candidate, of the same number; a report is the mean of the steps so far.

    Args:
        space: Of the values.
        scored: By number from 0, without gaps.
        direction: ``maximize`` or ``minimize``.
        name: Of the study.
        sampler: For those who ask it for more.
        attributes: User attributes by number.
    """
    storage = optuna.storages.InMemoryStorage()
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))  # it tells of each study that is made
    storage.create_new_study([optuna.study.StudyDirection[direction.upper()]], name)
    optuna.logging.set_verbosity(level)
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler or TPESampler(seed=0))
    for each in scored:
        study.add_trial(_trial(space, each, (attributes or {}).get(each.number, {})))
    return study


def _trial(space: Space, scored: Scored, attributes: Mapping[str, Any]) -> FrozenTrial:
    state = TrialState[scored.state]
    distributions = space.distributions()
    return create_trial(
        state=state,
        value=scored.mean() if scored.results and state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
        params=dict(scored.values),
        distributions={name: distributions[name] for name in scored.values},
        intermediate_values={steps: scored.mean(steps) for steps in range(1, len(scored.results) + 1)},
        user_attrs=dict(attributes),
    )
