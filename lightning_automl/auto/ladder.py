"""How much is done in a time: a programme that is added to, the most wanted first, as long as the time allows it.

First the arms that compete, each trained for half of its epochs at least, some final seeds, and TrivialAugment beside
no policy; then what is tuned, if the time is enough to compare it; then more epochs, folds, arms and searches. Each has
a share of the time that it may take at most. A longer budget adds to the programme of a former plan.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from lightning_automl.auto.costs import Costs, Programme

#: Shares of an arm's default epochs that it may be trained for.
SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
#: The smallest share with which one of two arms, or the likely best, is taken in, and with which others are: what is
#: trained for too short says little. Nothing else is taken in before all there are have so many.
FEW_EPOCHS, MORE_EPOCHS = 0.5, 0.7
#: So many arms are wanted before any is trained for longer.
FIRST_ARMS = 3
#: Policies that need no search, the simplest first.
POLICIES = ("none", "trivial_augment")

#: Seconds, those of evaluation and report not counted, from which something is searched.
SEARCHED_FROM = 450.0
#: Final seeds that are wanted before there is more of anything else, and the most that what is left is used for.
SEEDS, MOST_SEEDS = 3, 10

# Shares of the time ---------------------------------------------------------------------------------------------------

#: Of the final trainings with SEEDS, by which it is decided how long a run may take …
FINAL = 0.45
#: … up to so many seconds for one run, from where on a run may take only half as large a share.
LONG_RUN = 300.0
#: Of a run, as long as there is one arm alone: before it has FEW_EPOCHS, and then; and of its seeds.
ALONE_FEW, ALONE, SEEDS_ALONE = 0.45, 0.3, 0.85
#: Of all arms with their defaults, of candidates with tuned values and of each search.
DEFAULTS, TUNED, POLICY, ARCHITECTURE, COMPARISON = 0.55, 0.2, 0.2, 0.3, 0.25

#: Images of the rarest class in a fold from which a policy is searched on it.
FEWEST_FOR_POLICY = 10
#: Runs of each of both in a comparison, at least, and the most seeds.
PAIRS, MOST_COMPARED = 4, 5
#: Policies scored a round, from few to many; epochs of the architecture search likewise.
POLICY_TRIALS = (40, 60, 100, 150, 200)
CELL_EPOCHS = (15, 20, 30, 40, 50)


class Ladder:
    """Climbs.

    Args:
        costs: What everything takes.
        order: Names of the arms that compete, the likely best first.
    """

    def __init__(self, costs: Costs, order: list[str]) -> None:
        self.costs = costs
        self.order = order
        rarest = min(self._rarest() / costs.facts.folds, math.inf)
        self.may_search_policies = len(costs.facts.search_folds) > 1 and rarest >= FEWEST_FOR_POLICY
        self.may_search_cells = (
            len(costs.facts.search_folds) > 1 and costs.supernet is not None and "pcdarts" in costs.arms
        )

    def _rarest(self) -> int:
        counts = self.costs.facts.counts
        return min(train + val for train, val in zip(counts["train"], counts["val"], strict=True))

    def climb(self, seconds: float, start: Programme | None = None) -> Programme | None:
        """The programme for a time.

        Args:
            seconds: Wall time without evaluation and report.
            start: A programme that the time allows; it is added to, and its epochs stay.

        Returns:
            None if not even one epoch of one arm fits.
        """
        programme = start if start is not None else self._first(seconds)
        if programme is None or self.costs.total(programme) > seconds:
            return programme
        pinned = frozenset(start.epochs if start else ())
        rungs = (
            partial(self._longer, pinned=pinned, most=FEW_EPOCHS),
            partial(self._more_defaults, most=FIRST_ARMS, policies=POLICIES[:1]),
            self._seeds,
            partial(self._more_defaults, most=FIRST_ARMS, policies=POLICIES),
            self._compared,
            partial(self._longer, pinned=pinned, most=1.0),
            self._more_folds,
            partial(self._more_defaults, most=len(self.order), policies=POLICIES),
            self._searches,
        )
        for rung in rungs:
            programme = self._climbed(programme, seconds, rung)
        return self._filled(programme, seconds)

    def _filled(self, programme: Programme, seconds: float) -> Programme:
        """The same with as many final seeds as what is left allows; they make way when something better comes."""
        for seeds in range(MOST_SEEDS, programme.seeds, -1):
            more = replace(programme, seeds=seeds)
            if self.costs.total(more) <= seconds and self.costs.final(more) <= FINAL * seconds:
                return more
        return programme

    def run_limit(self, seconds: float) -> float:
        """How long a run may take so that SEEDS of them take their share."""
        share = FINAL / math.ceil(SEEDS / self.costs.workers)
        return min(share * seconds, max(LONG_RUN, share / 2 * seconds))

    def smallest_scale(self, now: Programme, arm: str) -> float:
        """The share of its default epochs with which an arm is taken in at least."""
        return FEW_EPOCHS if len(now.epochs) < 2 or arm == self.order[0] else MORE_EPOCHS

    def epochs_within(self, arm: str, limit: float, smallest: float) -> int | None:
        """The most epochs with which a run takes at most so long; None if it takes longer even with the fewest."""
        for scale in SCALES:
            epochs = max(1, round(scale * self.costs.default[arm]))
            if scale >= smallest and self.costs.run(arm, epochs) <= limit:
                return epochs
        return None

    def _first(self, time: float) -> Programme | None:
        """The arm that takes the least time, alone."""
        arm = min(self.order, key=lambda name: self.costs.run(name, 1))
        if self.costs.run(arm, 1) > time:
            return None
        return Programme({arm: 1}, ((arm, POLICIES[0]),))

    def _has_few(self, programme: Programme, arm: str) -> bool:
        return programme.epochs[arm] >= max(1, round(FEW_EPOCHS * self.costs.default[arm]))

    def _climbed(
        self, programme: Programme, time: float, upgrades: Callable[[Programme, float], Iterator[Programme]]
    ) -> Programme:
        """Take the upgrades that fit; each is made of what the former ones came to."""
        while True:
            better = next((each for each in upgrades(programme, time) if self.costs.total(each) <= time), None)
            if better is None:
                return programme
            programme = better

    # Upgrades: each yields programmes to try, the most wanted first, and none that is out of proportion ---------------

    def _longer(self, now: Programme, time: float, pinned: frozenset[str], most: float) -> Iterator[Programme]:
        """More epochs of an arm, one share more at a time, up to ``most`` of its default epochs."""
        for arm, epochs in now.epochs.items():
            limit = self.run_limit(time)
            if len(now.epochs) == 1:
                limit = max(limit, (ALONE if self._has_few(now, arm) else ALONE_FEW) * time)
            steps = sorted({max(1, round(scale * self.costs.default[arm])) for scale in SCALES if scale <= most})
            longer = next((each for each in steps if each > epochs), None)
            if arm not in pinned and longer is not None and self.costs.run(arm, longer) <= limit:
                grown = now.with_epochs(arm, longer)
                if self._fits_defaults(grown, time):
                    yield grown

    def _seeds(self, now: Programme, time: float) -> Iterator[Programme]:
        """One seed more, as long as there are fewer than wanted."""
        more = replace(now, seeds=now.seeds + 1)
        share = FINAL if len(now.defaults) > 1 else SEEDS_ALONE
        if more.seeds <= SEEDS and self.costs.final(more) <= max(share * time, self.costs.final(now)):
            yield more

    def _more_defaults(self, now: Programme, time: float, most: int, policies: Sequence[str]) -> Iterator[Programme]:
        """One candidate more, of the first ``most`` arms that can be run in the time."""
        for arm, policy in self._wanted(now, time, most, policies):
            if (arm, policy) in now.defaults:
                continue
            grown = now
            if arm not in now.epochs:
                epochs = self.epochs_within(arm, self.run_limit(time), self.smallest_scale(now, arm))
                assert epochs is not None
                fewest = max(1, round(self.smallest_scale(now, arm) * self.costs.default[arm]))
                grown = now.with_epochs(arm, min(epochs, fewest))
            grown = grown.with_default(arm, policy)
            if self._fits_defaults(grown, time):
                yield grown

    def _more_folds(self, now: Programme, time: float) -> Iterator[Programme]:
        """One fold more to judge on, while none has to be kept for a comparison."""
        more = replace(now, folds=now.folds + 1)
        if now.compared:
            return
        if len(now.defaults) > 1 and more.folds <= self.costs.facts.folds and self._fits_defaults(more, time):
            yield more

    def _wanted(self, now: Programme, time: float, most: int, policies: Sequence[str]) -> list[tuple[str, str]]:
        """Default candidates, the most wanted first: all arms with the simplest policy, then with the next."""
        there = [arm for arm in self.order if arm in now.epochs]
        able = [arm for arm in self.order if arm not in there and self._is_able(arm, now, time)]
        arms = [*there, *able][:most]
        return [(arm, policy) for policy in policies for arm in arms]

    def _is_able(self, arm: str, now: Programme, time: float) -> bool:
        return self.epochs_within(arm, self.run_limit(time), self.smallest_scale(now, arm)) is not None

    def _fits_defaults(self, programme: Programme, time: float) -> bool:
        return self.costs.selection(replace(programme, tuned=())) <= DEFAULTS * time

    def _compared(self, now: Programme, time: float) -> Iterator[Programme]:
        """The first tuned generation together with the comparison that it needs."""
        if time >= SEARCHED_FROM and self.costs.facts.comparison_folds and not now.compared:
            seeds = math.ceil(PAIRS / len(self.costs.facts.comparison_folds))
            yield replace(now, compared=seeds, tuned=(self._generation,), seeds=min(now.seeds, SEEDS))

    @property
    def _generation(self) -> int:
        return max(4, 2 * self.costs.workers)

    def _searches(self, now: Programme, time: float) -> Iterator[Programme]:
        """More of what is searched, if there is a comparison for it."""
        if not now.compared:
            return
        more = replace(now, tuned=(*now.tuned, self._generation))
        if self.costs.selection(more) - self.costs.selection(replace(now, tuned=())) <= TUNED * time:
            yield more
        trials = next((each for each in POLICY_TRIALS if each > now.policies), None)
        if self.may_search_policies and trials is not None:
            more = replace(now, policies=trials)
            if self.costs.policy_search(more) <= POLICY * time:
                yield more
        yield from self._cells(now, time)
        more = replace(now, compared=now.compared + 1)
        if more.compared <= MOST_COMPARED and self.costs.comparison(more) <= COMPARISON * time:
            yield more

    def _cells(self, now: Programme, time: float) -> Iterator[Programme]:
        longer = next((each for each in CELL_EPOCHS if each > now.cells), None)
        epochs = self.epochs_within("pcdarts", self.run_limit(time), FEW_EPOCHS) if self.may_search_cells else None
        if epochs is not None and longer is not None:
            more = replace(now, cells=longer, cell_epochs=max(now.cell_epochs, epochs))
            if self.costs.architecture_search(more) <= ARCHITECTURE * time:
                yield more
