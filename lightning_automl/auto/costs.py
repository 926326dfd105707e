"""What runs and stages will take, from what was measured. Seconds are wall time; several runs share the workers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_automl.auto.arms import ARMS, default_epochs
from lightning_automl.auto.facts import Facts

#: Where a run is trained: on search folds but one; on all folds but one; on the data's own train split, or again on all
#: folds but one where images are few.
Kind = Literal["search", "comparison", "final"]

#: Time to validate an image, in multiples of that to train with it.
VALIDATION = 1 / 3
#: Of a generation one in so many goes on to the next fold, and of the first at least two.
REDUCTION, LEAST = 3, 2
#: What evaluation, pictures and report take, and their share of the budget.
_REPORT, _REPORT_SHARE = 8.0, 0.03
#: Sub-policies of a policy that Fast AutoAugment scores, and seconds that it takes beside operations and network.
_SUB_POLICIES, _PROPOSAL = 5, 0.03
#: Seconds that the operations take on a value of an image.
_OPERATIONS = 1e-7


def together(seconds: Iterable[float], workers: int) -> float:
    """Wall time of jobs that are done by several workers, the longest first."""
    ends = [0.0] * workers
    for each in sorted(seconds, reverse=True):
        ends[ends.index(min(ends))] += each
    return max(ends)


@dataclass(frozen=True)
class Programme:
    """What is to be done.

    Args:
        epochs: Of each arm, by name, in the order in which they were taken in.
        defaults: Arm and policy of the candidates of the first generation.
        folds: That candidates are judged on, one after the other, while there is no comparison; see ``Costs.folds``.
        tuned: Numbers of candidates in the later generations.
        seeds: Of the final training.
        compared: Seeds of the comparison, 0 for none.
        policies: Policies scored in each round of the policy search, 0 for none.
        cells: Epochs of the architecture search, 0 for none.
        cell_epochs: Epochs of the network of what it finds.
    """

    epochs: Mapping[str, int] = field(default_factory=dict)
    defaults: tuple[tuple[str, str], ...] = ()
    folds: int = 2
    tuned: tuple[int, ...] = ()
    seeds: int = 1
    compared: int = 0
    policies: int = 0
    cells: int = 0
    cell_epochs: int = 0

    def with_epochs(self, arm: str, epochs: int) -> "Programme":
        """The same with other epochs of an arm."""
        return replace(self, epochs={**self.epochs, arm: epochs})

    def with_default(self, arm: str, policy: str) -> "Programme":
        """The same with one candidate more."""
        return replace(self, defaults=(*self.defaults, (arm, policy)))


class Costs:
    """Knows what was measured.

    Args:
        facts: What was seen of the data.
        measured: ``measured.json``.
        workers: Runs at once.
    """

    #: Rounds of the policy search on each fold.
    rounds = 2

    def __init__(self, facts: Facts, measured: Mapping[str, Any], workers: int) -> None:
        self.facts = facts
        self.arms: Mapping[str, Mapping[str, float]] = measured["arms"]
        self.supernet: Mapping[str, float] | None = measured.get("architecture_search")
        self.workers = workers
        self.default = {name: default_epochs(ARMS[name], facts) for name in self.arms}
        self._shares: dict[str, float] = {kind: self._share(kind) for kind in ("search", "comparison", "final")}

    def _share(self, kind: str) -> float:
        """Work of an epoch, of that on the data's own splits."""
        train, val = self.facts.number("train"), self.facts.number("val")
        pool, folds, searched = train + val, self.facts.folds, len(self.facts.search_folds)
        whole = train + VALIDATION * val
        if kind == "final" and not self.facts.final_folds:
            return 1.0
        # With one search fold it is trained on the others, since nothing else is left.
        trained = searched - 1 if kind == "search" and searched > 1 else folds - 1
        return (pool * trained / folds + VALIDATION * pool / folds) / whole

    def run(self, arm: str, epochs: int, kind: Kind = "final") -> float:
        """Seconds of one run."""
        known = self.arms[arm]
        fixed = min(known.get("fixed_seconds", 0.0), known["epoch_seconds"])
        epoch = fixed + (known["epoch_seconds"] - fixed) * self._shares[kind]
        return known["overhead_seconds"] + epochs * epoch

    def runs(self, programme: Programme, kind: Kind) -> list[float]:
        """Seconds of a run of each default candidate, the longest first."""
        return sorted((self.run(arm, programme.epochs[arm], kind) for arm, _ in programme.defaults), reverse=True)

    def kind(self, programme: Programme) -> Kind:
        """What runs on search folds are trained on: all other folds, unless some are kept for a comparison."""
        return "search" if programme.compared else "comparison"

    def folds(self, programme: Programme) -> list[int]:
        """Numbers of the folds that candidates are judged on."""
        return self.facts.search_folds if programme.compared else list(range(min(programme.folds, self.facts.folds)))

    def selection(self, programme: Programme) -> float:
        """Of the defaults and of the tuned ones; of the former the most expensive are reckoned to go on."""
        each = self.runs(programme, self.kind(programme))
        if len(each) == 1 and not programme.tuned:
            return 0.0  # there is nothing to choose
        seconds, going = 0.0, len(each)
        folds = self.folds(programme)
        for step in range(1, len(folds) + 1):
            seconds += together(each[:going], self.workers)
            if step >= self.facts.patience:
                going = min(going, max(LEAST, math.ceil(going / REDUCTION)))
        mean = sum(each) / len(each)
        for size in programme.tuned:
            for step in range(len(folds)):
                cuts = max(0, step + 1 - self.facts.patience)
                seconds += together([mean] * math.ceil(size / REDUCTION**cuts), self.workers)
        return seconds

    def policy_search(self, programme: Programme) -> float:
        """Of networks that are trained without a fold each, and of the policies that are scored on it."""
        if not programme.policies:
            return 0.0
        folds = len(self.facts.search_folds)
        networks = [self.runs(programme, "search")[0]] * folds
        held_out = (self.facts.number("train") + self.facts.number("val")) / self.facts.folds
        values = self.facts.channels * math.prod(self.facts.image_size)
        network = max(self.arms[arm]["test_image_seconds"] for arm in programme.epochs)
        copies = held_out * _SUB_POLICIES * (network + _OPERATIONS * values)
        scored = [self.rounds * programme.policies * (_PROPOSAL + copies)] * folds
        return together(networks, self.workers) + together(scored, self.workers)

    def architecture_search(self, programme: Programme) -> float:
        """Of the supernet, one run."""
        if not programme.cells or self.supernet is None:
            return 0.0
        return self.supernet["overhead_seconds"] + programme.cells * self.supernet["epoch_seconds"]

    def comparison(self, programme: Programme) -> float:
        """Of what was searched on the search folds, where it is not known there, and of two on the comparison folds."""
        if not programme.compared:
            return 0.0
        folds, longest = len(self.facts.search_folds), self.runs(programme, "search")[0]
        seconds = together([longest] * folds, self.workers) if programme.policies else 0.0
        if programme.cells:
            seconds += together([self.run("pcdarts", programme.cell_epochs, "search")] * folds, self.workers)
        pairs = programme.compared * len(self.facts.comparison_folds)
        return seconds + together([self._typical(programme, "comparison")] * 2 * pairs, self.workers)

    def final(self, programme: Programme) -> float:
        """Of all seeds of the chosen candidate, and of the simple one beside what was searched."""
        longest = max(self._all(programme, "final"))
        one = together([longest] * programme.seeds, self.workers)
        both = together([self._typical(programme, "final")] * 2 * programme.seeds, self.workers)
        return max(one, both) if programme.compared else one

    def _all(self, programme: Programme, kind: Kind) -> list[float]:
        """Of a run of each arm that may be chosen."""
        each = [self.run(arm, epochs, kind) for arm, epochs in programme.epochs.items()]
        return [*each, self.run("pcdarts", programme.cell_epochs, kind)] if programme.cells else each

    def _typical(self, programme: Programme, kind: Kind) -> float:
        """Of a run of one of them: the mean of the longer half, as these are the larger networks."""
        longer = sorted(self._all(programme, kind), reverse=True)
        longer = longer[: math.ceil(len(longer) / 2)]
        return sum(longer) / len(longer)

    def evaluation(self, budget: float) -> float:
        """Of temperature, test split, activation maps and report."""
        return _REPORT + _REPORT_SHARE * budget

    def total(self, programme: Programme) -> float:
        """All but the evaluation."""
        return sum(
            stage(programme)
            for stage in (
                self.selection,
                self.policy_search,
                self.architecture_search,
                self.comparison,
                self.final,
            )
        )
