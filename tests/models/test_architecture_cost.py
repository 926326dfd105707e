import json
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser
from torch import nn
from two_ranks import part, run_twice

from lightning_automl.models import (
    ArchitectureCost,
    DartsSpace,
    NasBench201Space,
    Supernet,
    flop_count,
    load_genotype,
    operation_costs,
    parameter_count,
)
from lightning_automl.models.genotype import random_genotype
from lightning_automl.models.limited_derivation import cheapest
from lightning_automl.models.operation_costs import load_latencies, measure_latencies, save_latencies
from lightning_automl.models.ops import DARTS_OPERATIONS, OPS, Operation
from lightning_automl.models.relaxations import PartialChannels
from lightning_automl.rundir import UserError

COUNT = {"flops": flop_count, "parameters": lambda network, shape: parameter_count(network)}
SHAPE = (2, 9, 7)


def darts(**arguments):
    arguments = {"in_channels": 2, "channels": 4, "cells": 4, "nodes": 3, "stem_multiplier": 2} | arguments
    return DartsSpace(3, **arguments)


def nasbench201(**arguments):
    return NasBench201Space(3, 2, channels=4, cells_per_stage=1, **arguments)


SPACES = {
    "darts": darts,
    "darts of one node": lambda: darts(nodes=1),
    "darts, groups": lambda: darts(norm="group", affine=True),
    "darts, partial channels": lambda: darts(relaxation=PartialChannels(2)),
    "darts, other operations": lambda: darts(operations=["skip_connect", "squeeze_excitation", "conv_7x1_1x7"]),
    "darts, 3 cells": lambda: darts(cells=3, nodes=2),
    "nasbench201": nasbench201,
    "nasbench201 without none": lambda: nasbench201(operations=["skip_connect", "nor_conv_3x3", "nor_conv_1x1"]),
}
each_space = pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)


COUNTED = {}


def prepared(of, model, shape=SHAPE, **arguments):
    """Costs of a model; what was counted once is loaded, as from a checkpoint, since counting takes its time."""
    cost = ArchitectureCost(of, **arguments)
    key = of, shape, repr(model)
    if key in COUNTED:
        cost.load_state_dict(COUNTED[key])
    cost.prepare(model, shape)
    if of != "latency":
        COUNTED[key] = {name: value.clone() for name, value in cost.state_dict().items()}
    return cost


