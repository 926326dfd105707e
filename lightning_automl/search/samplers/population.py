"""Population based training as an Optuna sampler: each trial is one segment of the training of one member.

A *member* is one of the networks that are trained side by side, a *segment* the ``ready`` epochs after which a member
looks at the others. A trial starts from the checkpoint of the trial that its user attribute ``parent`` names.
"""

import math
import threading
import zlib
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_automl.rundir import UserError

#: User attributes of a segment. ``member`` comes last: a segment without it, as a kill leaves it, is nobody's.
ATTRIBUTES = ("schedule", "until", "parent", "donor", "member")

#: Between reading the trials and noting whose segment a new one is, no other thread may do the same.
_PLANNING = threading.Lock()


class PopulationSampler(BaseSampler):
    """Train a population; the worst take over weights and hyper-parameters of the best and vary the latter.

    Jaderberg et al., *Population Based Training of Neural Networks*, 2017, https://arxiv.org/abs/1711.09846
    (Algorithm 1; exploit by truncation selection, explore by perturbing or resampling). What is found is a schedule of
    values, not a point: the one of the best trial, in its user attribute ``schedule``.

    A new trial is the next segment of the member that has the fewest finished segments among those without a running
    one (of equal ones the first). Its user attributes are

    - ``member``: in 0 .. ``population`` - 1,
    - ``until``: epochs done at the end of the segment,
    - ``parent``: number of the trial whose checkpoint it starts from; absent in a first segment,
    - ``donor``: the same number when that trial was taken over from another member,
    - ``schedule``: ``[{"from_epoch": int, "values": {name: value}}, ...]`` of all segments from the first to this one.

    First segments have random values, or those of an enqueued trial; enqueued later, values are those of the next
    segment, whoever's it is. The space has to be the same for all trials, without conditions.

    Exploit: a member with k finished segments is compared in its k-th with the k-th of all n members that have one.
    If it is among the worst ``bottom`` of them, the parent is one of the best ``top``, drawn uniformly, unless it
    has the very same value. A share of n is rounded up, but at most n // 2. *Departure from the paper*, where a member
    is compared with the newest state of all others: a member that is ahead is better by its longer training alone, and
    its weights would bring more epochs along; here all weights of a segment were trained for the same epochs.

    Explore, after an exploit only: each parameter is drawn anew with ``resample_probability``, else multiplied by one
    of ``factors`` and clipped into its range; whole numbers and those with a step move by at least one step, as
    1 * 1.2 would stay 1 for ever; a choice is kept.

    A lost segment (user attribute ``lost``) is repeated from the same parent with the same values, and so is the first
    failure of a segment, which may be by chance. After the second, or when pruned (also as infeasible), the member
    exploits or, without a finished segment, draws anew.

    All draws are functions of ``seed``, member and segment, so that a study goes on as if it had not been interrupted;
    with one worker at a time it is deterministic. Two processes may, rarely, take the same segment: the first by
    number counts.

    Optuna expects a trial from every ask: when no member waits for a segment (see :meth:`wanted`), it has random
    values, none of the attributes, and is ignored afterwards. So threads ask :meth:`wanted` and for the trial under one
    lock.

    Args:
        population: Number of members, at least 2.
        ready: Epochs of a segment, at least 1.
        total: Epochs of a whole training, a multiple of ``ready``.
        bottom: Share of the population that exploits, in (0, 0.5].
        top: Share of the population that is taken over, in (0, 0.5].
        factors: Positive factors of which explore multiplies by one.
        resample_probability: Of drawing a parameter anew in explore, in [0, 1].
        seed: Of all draws, at least 0.

    Raises:
        UserError: For arguments out of these ranges, and for a study of several objectives.
    """

    def __init__(
        self,
        population: int = 8,
        ready: int = 1,
        *,
        total: int,
        bottom: float = 0.2,
        top: float = 0.2,
        factors: Sequence[float] = (0.8, 1.2),
        resample_probability: float = 0.25,
        seed: int = 0,
    ) -> None:
        if population < 2:
            raise UserError(f"population is {population}; members learn from each other, give at least 2")
        if ready < 1:
            raise UserError(f"ready is {ready}; it is the number of epochs of a segment, give at least 1")
        if total < ready or total % ready:
            raise UserError(f"total is {total} epochs and a segment (ready) {ready}; give a multiple of {ready}")
        for name, quantile in (("bottom", bottom), ("top", top)):
            if not 0 < quantile <= 0.5:
                raise UserError(f"{name} is {quantile}; it is a share of the population, give one in (0, 0.5]")
        if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise UserError(f"factors are {list(factors)}; give at least one, all above 0, as [0.8, 1.2]")
        if not 0 <= resample_probability <= 1:
            raise UserError(f"resample_probability is {resample_probability}; give one in [0, 1]")
        if seed < 0:
            raise UserError(f"seed is {seed}; give a whole number of at least 0")
        self.population = population
        self.ready = ready
        self.total = total
        self.bottom = bottom
        self.top = top
        self.factors = tuple(factors)
        self.resample_probability = resample_probability
        self.seed = seed

    def wanted(self, study: Study) -> bool:
        """Whether a new trial would be a segment of a member: one waits for it, or for the repetition of a lost one."""
        trials = study.get_trials(deepcopy=False)
        waiting = any(trial.state == TrialState.WAITING and _member(trial, trials) is not None for trial in trials)
        return waiting or self._due(trials) is not None

    def finished(self, study: Study) -> bool:
        """Whether all members were trained for ``total`` epochs."""
        return all(len(own) == self.total // self.ready for own in self._segments(study.get_trials(deepcopy=False)))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the member, its parent and its values, and note them in the trial's user attributes."""
        _check_single_objective(study)
        if "member" in trial.user_attrs:  # a second `optuna.Trial` of the same trial, perhaps in another process
            return
        with _PLANNING:
            note(study, trial, self._plan(whole(study), trial))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: values hang on the trial's place in the population, which is known without a space."""
        _check_single_objective(study)
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The values of :meth:`sample_independent`."""
        _check_single_objective(study)
        return {name: self.sample_independent(study, trial, name, each) for name, each in search_space.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The planned value, or a random one where nothing is planned: in first segments."""
        _check_single_objective(study)
        if "schedule" not in trial.user_attrs:
            generator = self._generator("extra", trial.number, param_name)
            return _draw(study, trial, param_name, param_distribution, generator)
        *earlier, segment = trial.user_attrs["schedule"]
        if param_name in segment["values"] and allows(param_distribution, segment["values"][param_name]):
            return segment["values"][param_name]
        attributes = trial.user_attrs
        generator = self._generator("first", attributes["member"], attributes["until"], param_name)
        value = _draw(study, trial, param_name, param_distribution, generator)
        values = {**segment["values"], param_name: value}
        note(study, trial, {"schedule": [*earlier, {**segment, "values": values}]})
        return value

    def _plan(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """The attributes of a new trial; none when no member waits for a segment."""
        trials = study.get_trials(deepcopy=False)
        retried = _retried(trial, trials)
        if retried is not None and "member" in retried.user_attrs:
            plan = _attributes(retried)
        elif (member := self._due(trials)) is not None:
            plan = self._next_segment(study, trial, trials, member)
        else:
            return {}
        *earlier, segment = plan["schedule"]
        values = {**segment["values"], **trial.system_attrs.get("fixed_params", {})}  # of an enqueued trial
        return {**plan, "schedule": [*earlier, {**segment, "values": values}]}

    def _next_segment(
        self, study: Study, trial: FrozenTrial, trials: Sequence[FrozenTrial], member: int
    ) -> dict[str, Any]:
        segments = self._segments(trials)
        until = (len(segments[member]) + 1) * self.ready
        tries = [
            each
            for each in trials
            if each.state in (TrialState.FAIL, TrialState.PRUNED)
            and (each.user_attrs.get("member"), each.user_attrs.get("until")) == (member, until)
        ]
        failures = sum(not each.user_attrs.get("lost") for each in tries)
        if tries and (tries[-1].user_attrs.get("lost") or (failures == 1 and tries[-1].state == TrialState.FAIL)):
            return _attributes(tries[-1])
        if segments[member]:
            return self._continued(study, trial, trials, segments, member, failures)
        values = {}
        if tries:  # else they are drawn when they are asked for, as the space is not known before the first trial
            for name, distribution in sorted(tries[-1].distributions.items()):
                generator = self._generator("again", member, failures, name)
                values[name] = _draw(study, trial, name, distribution, generator)
        return {"schedule": [{"from_epoch": 0, "values": values}], "until": until, "member": member}

    def _continued(
        self,
        study: Study,
        trial: FrozenTrial,
        trials: Sequence[FrozenTrial],
        segments: list[list[FrozenTrial]],
        member: int,
        failures: int,
    ) -> dict[str, Any]:
        """Exploit and explore, or go on."""
        done = len(segments[member])
        key = ("next", member, done, failures)
        parent = segments[member][-1]
        peers = [own[done - 1] for own in segments if len(own) >= done]
        donors = self._donors(study.direction, peers, parent, forced=failures > 0)
        donor = donors[self._generator(*key).integers(len(donors))] if donors else None
        parent = donor or parent
        values = dict(parent.params)
        if donor or failures:
            for name, distribution in parent.distributions.items():
                generator = self._generator(*key, name)
                values[name] = self._explore(study, trial, name, distribution, values[name], generator)
        numbers = lineage(trials, parent.number)
        past = [{"from_epoch": k * self.ready, "values": dict(trials[n].params)} for k, n in enumerate(numbers)]
        return {
            "schedule": [*past, {"from_epoch": done * self.ready, "values": values}],
            "until": (done + 1) * self.ready,
            "parent": parent.number,
            **({"donor": donor.number} if donor else {}),
            "member": member,
        }

    def _donors(
        self, direction: StudyDirection, peers: list[FrozenTrial], own: FrozenTrial, *, forced: bool
    ) -> list[FrozenTrial]:
        """Whom ``own`` may take over, best first: nobody unless it is among the worst, or has to."""
        sign = -1 if direction == StudyDirection.MAXIMIZE else 1
        ranking = sorted(peers, key=lambda peer: (sign * _value(peer), peer.number))
        worst = ranking[len(ranking) - _count(self.bottom, len(ranking)) :]
        if not forced and own.number not in {peer.number for peer in worst}:
            return []
        best = ranking[: _count(self.top, len(ranking))]
        return [peer for peer in best if _value(peer) != _value(own)]

    def _explore(
        self,
        study: Study,
        trial: FrozenTrial,
        name: str,
        distribution: BaseDistribution,
        value: Any,
        generator: np.random.Generator,
    ) -> Any:
        if generator.random() < self.resample_probability:
            return _draw(study, trial, name, distribution, generator)
        if not isinstance(distribution, FloatDistribution | IntDistribution):
            return value
        return perturb(value, distribution, self.factors[generator.integers(len(self.factors))])

    def _segments(self, trials: Sequence[FrozenTrial]) -> list[list[FrozenTrial]]:
        """The finished segments of each member, in order."""
        found: dict[tuple[int, int], FrozenTrial] = {}
        for trial in trials:
            if trial.state == TrialState.COMPLETE and "member" in trial.user_attrs:
                # A second trial for the same segment, of a process that asked at the same moment, does not count.
                found.setdefault((trial.user_attrs["member"], trial.user_attrs["until"]), trial)
        segments = []
        for member in range(self.population):
            # Not by number: a thread that was held up between its number and its plan may have the earlier number.
            places = takewhile(found.__contains__, ((member, until) for until in count(self.ready, self.ready)))
            segments.append([found[place] for place in places])
        return segments

    def _due(self, trials: Sequence[FrozenTrial]) -> int | None:
        """The member whose segment is next."""
        segments = self._segments(trials)
        busy = {_member(trial, trials) for trial in trials if not trial.state.is_finished()}
        free = [member for member, own in enumerate(segments) if len(own) < self.total // self.ready]
        return min((m for m in free if m not in busy), key=lambda member: len(segments[member]), default=None)

    def _generator(self, *key: int | str) -> np.random.Generator:
        """A new one for each draw, so that none hangs on draws before it, which a resumed study does not repeat."""
        words = [each if isinstance(each, int) else zlib.crc32(each.encode()) for each in key]
        return np.random.default_rng([self.seed, *words])


def lineage(trials: Sequence[FrozenTrial], number: int) -> list[int]:
    """The trials whose segments, one after the other, made the weights of trial ``number``.

    Args:
        trials: All trials of a study of :class:`PopulationSampler`, by number.
        number: Of one of them.

    Returns:
        Trial numbers, from a first segment to ``number`` itself.
    """
    numbers = [number]
    while (parent := trials[numbers[-1]].user_attrs.get("parent")) is not None:
        numbers.append(parent)
    return numbers[::-1]


def perturb(value: float, distribution: FloatDistribution | IntDistribution, factor: float) -> float:
    """Multiply a value, and stay in the distribution's range and on its grid.

    Args:
        value: Of the distribution.
        distribution: Its range and, for whole numbers or when it has a step, its grid, on which the value moves by at
            least one step.
        factor: Above 0.

    Returns:
        An ``int`` for whole numbers, else a ``float``.
    """
    low, high, step = distribution.low, distribution.high, distribution.step
    target = value * factor
    if step is None:
        return float(min(max(target, low), high))
    steps = round((target - value) / step)
    if steps == 0 and factor != 1:
        steps = 1 if target > value or (target == value and factor > 1) else -1
    position = min(max(round((value - low) / step) + steps, 0), round((high - low) / step))
    return min(low + position * step, high)  # 3 * 0.1 is above 0.3


def note(study: Study, trial: FrozenTrial, attributes: Mapping[str, Any]) -> None:
    """Set user attributes of a running trial from within a sampler.

    Args:
        study: The trial's.
        trial: As Optuna gives it to a sampler; it is changed too, as it is a copy that does not see the storage.
        attributes: JSON values by name.
    """
    for name, value in attributes.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)
        trial.user_attrs[name] = value


def allows(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value may be returned for a parameter."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:  # a choice that is not among the distribution's, or no number
        return False


def whole(study: Study) -> Study:
    """The study itself: with a Hyperband pruner Optuna shows a sampler the trials of one bracket only."""
    found: Study = getattr(study, "_study", study)
    return found


def _attributes(trial: FrozenTrial) -> dict[str, Any]:
    return {name: trial.user_attrs[name] for name in ATTRIBUTES if name in trial.user_attrs}


def _retried(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    number = trial.user_attrs.get("retry_of")
    return None if number is None else trials[number]


def _member(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int | None:
    """Whose segment it is or, of a repetition that has not begun, will be."""
    retried = _retried(trial, trials)
    member: int | None = (retried or trial).user_attrs.get("member")
    return trial.user_attrs.get("member", member)


def _draw(
    study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution, generator: np.random.Generator
) -> Any:
    sampler = RandomSampler(seed=int(generator.integers(2**32)))
    return sampler.sample_independent(study, trial, name, distribution)


def _count(share: float, number: int) -> int:
    """How many of ``number`` a share is; best and worst never overlap."""
    return min(math.ceil(round(share * number, 9)), number // 2)  # 0.07 * 100 is 7.000000000000001


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a COMPLETE trial has a value"
    return trial.value


def _check_single_objective(study: Study) -> None:
    if len(study.directions) > 1:
        raise UserError(
            f"population based training ranks by one value and the study has {len(study.directions)} objectives; "
            "give one monitor, or another sampler"
        )
