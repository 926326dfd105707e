import pytest
import torch

from lightning_automl.models.derivation import Edges, cell_edges, strongest
from lightning_automl.models.genotype import Genotype
from lightning_automl.models.ops import DARTS_OPERATIONS, NASBENCH201_OPERATIONS
from lightning_automl.rundir import UserError

EDGES = cell_edges(2, 4)
NONE, SKIP = DARTS_OPERATIONS.index("none"), DARTS_OPERATIONS.index("skip_connect")


def random_strengths(seed, skip=0.0, edges=EDGES, operations=DARTS_OPERATIONS):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(edges.sources), len(operations), generator=generator)
    logits[:, operations.index("skip_connect")] += skip
    return logits.softmax(1)


def skips(cell):
    return sum(name == "skip_connect" for node in cell for name, _ in node)


def authors_rule(weights, nodes=4):
    """`_parse` of https://github.com/quark0/darts/blob/master/cnn/model_search.py, in words of this test."""
    cell, start = [], 0
    for node in range(nodes):
        rows = weights[start : start + node + 2].tolist()
        start += node + 2
        learnt = [[value for index, value in enumerate(row) if index != NONE] for row in rows]
        sources = sorted(range(node + 2), key=lambda source: -max(learnt[source]))[:2]
        names = [name for name in DARTS_OPERATIONS if name != "none"]
        cell.append(tuple((names[learnt[source].index(max(learnt[source]))], source) for source in sources))
    return tuple(cell)


def test_edges_come_node_by_node_and_source_by_source():
    assert cell_edges(2, 2) == Edges((0, 1, 0, 1, 2), (2, 2, 3, 3, 3), 2)
    assert cell_edges(1, 3) == Edges((0, 0, 1, 0, 1, 2), (1, 2, 2, 3, 3, 3), 1)
    assert len(EDGES.sources) == 14


@pytest.mark.parametrize(("inputs", "nodes", "told"), [(0, 4, "inputs is 0"), (2, 0, "nodes is 0")])
def test_a_cell_without_nodes_is_refused(inputs, nodes, told):
    with pytest.raises(UserError, match=told):
        cell_edges(inputs, nodes)


def test_equal_strengths_give_the_first_operation_of_the_first_two_sources():
    cell = strongest(torch.full((14, 8), 1 / 8), EDGES, DARTS_OPERATIONS)
    assert cell == ((("max_pool_3x3", 0), ("max_pool_3x3", 1)),) * 4


def test_none_is_never_chosen_however_strong():
    strengths = torch.full((14, 8), 0.01 / 7)
    strengths[:, NONE] = 0.99
    strengths[:, SKIP] += 1e-6
    assert strongest(strengths, EDGES, DARTS_OPERATIONS) == ((("skip_connect", 0), ("skip_connect", 1)),) * 4


def test_none_takes_strength_from_its_edge():
    """As the softmax includes it: of two edges with equal logits but for ``none``, the one without much of it stays."""
    logits = torch.zeros(14, 8)
    logits[5:9, SKIP] = 1.0  # the edges of node 4, from 0, 1, 2, 3
    logits[5, NONE] = logits[6, NONE] = 2.0
    cell = strongest(logits.softmax(1), EDGES, DARTS_OPERATIONS)
    assert cell[2] == (("skip_connect", 2), ("skip_connect", 3))


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_authors_rule(seed):
    strengths = random_strengths(seed)
    cell = strongest(strengths, EDGES, DARTS_OPERATIONS)
    assert cell == authors_rule(strengths)
    for number, node in enumerate(cell, 2):
        first, second = (source for _, source in node)
        assert first != second
        assert max(first, second) < number
    Genotype(normal=cell, normal_concat=(2, 3, 4, 5))  # which checks the same