def set_alphas(model, seed=0, scale=2.0):
    """Draw alphas that differ, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for alpha in model.alphas():
            alpha.copy_(scale * torch.randn(alpha.shape, generator=generator, dtype=torch.float64))
    return model


def tables(cost, model):
    return {kind: getattr(cost, f"{kind}_costs").tolist() for kind in model.edges}


# ---- what a genotype costs


@each_space
@pytest.mark.parametrize("of", COUNT)
def test_the_table_and_the_rest_add_up_to_what_the_network_has_exactly(make, of):
    model = make()
    cost = ArchitectureCost(of)
    cost.prepare(model, SHAPE)
    genotypes = [random_genotype(model.genotype(), seed) for seed in range(4)]
    counts = [COUNT[of](model.network(genotype), SHAPE) for genotype in genotypes]
    assert [cost.of_genotype(model, genotype) for genotype in genotypes] == counts
    assert len(set(counts)) > 1


def test_every_operation_of_the_registry_can_be_counted():
    model = darts(operations=list(OPS), nodes=1)
    cost = prepared("flops", model)
    for seed in range(8):
        genotype = random_genotype(model.genotype(), seed)
        assert cost.of_genotype(model, genotype) == flop_count(model.network(genotype), SHAPE)


def test_an_operation_of_a_user_is_counted(monkeypatch):
    monkeypatch.setitem(OPS, "mine", Operation(lambda channels, stride, norm: nn.Conv2d(channels, channels, 1, stride)))
    model = darts(operations=["skip_connect", "mine"], nodes=1)
    cost = prepared("parameters", model)
    assert cost.normal_costs[:, 1].tolist() == [2 * sum((4 * 4 + 4, 16 * 16 + 16)) // 2] * 2  # of 4 and of 16 channels
    assert cost.normal_costs[:, 0].tolist() == [0, 0]


def test_the_cost_of_a_separable_convolution_by_hand():
    model = darts(operations=["none", "sep_conv_3x3"], cells=3, nodes=1, in_channels=3)
    cost = prepared("flops", model, (3, 8, 8))
    # One normal cell, of 4 channels; two depthwise and two pointwise convolutions of 8 x 8 pixels, products and sums.
    assert cost.normal_costs.tolist() == [[0, 2 * 64 * 2 * (9 * 4 + 4 * 4)]] * 2


def test_a_published_cell_costs_what_its_network_has():
    model = DartsSpace(10, channels=8, cells=5)
    cost = prepared("parameters", model, (3, 32, 32))
    genotype = load_genotype("darts_v2")
    assert cost.of_genotype(model, genotype) == parameter_count(model.network(genotype))


def test_preparing_leaves_the_network_and_the_random_numbers_alone():
    model = darts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    ArchitectureCost("flops").prepare(model, SHAPE)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_genotype_of_another_space_is_refused():
    model = darts()
    other = darts(operations=["skip_connect", "sep_conv_3x3"], nodes=2)
    genotype = random_genotype(model.genotype(), 0)
    with pytest.raises(
        UserError, match=r"from node . to node ., which DartsSpace does not have; give a genotype of this"
    ):
        prepared("flops", other).of_genotype(other, genotype)
    assert prepared("flops", model).of_genotype(model, genotype) > 0


def test_a_space_that_does_not_add_up_is_refused():
    class Odd(DartsSpace):
        def network(self, genotype=None, **options):
            network = super().network(genotype, **options)
            if genotype is not None and genotype.normal[0][0][0] == "none":
                network.more = nn.Linear(2, 2)
            return network

    with pytest.raises(UserError, match=r"not the sum .* leave cost out"):
        prepared("parameters", Odd(3, 2, channels=4, cells=3, nodes=1))


def test_a_space_without_what_is_needed_is_refused_by_name():
    class Own(Supernet):
        def alphas(self):
            return []

        def genotype(self):
            return None

    with pytest.raises(UserError, match=r"cost of Own is not known, as it has no edges, operations, strengths"):
        prepared("flops", Own())


# ---- the expected cost


def by_hand(cost, model, keeps_none):
    """The formula of the docstring, in plain numbers."""
    total = float(cost.rest)
    for kind, edges in model.edges.items():
        strengths, costs = model.strengths()[kind].tolist(), tables(cost, model)[kind]
        for target in sorted(set(edges.targets)):
            own = [edge for edge, end in enumerate(edges.targets) if end == target]
            kept = len(own) if isinstance(model, NasBench201Space) else 2
            pairs = [
                (strengths[edge][number], costs[edge][number])
                for edge in own
                for number, name in enumerate(model.operations)
                if keeps_none or name != "none"
            ]
            total += kept * sum(s * c for s, c in pairs) / sum(s for s, _ in pairs)
    return total


@each_space
@pytest.mark.parametrize("of", COUNT)
def test_the_expected_cost_by_hand(make, of):
    model = set_alphas(make())
    cost = prepared(of, model)
    assert cost.expected(model).item() == pytest.approx(by_hand(cost, model, isinstance(model, NasBench201Space)))


def one_hot(model, seed=0):
    """Let one operation of each edge, not none, have all the strength."""
    generator = torch.Generator().manual_seed(seed)
    first = int("none" in model.operations)
    with torch.no_grad():
        for kind in model.edges:
            alpha = model.architecture[kind]["alpha"]
            chosen = torch.randint(first, alpha.shape[1], (len(alpha),), generator=generator)
            alpha.copy_(torch.full_like(alpha, -1e3).scatter_(1, chosen[:, None], 1e3))


@pytest.mark.parametrize("of", COUNT)
@pytest.mark.parametrize("name", ["nasbench201", "nasbench201 without none", "darts of one node"])
def test_the_expected_cost_of_one_hot_alphas_is_that_of_the_genotype(name, of):
    """Where every node keeps all its edges."""
    model = SPACES[name]()
    cost = prepared(of, model)
    for seed in range(3):
        one_hot(model, seed)
        expected = cost.expected(model).item()
        assert expected == pytest.approx(cost.of_genotype(model, model.genotype()), rel=1e-6)
        assert expected == pytest.approx(COUNT[of](model.network(), SHAPE), rel=1e-6)


def test_the_expected_cost_of_equal_alphas_is_the_mean_over_random_genotypes():
    model = darts(operations=[name for name in DARTS_OPERATIONS if name != "none"])
    cost = prepared("parameters", model)
    with torch.no_grad():
        for alpha in model.alphas():
            alpha.zero_()
    costs = [cost.of_genotype(model, random_genotype(model.genotype(), seed)) for seed in range(2000)]
    mean = torch.tensor(costs).mean().item()
    error = torch.tensor(costs).std().item() / len(costs) ** 0.5
    assert cost.expected(model).item() == pytest.approx(mean, abs=4 * error)
    assert 4 * error < 0.02 * mean


def test_alphas_cannot_flee_to_an_operation_that_is_never_chosen():
    model = set_alphas(darts(nodes=2))
    cost = prepared("flops", model)
    before = cost.expected(model).item()
    with torch.no_grad():
        for alpha in model.alphas():
            # as much of it on every edge of a node: what remains keeps its proportions
            rest = alpha[:, 1:].logsumexp(1)
            alpha[:, 1:] -= rest[:, None]
            alpha[:, 0] = 3.0
    assert model.strengths()["normal"][:, 0].min() > 0.9
    after = cost.expected(model).item()
    with torch.no_grad():
        for alpha in model.alphas():
            alpha[:, 0] = -30.0
    assert cost.expected(model).item() == pytest.approx(after, rel=1e-9)
    assert after != pytest.approx(before)  # the edges had other weights


@each_space
def test_the_gradient_of_the_penalty_by_finite_differences(make):
    model = set_alphas(make(), scale=1.0)
    cost = prepared("flops", model, weight=0.3)
    gradients = torch.autograd.grad(cost.penalty(model), model.alphas())
    step = 1e-5
    for alpha, gradient in zip(model.alphas(), gradients, strict=True):
        flat, wanted = alpha.detach().view(-1), torch.empty(alpha.numel(), dtype=torch.float64)
        for index in range(alpha.numel()):
            kept = flat[index].item()
            values = []
            for sign in (1, -1):
                flat[index] = kept + sign * step
                values.append(cost.penalty(model).item())
            flat[index] = kept
            wanted[index] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(gradient.view(-1), wanted, rtol=1e-5, atol=1e-9)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


def test_the_penalty_is_the_weight_where_the_expected_cost_is_the_target():
    model = set_alphas(darts())
    expected = prepared("flops", model).expected(model).item()
    cost = prepared("flops", model, weight=0.7, target=expected)
    assert cost.penalty(model).item() == pytest.approx(0.7)
    assert prepared("flops", model, weight=0.7, target=2 * expected).penalty(model).item() == pytest.approx(0.35)
    with torch.no_grad():
        for alpha in model.alphas():
            alpha.zero_()
    assert prepared("flops", model, weight=0.7).penalty(model).item() == pytest.approx(0.7)  # the mean of the space


def test_without_a_weight_there_is_no_penalty_to_compute():
    model = darts()
    penalty = prepared("flops", model).penalty(model)
    assert penalty.item() == 0
    assert not penalty.requires_grad


def test_no_precision_of_the_run_rounds_the_costs():
    model = set_alphas(darts())
    cost = prepared("flops", model, weight=1.0)
    before, penalty = tables(cost, model), cost.penalty(model).item()
    cost.bfloat16()
    assert tables(cost, model) == before
    assert cost.rest.dtype == torch.int64
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert cost.penalty(model).item() == pytest.approx(penalty, rel=1e-5)


def test_the_penalty_of_a_huge_network_does_not_overflow():
    model = darts()
    cost = prepared("flops", model, weight=1.0)
    for kind in model.edges:
        getattr(cost, f"{kind}_costs").mul_(10**13)
    assert cost.penalty(model).isfinite()
    assert cost.expected(model).isfinite()


def test_costs_are_asked_for_before_they_are_known():
    model = darts()
    for ask in (lambda cost: cost.expected(model), lambda cost: cost.of_genotype(model, model.genotype())):
        with pytest.raises(RuntimeError, match="call prepare first"):
            ask(ArchitectureCost())


def test_a_large_weight_leads_to_cheaper_genotypes():
    images, labels = torch.rand(8, 2, 8, 8), torch.arange(8) % 3

    def searched(weight):
        torch.manual_seed(0)
        model = darts(nodes=2, cells=3)
        cost = prepared("flops", model, (2, 8, 8), weight=weight)
        optimizer = torch.optim.Adam(model.alphas(), lr=0.1, betas=(0.5, 0.999))
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels) + cost.penalty(model)
            torch.autograd.backward(loss, inputs=model.alphas())
            optimizer.step()
        return cost.of_genotype(model, model.genotype()), cost.expected(model).item()

    free, cheap = searched(0.0), searched(20.0)
    assert cheap[0] < 0.9 * free[0]
    assert cheap[1] < 0.9 * free[1]


# ---- the limit


def smallest_and_largest(cost, model, seeds=range(60)):
    costs = [cost.of_genotype(model, random_genotype(model.genotype(), seed)) for seed in seeds]
    return min(costs), max(costs)


def least(cost, model):
    """The smallest cost of a genotype; that it is has its own test."""
    return (cheapest(cost._choices(model)).cost + int(cost.rest)) / (10**6 if cost.of == "latency" else 1)


@each_space
def test_every_limit_that_can_be_kept_is_kept(make):
    model = set_alphas(make())
    cost = prepared("flops", model)
    minimum = least(cost, model)
    unlimited = cost.of_genotype(model, model.genotype())
    highest = max(smallest_and_largest(cost, model)[1], unlimited)
    assert minimum <= smallest_and_largest(cost, model)[0]
    shares = [index / 24 for index in range(25)]
    strengths = []
    for share in shares:
        cost.limit = minimum + share * (highest - minimum)
        genotype = cost.within_limit(model)
        found = cost.of_genotype(model, genotype)
        assert found <= cost.limit
        assert found == flop_count(model.network(genotype), SHAPE)
        if unlimited <= cost.limit:
            assert genotype == model.genotype()
        strengths.append(summed(model, genotype))
    assert strengths == sorted(strengths)  # a higher limit never gives a weaker one


def summed(model, genotype):
    """Strengths of the chosen operations, rounded so that the order of the sum is not seen."""
    total = 0.0
    for kind, edges in model.edges.items():
        numbers = {pair: edge for edge, pair in enumerate(zip(edges.sources, edges.targets, strict=True))}
        strengths = model.strengths()[kind]
        for target, node in enumerate(genotype.nodes(kind), edges.inputs):
            for name, source in node:
                total += strengths[numbers[source, target], model.operations.index(name)].item()
    return round(total, 9)


def test_the_genotype_within_the_limit_is_the_strongest_of_all():
    """Against all genotypes of a small space."""
    model = set_alphas(
        darts(nodes=1, operations=["none", "skip_connect", "max_pool_3x3", "sep_conv_3x3", "sep_conv_5x5"])
    )
    cost = prepared("flops", model)
    names = model.operations[1:]
    like = model.genotype()
    cells = [(((a, 0), (b, 1)),) for a in names for b in names]
    every = [replace(like, normal=normal, reduce=reduce) for normal in cells for reduce in cells]
    known = [(cost.of_genotype(model, genotype), summed(model, genotype)) for genotype in every]
    for limit in sorted({each for each, _ in known})[::7]:
        cost.limit = limit
        best = max(strength for own, strength in known if own <= limit)
        assert summed(model, cost.within_limit(model)) == best


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_limit_of_skip_connections_holds_within_the_limit_of_cost(most):
    names = ["none", "skip_connect", "sep_conv_3x3", "sep_conv_5x5"]
    model = set_alphas(darts(operations=names, max_skips=most))
    cost = prepared("flops", model)
    cost.limit = least(cost, model)
    genotype = cost.within_limit(model)
    assert cost.of_genotype(model, genotype) == cost.limit
    for kind in ("normal", "reduce"):
        assert genotype.skips(kind) <= most
    assert genotype.skips("normal") == most  # the cheapest way
    free = darts(operations=names)
    assert least(prepared("flops", free), free) < cost.limit


@pytest.mark.parametrize(
    ("of", "words"),
    [
        ("flops", r"limit is 1 thousand operations, but the cheapest .* costs \d[\d.]* thousand operations \(\d"),
        ("parameters", r"limit is 1 parameters, but the cheapest .* costs \d[\d.]* thousand parameters \(\d"),
        ("latency", r"limit is 1e-06 milliseconds, but the cheapest .* costs \d[\d.]* milliseconds \(\d"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused_before_the_search(of, words):
    limit = {"flops": 1000, "parameters": 1, "latency": 1e-6}[of]
    with pytest.raises(UserError, match=f"{words}.* raise the limit, or give the space fewer channels or cells"):
        prepared(of, darts(), limit=limit)


def test_the_refusal_names_the_smallest_limit():
    model = darts()
    smallest = least(prepared("flops", model), model)
    with pytest.raises(UserError, match=rf"costs {smallest / 1000:.4g} thousand operations"):
        prepared("flops", model, limit=smallest - 1)
    cost = prepared("flops", model, limit=smallest)
    assert cost.of_genotype(model, cost.within_limit(model)) == smallest


def test_the_limit_holds_for_latencies():
    model = set_alphas(darts())
    cost = prepared("latency", model)
    minimum, unlimited = least(cost, model), cost.of_genotype(model, model.genotype())
    for share in (0.0, 0.3, 0.7, 1.0):
        cost.limit = minimum + share * (unlimited - minimum)
        assert cost.of_genotype(model, cost.within_limit(model)) <= cost.limit


def test_a_limit_of_exactly_what_a_network_costs_leaves_its_nanoseconds():
    cost = prepared("latency", set_alphas(darts()))
    rounded_down = 0
    for whole in range(1_000_000, 1_002_000):
        cost.limit = whole / 10**6
        rounded_down += int(cost.limit * 10**6) < whole
        assert cost._budget() == whole - int(cost.rest)
        cost.limit = (whole - 0.5) / 10**6
        assert cost._budget() == whole - 1 - int(cost.rest)
    assert rounded_down


# ---- latencies


def test_latencies_are_those_of_the_file(tmp_path):
    model = darts()
    table = measure_latencies(model, SHAPE, repeats=3)
    for entries in table["operations"].values():
        for number, entry in enumerate(entries):
            entry["milliseconds"] = 1.0 + number
    table["rest"] = 0.25
    path = tmp_path / "latencies.json"
    save_latencies(table, path)
    assert load_latencies(path) == json.loads(path.read_text())
    cost = prepared("latency", model, table=str(path))
    genotype = random_genotype(model.genotype(), 1)
    network, total = model.network(genotype), 0.25
    for searched, cell in zip(model.cells, network.cells, strict=True):
        for wire in cell.wires:
            (edge,) = [
                number
                for number, pair in enumerate(zip(searched.wiring.sources, searched.wiring.targets, strict=True))
                if pair == (wire.source, wire.target)
            ]
            mixed = searched.edges[edge]
            of_size = [
                entry["milliseconds"]
                for entry in table["operations"][wire.operation]
                if entry["channels"] == mixed.channels
                and entry["stride"] == mixed.stride
                and entry["height"] == searched_height(model, searched, edge)
            ]
            assert len(of_size) == 1
            total += of_size[0]
    assert cost.of_genotype(model, genotype) == pytest.approx(total, abs=1e-5)
    assert cost.unit == "milliseconds"


def searched_height(model, cell, edge):
    """Of what comes in at an edge: 9 rows, halved by each reduction before it."""
    halved = 9
    for other in model.cells:
        if other is cell:
            break
        halved = -(-halved // 2) if other.reduction else halved
    return -(-halved // 2) if cell.reduction and cell.wiring.sources[edge] >= 2 else halved


def test_measured_latencies_are_of_this_space_and_above_zero():
    model = nasbench201()
    table = measure_latencies(model, SHAPE, repeats=3)
    assert table["version"] == 1
    assert table["unit"] == "milliseconds"
    assert "thread" in table["device"]
    assert set(table["operations"]) == set(model.operations)
    assert table["rest"] > 0
    sizes = [(entry["channels"], entry["height"], entry["width"]) for entry in table["operations"]["nor_conv_3x3"]]
    assert sizes == [(4, 9, 7), (8, 5, 4), (16, 3, 2)]
    assert all(entry["milliseconds"] > 0 for entries in table["operations"].values() for entry in entries)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda table: table.update(version=2),
            r"has the version 2, and this release reads version 1; measure it again",
        ),
        (lambda table: table.update(unit="seconds"), r"has the unit 'seconds'; give milliseconds"),
        (lambda table: table.pop("rest"), r"lacks rest; a table of latencies has version, unit"),
        (lambda table: table["operations"].pop("dil_conv_5x5"), r"has no latency of dil_conv_5x5, only of none, max"),
        (
            lambda table: table["operations"]["sep_conv_3x3"].pop(0),
            r"has no latency of sep_conv_3x3 for 4 channels, 9 x 7 pixels and stride 1; measure this space",
        ),
        (lambda table: table["space"].update(image_shape=[2, 8, 8]), r"for another space \(image_shape \[2, 8, 8\]"),
        (
            lambda table: table["space"].update(name="MySpace"),
            r"for another space \(name MySpace instead of DartsSpace",
        ),
        (lambda table: table.update(space=None), r"for another space \("),
        (lambda table: table.update(rest=-1.0), r"rest of the table .* is -1.0; give milliseconds"),
        (
            lambda table: table["operations"]["none"][0].update(milliseconds="fast"),
            r"none in the table .* is 'fast'; give milliseconds",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, words, tmp_path, measured):
    table = json.loads(json.dumps(measured))
    change(table)
    path = tmp_path / "latencies.json"
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=words) as caught:
        prepared("latency", darts(), table=str(path))
    assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def measured():
    return measure_latencies(darts(), SHAPE, repeats=1)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no table of latencies"), ("{", "cannot be read as JSON"), ("[]", "is no mapping")],
)
def test_a_table_that_is_none_is_refused(content, words, tmp_path):
    path = tmp_path / "latencies.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        prepared("latency", darts(), table=str(path))


def test_a_resumed_run_has_the_latencies_of_its_checkpoint(tmp_path, monkeypatch):
    model = darts()
    before = prepared("latency", model, weight=1.0)
    torch.save(before.state_dict(), tmp_path / "cost.ckpt")
    state = torch.load(tmp_path / "cost.ckpt", weights_only=True)

    after = prepared("latency", model, weight=1.0)  # Lightning loads when the task has been set up
    assert tables(after, model) != tables(before, model)  # measured anew
    after.load_state_dict(state)
    assert tables(after, model) == tables(before, model)
    assert after.rest == before.rest

    alone = ArchitectureCost("latency", weight=1.0)
    alone.load_state_dict(state)  # without data, as when a checkpoint is looked at
    assert alone.of_genotype(model, model.genotype()) == before.of_genotype(model, model.genotype())
    monkeypatch.setattr("lightning_automl.models.architecture_cost.measure_latencies", None)  # is not called
    alone.prepare(model, SHAPE)
    assert tables(alone, model) == tables(before, model)
    assert alone.penalty(model).item() == before.penalty(model).item()


def test_other_images_are_counted_anew():
    model = darts()
    cost = prepared("flops", model)
    before = tables(cost, model)
    cost.prepare(model, (2, 18, 14))
    assert tables(cost, model) != before


# ---- arguments, and processes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"of": "memory"}, "unknown cost of 'memory'; known: flops, parameters, latency"),
        ({"weight": -1}, "weight is -1; it is a number from 0 on"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"limit": 0}, "limit is 0; it is a number of operations above 0"),
        ({"of": "latency", "target": -2}, "target is -2; it is a number of milliseconds above 0"),
        ({"table": "x.json"}, "table is given, but flops are counted"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(UserError, match=words):
        ArchitectureCost(**arguments)


def test_it_is_named_in_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--cost", type=ArchitectureCost | None)
    config = tmp_path / "cost.yaml"
    config.write_text("cost: {class_path: ArchitectureCost, init_args: {of: flops, weight: 0.1, limit: 4.0e6}}")
    given = parser.instantiate_classes(parser.parse_args([f"--config={config}"])).cost
    assert isinstance(given, ArchitectureCost)
    assert (given.of, given.weight, given.limit, given.target) == ("flops", 0.1, 4e6, None)


def on_rank(rank):
    """Runs in each of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = darts(nodes=1, cells=3)
    cost = ArchitectureCost("latency", weight=0.1)
    if rank == 1:  # has nothing to measure
        operation_costs.latency = None
    cost.prepare(model, SHAPE)
    torch.save(cost.state_dict(), f"rank{rank}.pt")
    part()


def test_the_first_process_measures_for_all(tmp_path):
    run_twice(__file__, tmp_path, "-W", "error::UserWarning")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() == {"normal_costs", "reduce_costs", "rest", "image_shape"}
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["normal_costs"].max() > 0


if __name__ == "__main__":
    on_rank(int(os.environ["RANK"]))
