import itertools
import random

import pytest

from lightning_automl.models.derivation import cell_edges
from lightning_automl.models.limited_derivation import CellChoices, Choice, cheapest, strongest_within, undominated


def drawn(seed, inputs, nodes, operations, edges_per_node, max_skips=None):
    draw = random.Random(seed)
    edges = cell_edges(inputs, nodes)
    count = len(edges.sources)
    return CellChoices(
        edges,
        [[draw.choice([0, 0, 3, 5, 8, 8, draw.randrange(50)]) for _ in range(operations)] for _ in range(count)],
        [[draw.random() for _ in range(operations)] for _ in range(count)],
        [number > 0 or inputs == 1 for number in range(operations)],
        {
            target: len([end for end in edges.targets if end == target]) if edges_per_node is None else edges_per_node
            for target in set(edges.targets)
        },
        1,
        max_skips,
    )


def every_choice(cell):
    """All (cost, strength, chosen) of a cell."""
    per_node = []
    for target in sorted(set(cell.edges.targets)):
        own = [edge for edge, end in enumerate(cell.edges.targets) if end == target]
        options = [number for number, allowed in enumerate(cell.allowed) if allowed]
        per_node.append(
            [
                dict(zip(kept, chosen, strict=True))
                for kept in itertools.combinations(own, cell.kept[target])
                for chosen in itertools.product(options, repeat=len(kept))
            ]
        )
    for parts in itertools.product(*per_node):
        chosen = {edge: number for part in parts for edge, number in part.items()}
        if cell.max_skips is None or sum(number == cell.skip for number in chosen.values()) <= cell.max_skips:
            cost = sum(cell.costs[edge][number] for edge, number in chosen.items())
            yield cost, sum(cell.strengths[edge][number] for edge, number in chosen.items()), chosen


CASES = {
    "two of two edges": (0, 2, 1, 6, 2),
    "two of three edges": (1, 2, 2, 4, 2),
    "one edge": (2, 2, 2, 5, 1),
    "no skips": (3, 2, 2, 4, 2, 0),
    "one skip": (4, 2, 2, 4, 2, 1),
    "every edge": (5, 1, 3, 3, None),
    "every edge, two skips": (6, 1, 3, 3, None, 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_choice_is_the_strongest_of_all_within_every_budget(case):
    cell = drawn(*case)
    known = list(every_choice(cell))
    costs = sorted({cost for cost, _, _ in known})
    assert cheapest({"normal": cell}).cost == costs[0]
    assert strongest_within({"normal": cell}, costs[0] - 1) is None
    for budget in [*costs[:: max(1, len(costs) // 10)], costs[-1], None]:
        choice = strongest_within({"normal": cell}, budget)
        best = max(strength for cost, strength, _ in known if budget is None or cost <= budget)
        assert choice.strength == pytest.approx(best)
        assert budget is None or choice.cost <= budget
        chosen = {edge: number for (_, edge), number in choice.edges().items()}
        assert (choice.cost, pytest.approx(choice.strength), chosen) in [
            (cost, pytest.approx(strength), own) for cost, strength, own in known if own == chosen
        ]


def test_kinds_of_cells_share_the_budget():
    cells = {"normal": drawn(0, 2, 1, 5, 2), "reduce": drawn(1, 2, 1, 5, 2, 1)}
    known = [
        (first + second, strength + other)
        for first, strength, _ in every_choice(cells["normal"])
        for second, other, _ in every_choice(cells["reduce"])
    ]
    for budget in sorted({cost for cost, _ in known})[::9]:
        best = max(strength for cost, strength in known if cost <= budget)
        assert strongest_within(cells, budget).strength == pytest.approx(best)


@pytest.mark.parametrize("most", [2, 5])
def test_when_choices_are_thinned_every_budget_is_still_kept(most):
    cells = {"normal": drawn(0, 2, 4, 6, 2), "reduce": drawn(1, 2, 4, 6, 2, 1)}
    low = cheapest(cells).cost
    high = strongest_within(cells, None).cost
    assert high > low + 10
    for budget in range(low, high + 1, 7):
        choice = strongest_within(cells, budget, most=most)
        assert choice.cost <= budget
        assert choice.strength <= strongest_within(cells, budget).strength + 1e-9
    assert strongest_within(cells, low - 1, most=most) is None
    assert strongest_within(cells, None, most=most).strength == pytest.approx(strongest_within(cells, None).strength)


def test_nothing_is_left_when_skips_are_all_there_is_and_none_are_allowed():
    cell = drawn(0, 2, 1, 2, 2, 0)  # of the two operations the first may not be chosen
    assert cheapest({"normal": cell}) is None
    assert strongest_within({"normal": cell}, None) is None


def test_of_partial_choices_those_stay_than_which_none_is_as_cheap_and_as_strong():
    pairs = [(5, 1.0), (3, 2.0), (7, 3.0), (7, 2.5), (9, 2.9), (10, 4.0)]
    choices = [Choice(cost, strength) for cost, strength in pairs]
    assert [choice[:2] for choice in undominated(choices, None, 10)] == [(3, 2.0), (7, 3.0), (10, 4.0)]
    assert [choice[:2] for choice in undominated(choices, 9, 10)] == [(3, 2.0), (7, 3.0)]
    assert undominated(choices, 2, 10) == []


def test_thinned_choices_are_few_and_have_the_cheapest_and_the_strongest():
    choices = [Choice(cost, float(cost)) for cost in [0, 1, 2, *range(50, 100), 1000]]
    for most in (2, 3, 9):
        costs = [choice.cost for choice in undominated(choices, None, most)]
        assert costs == sorted(costs)
        assert costs[0] == 0
        assert costs[-1] == 1000
        assert len(costs) <= most + 1
    assert len(undominated(choices, None, len(choices))) == len(choices)