def test_ties_go_to_the_lower_source_and_the_operation_that_comes_first():
    strengths = torch.zeros(14, 8)
    strengths[9:, [6, 4]] = 0.5  # node 5: all edges alike, two operations alike
    assert strongest(strengths, EDGES, DARTS_OPERATIONS)[3] == (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    strengths[13, 7] = 0.6
    assert strongest(strengths, EDGES, DARTS_OPERATIONS)[3] == (("dil_conv_5x5", 4), ("sep_conv_3x3", 0))


@pytest.mark.parametrize("edges_per_node", [1, 2, 3, 9, None])
def test_a_node_keeps_as_many_edges_as_asked_for_or_all_that_it_has(edges_per_node):
    cell = strongest(random_strengths(1), EDGES, DARTS_OPERATIONS, edges_per_node=edges_per_node)
    assert [len(node) for node in cell] == [min(edges_per_node or 9, has) for has in (2, 3, 4, 5)]


def test_nas_bench_201_keeps_every_edge_with_its_strongest_operation_be_it_none():
    edges = cell_edges(1, 3)
    strengths = torch.full((6, 5), 0.1)
    for edge, best in enumerate((3, 0, 1, 4, 0, 2)):
        strengths[edge, best] = 0.6 + edge / 100
    cell = strongest(strengths, edges, NASBENCH201_OPERATIONS, edges_per_node=None, keep_none=True)
    assert [dict(map(reversed, node)) for node in cell] == [
        {0: "nor_conv_3x3"},
        {0: "none", 1: "skip_connect"},
        {0: "avg_pool_3x3", 1: "none", 2: "nor_conv_1x1"},
    ]
    assert cell[2] == (("nor_conv_1x1", 2), ("none", 1), ("avg_pool_3x3", 0))


# The limit on skip connections


@pytest.mark.parametrize("limit", range(5))
@pytest.mark.parametrize("seed", range(5))
def test_there_are_never_more_skips_than_allowed_and_nothing_changes_when_there_are_few(seed, limit):
    strengths = random_strengths(seed, skip=1.5)
    free = strongest(strengths, EDGES, DARTS_OPERATIONS)
    held = strongest(strengths, EDGES, DARTS_OPERATIONS, max_skips=limit)
    assert skips(free) > 2
    assert skips(held) <= limit
    assert (held == free) == (skips(free) <= limit)
    assert [len(node) for node in held] == [2, 2, 2, 2]


def test_the_weakest_skip_gives_way_to_the_next_operation_of_its_edge():
    edges = cell_edges(2, 1)
    strengths = torch.tensor([[0.0, 0.6, 0.3, 0.1], [0.0, 0.5, 0.1, 0.4]])
    operations = ("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3")
    expected = {
        None: (("skip_connect", 0), ("skip_connect", 1)),
        2: (("skip_connect", 0), ("skip_connect", 1)),
        1: (("skip_connect", 0), ("max_pool_3x3", 1)),
        0: (("max_pool_3x3", 1), ("sep_conv_3x3", 0)),
    }
    for limit, cell in expected.items():
        assert strongest(strengths, edges, operations, max_skips=limit) == (cell,)


def test_the_weakest_skip_gives_way_to_another_edge_if_that_is_stronger():
    operations = ("skip_connect", "sep_conv_3x3")
    edges = Edges((0, 1, 2), (3, 3, 3), 3)
    strengths = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    assert strongest(strengths, edges, operations) == ((("skip_connect", 0), ("skip_connect", 1)),)
    assert strongest(strengths, edges, operations, max_skips=1) == ((("skip_connect", 0), ("sep_conv_3x3", 2)),)


def test_of_equal_skips_the_last_gives_way():
    strengths = torch.tensor([[0.6, 0.4]] * 2)
    cell = strongest(strengths, cell_edges(2, 1), ("skip_connect", "sep_conv_3x3"), max_skips=1)
    assert cell == ((("skip_connect", 0), ("sep_conv_3x3", 1)),)


def test_a_limit_that_leaves_nothing_to_choose_is_refused():
    with pytest.raises(UserError, match=r"max_skips.* leaves node 2 with 1 of its 2 edges; allow more"):
        strongest(torch.ones(2, 2) / 2, cell_edges(2, 1), ("none", "skip_connect"), max_skips=1)


# What is forbidden


def test_what_is_forbidden_is_not_chosen_and_the_rest_is_the_best_of_the_rest():
    strengths = random_strengths(3)
    forbidden = torch.rand(14, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    forbidden[:, DARTS_OPERATIONS.index("dil_conv_5x5")] = False
    before = forbidden.clone()
    cell = strongest(strengths, EDGES, DARTS_OPERATIONS, forbidden=forbidden)
    assert cell == authors_rule(strengths.masked_fill(forbidden, -1.0)) != authors_rule(strengths)
    assert torch.equal(forbidden, before)


def test_an_edge_without_an_allowed_operation_stays_out_while_others_are_left():
    forbidden = torch.zeros(14, 8, dtype=torch.bool)
    forbidden[5:7, 1:] = True  # node 4 from 0 and from 1
    cell = strongest(torch.ones(14, 8), EDGES, DARTS_OPERATIONS, forbidden=forbidden)
    assert cell[2] == (("max_pool_3x3", 2), ("max_pool_3x3", 3))
    forbidden[7, 1:] = True
    with pytest.raises(UserError, match="leaves node 4 with 1 of its 2 edges"):
        strongest(torch.ones(14, 8), EDGES, DARTS_OPERATIONS, forbidden=forbidden)


# Tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_is_taken_and_nothing_is_changed(dtype):
    strengths = random_strengths(0).to(dtype).requires_grad_()
    before = strengths.detach().clone()
    assert strongest(strengths, EDGES, DARTS_OPERATIONS) == authors_rule(before)
    assert torch.equal(strengths, before)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strengths": torch.ones(14, 7)}, r"strengths have the shape \(14, 7\), but 14 edges and 8 operations"),
        ({"strengths": torch.ones(13, 8)}, r"the shape \(13, 8\)"),
        ({"strengths": torch.ones(8)}, r"the shape \(8,\)"),
        ({"forbidden": torch.zeros(8, dtype=torch.bool)}, r"forbidden has the shape \(8,\) instead of \(14, 8\)"),
        ({"max_skips": -1}, "max_skips is -1; give at least 0"),
        ({"edges_per_node": 0}, "edges_per_node is 0; give at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    arguments = {"strengths": torch.ones(14, 8), "edges": EDGES, "operations": DARTS_OPERATIONS} | changes
    with pytest.raises(UserError, match=told):
        strongest(**arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_an_error_of_the_run(value):
    strengths = torch.ones(14, 8)
    strengths[3, 4] = value
    with pytest.raises(RuntimeError, match="not finite"):
        strongest(strengths, EDGES, DARTS_OPERATIONS)
