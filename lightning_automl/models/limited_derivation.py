"""The strongest cells whose cost keeps within a limit.

To choose one operation for each kept edge so that strengths add up to the most and costs to no more than a limit is a
multiple-choice knapsack (Kellerer, Pferschy and Pisinger, *Knapsack Problems*, 2004, chapter 11). It is solved edge by
edge: of the partial choices only those stay for which no other is both as strong and as cheap.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_automl.models.derivation import Edges

#: More partial choices than these are thinned, by bins of their cost; the cheapest and the strongest always stay.
MOST = 512

#: What was chosen, the newest first: kind of cell, edge, operation, and what was chosen before.
_Chosen = tuple[str, int, int, "_Chosen | None"]


class Choice(NamedTuple):
    """A choice for some of the edges: what it costs, its summed strengths, and what it is."""

    cost: int
    strength: float
    chosen: "_Chosen | None" = None

    def edges(self) -> dict[tuple[str, int], int]:
        """The operation of each kept edge, by kind of cell and edge."""
        found, rest = {}, self.chosen
        while rest is not None:
            kind, edge, operation, rest = rest
            found[kind, edge] = operation
        return found


class CellChoices(NamedTuple):
    """What may be chosen in one kind of cell with ``E`` edges and ``O`` operations.

    Attributes:
        edges: The edges of the cell.
        costs: What each operation on each edge costs, in whole units, ``(E, O)``.
        strengths: How strong each is, ``(E, O)``.
        allowed: Which operations may be chosen at all, ``(O,)``.
        kept: How many edges of each node stay, by number of the node.
        skip: Number of the operation that is counted as a skip connection; None: there is none.
        max_skips: At most so many of those in the cell; None: any number.
    """

    edges: Edges
    costs: Sequence[Sequence[int]]
    strengths: Sequence[Sequence[float]]
    allowed: Sequence[bool]
    kept: Mapping[int, int]
    skip: int | None = None
    max_skips: int | None = None


def strongest_within(cells: Mapping[str, CellChoices], budget: int | None, most: int = MOST) -> Choice | None:
    """Choose the edges and operations whose strengths add up to the most, for no more than ``budget``.

    Args:
        cells: What may be chosen, by kind of cell.
        budget: Most that all together may cost; None: any cost.
        most: How many partial choices are kept. Where there were never more, the answer is the best; else it is near
            to it, and keeps the budget all the same.

    Returns:
        The choice, or None when even the cheapest costs more. There is always one when the cheapest does not.
    """
    front = [Choice(0, 0.0)]
    for kind, cell in cells.items():
        front = undominated(_with_cell(front, kind, cell, budget, most), budget, most)
    return front[-1] if front else None


def cheapest(cells: Mapping[str, CellChoices]) -> Choice | None:
    """The choice of the least cost, or None when limits on skip connections leave none."""
    front = [Choice(0, 0.0)]
    for kind, cell in cells.items():
        front = undominated(_with_cell(front, kind, cell, None, 1), None, 1)
    return front[0] if front else None


def _with_cell(front: list[Choice], kind: str, cell: CellChoices, budget: int | None, most: int) -> list[Choice]:
    by_skips = {0: front}
    for target in sorted(set(cell.edges.targets)):
        # by (kept edges of this node, skip connections of the cell)
        states = {(0, skips): choices for skips, choices in by_skips.items()}
        for edge, end in enumerate(cell.edges.targets):
            if end == target:
                states = _with_edge(states, kind, edge, cell, budget, most)
        by_skips = {skips: choices for (kept, skips), choices in states.items() if kept == cell.kept[target]}
    return [choice for choices in by_skips.values() for choice in choices]


def _with_edge(
    states: Mapping[tuple[int, int], list[Choice]],
    kind: str,
    edge: int,
    cell: CellChoices,
    budget: int | None,
    most: int,
) -> dict[tuple[int, int], list[Choice]]:
    most_kept = cell.kept[cell.edges.targets[edge]]
    grown: dict[tuple[int, int], list[Choice]] = {}
    for (kept, skips), choices in states.items():
        grown.setdefault((kept, skips), []).extend(choices)  # the edge goes
        if kept == most_kept:
            continue
        for operation, allowed in enumerate(cell.allowed):
            counted = skips + (operation == cell.skip and cell.max_skips is not None)
            if not allowed or (cell.max_skips is not None and counted > cell.max_skips):
                continue
            cost, strength = cell.costs[edge][operation], cell.strengths[edge][operation]
            grown.setdefault((kept + 1, counted), []).extend(
                Choice(before.cost + cost, before.strength + strength, (kind, edge, operation, before.chosen))
                for before in choices
            )
    return {state: undominated(choices, budget, most) for state, choices in grown.items()}


def undominated(choices: list[Choice], budget: int | None, most: int) -> list[Choice]:
    """Those than which none is both as cheap and as strong, the cheapest and weakest first.

    Args:
        choices: Partial choices, in any order.
        budget: Those that cost more are left out; None: none are.
        most: Of more than these one of each bin of costs stays, the strongest; and the cheapest of all.
    """
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.cost, -each.strength)):
        if budget is not None and choice.cost > budget:
            break
        if not front or choice.strength > front[-1].strength:
            front.append(choice)
    if len(front) <= most:
        return front
    if most == 1:
        return front[:1]
    low, high = front[0].cost, front[-1].cost
    bins = {(choice.cost - low) * (most - 1) // (high - low): choice for choice in front}  # the strongest of each
    return sorted({front[0], *bins.values()}, key=lambda each: each.cost)
