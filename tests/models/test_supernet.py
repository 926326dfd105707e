"""Search spaces: their size, what they compute, and that they agree with the networks of their genotypes."""

import copy
from collections import Counter

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_automl.models.derivation import Edges, cell_edges, strongest
from lightning_automl.models.genotype import Genotype, random_genotype
from lightning_automl.models.nasbench201_space import NasBench201Space
from lightning_automl.models.ops import DARTS_OPERATIONS, NASBENCH201_OPERATIONS, OPS, Operation
from lightning_automl.models.relaxations import PartialChannels, SoftmaxRelaxation
from lightning_automl.models.supernet import DartsSpace, MixedOp, SearchCell, Supernet, copy_shared_weights, mix
from lightning_automl.rundir import UserError


def small(**arguments):
    return DartsSpace(3, 1, **{"channels": 4, "cells": 3, "nodes": 2, "fused": False} | arguments)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("classes", "relaxation", "weights", "alphas"),
    # the first two are in public logs of DARTS; PC-DARTS has 28 betas beside the 224 alphas
    [(10, None, 1_930_618, 224), (100, None, 1_953_748, 224), (10, PartialChannels(4), 299_578, 224 + 28)],
)
def test_the_search_networks_have_the_published_numbers_of_parameters(classes, relaxation, weights, alphas):
    space = DartsSpace(classes, relaxation=relaxation)
    assert (count(space.weights()), count(space.alphas())) == (weights, alphas)
    assert [parameters["alpha"].shape for parameters in space.architecture.values()] == [(14, 8), (14, 8)]


SPACES = {
    "DARTS": small,
    "PC-DARTS": lambda: small(relaxation=PartialChannels(2), affine=True, norm="group"),
    "NAS-Bench-201": lambda: NasBench201Space(3, 1, channels=4, cells_per_stage=1),
}


@pytest.mark.parametrize("name", SPACES)
def test_weights_and_alphas_are_all_parameters_and_have_none_in_common(name):
    space = SPACES[name]()
    alphas, weights = {id(value) for value in space.alphas()}, {id(value) for value in space.weights()}
    assert not alphas & weights
    assert alphas | weights == {id(value) for value in space.parameters()}
    assert {name for name, value in space.named_parameters() if id(value) in alphas} == {
        name for name, _ in space.named_parameters() if name.startswith("architecture.")
    }
    space.classifier.weight.requires_grad_(False)
    assert len(space.weights()) == len(weights) - 1


@pytest.mark.parametrize("name", SPACES)
def test_two_spaces_share_no_parameter_and_no_module(name):
    first, second = SPACES[name](), SPACES[name]()
    assert not {id(module) for module in first.modules()} & {id(module) for module in second.modules()}
    assert not {value.data_ptr() for value in first.parameters()} & {value.data_ptr() for value in second.parameters()}


@pytest.fixture
def images():
    return torch.rand(3, 4, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 2])
def test_an_edge_with_one_hot_weights_is_that_operation(stride, images):
    edge = MixedOp(OPS, 4, stride, nn.BatchNorm2d).double()
    edge(images, torch.full((len(OPS),), 0.1, dtype=torch.float64))
    edge.eval()
    for index, operation in enumerate(edge.operations.values()):
        alpha = torch.zeros(len(OPS), dtype=torch.float64)
        alpha[index] = 60.0
        torch.testing.assert_close(edge(images, alpha.softmax(-1)), operation(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_an_edge_with_equal_weights_is_the_mean_of_its_operations(stride, images):
    edge = MixedOp(DARTS_OPERATIONS, 4, stride, nn.BatchNorm2d).double().eval()
    mean = torch.stack([operation(images) for operation in edge.operations.values()]).mean(0)
    torch.testing.assert_close(edge(images, torch.zeros(8, dtype=torch.float64).softmax(-1)), mean)


def test_pools_of_the_search_have_a_norm_without_parameters():
    space = small()
    for _, _, _, mixed in space.mixed_ops():
        for name, operation in mixed.operations.items():
            norms = [module for module in operation.modules() if isinstance(module, nn.BatchNorm2d)]
            assert all(norm.weight is None for norm in norms)
            if OPS[name].pool:
                assert len(norms) == 1


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "build", [small, lambda **given: NasBench201Space(3, 1, channels=4, cells_per_stage=1, **given)]
)
def test_norms_of_edges_scale_and_shift_only_when_asked(build, affine):
    space = build(affine=affine)
    norms = [
        module for *_, edge in space.mixed_ops() for module in edge.modules() if isinstance(module, nn.BatchNorm2d)
    ]
    assert norms
    assert {norm.affine for norm in norms} == {affine}


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("halve", [False, True])
def test_a_cell_puts_its_nodes_together_and_a_reduction_halves_the_image(reduction, halve):
    wiring = cell_edges(2, 4)
    cell = SearchCell(
        (6, 10), 8, wiring, DARTS_OPERATIONS, SoftmaxRelaxation(), nn.BatchNorm2d, reduction, halve, False
    )
    mixture = SoftmaxRelaxation().mixture({"alpha": torch.randn(14, 8)}, wiring)
    before = torch.rand(2, 6, 16, 12) if halve else torch.rand(2, 6, 8, 6)
    output = cell(before, torch.rand(2, 10, 8, 6), mixture)
    assert output.shape == ((2, 32, 4, 3) if reduction else (2, 32, 8, 6))


def test_nodes_are_the_sums_of_what_comes_in_by_hand():
    edges = nn.ModuleList(MixedOp(("none", "skip_connect"), 1, 1, nn.BatchNorm2d) for _ in range(5))
    weights = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0])
    mixture = SoftmaxRelaxation().mixture({"alpha": torch.zeros(5, 2)}, cell_edges(2, 2))
    mixture = mixture._replace(operations=torch.stack([torch.zeros(5), weights], 1), edges=torch.full((5,), 10.0))
    states = [torch.full((1, 1, 2, 2), value) for value in (1.0, 100.0)]
    nodes = [node[0, 0, 0, 0].item() for node in mix(states, edges, cell_edges(2, 2), mixture)]
    assert nodes == [1, 100, 10 * (2 + 300), 10 * (5 + 700 + 11 * 3020)]


@pytest.mark.parametrize("cells", [3, 4, 5, 8, 20])
def test_cells_at_one_and_two_thirds_of_the_depth_are_reductions(cells):
    space = small(cells=cells, nodes=1, channels=2, operations=("none", "skip_connect"))
    reductions = [index for index, cell in enumerate(space.cells) if cell.reduction]
    assert reductions == [cells // 3, 2 * cells // 3]
    channels = [cell.channels for cell in space.cells]
    assert (channels[0], channels[reductions[0]], channels[reductions[1]], channels[-1])[1:] == (4, 8, 8)
    assert {(kind, cell) for kind, cell, _, _ in space.mixed_ops()} == {
        ("reduce" if index in reductions else "normal", index) for index in range(cells)
    }


@pytest.mark.parametrize("norm", ["batch", "group", "sync_batch"])
@pytest.mark.parametrize(
    ("channels", "cells", "nodes", "in_channels", "size"),
    [(4, 3, 1, 1, (4, 4)), (4, 4, 3, 5, (9, 13)), (6, 5, 2, 3, (8, 8)), (2, 8, 2, 1, (33, 7)), (4, 6, 5, 2, (28, 28))],
)
def test_any_number_of_cells_nodes_channels_and_pixels_gives_logits_and_gradients(
    norm, channels, cells, nodes, in_channels, size
):
    torch.manual_seed(0)
    space = DartsSpace(7, in_channels, size, channels, cells, nodes, 2, norm=norm, fused=False)
    logits = space(torch.rand(3, in_channels, *size))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in space.parameters())
    genotype = space.genotype()
    assert len(genotype.normal) == len(genotype.reduce) == nodes
    assert genotype.normal_concat == tuple(range(2, 2 + nodes))


@pytest.mark.parametrize(
    "build", [small, lambda **given: NasBench201Space(3, 1, channels=4, cells_per_stage=1, **given)]
)
@pytest.mark.parametrize("name", OPS)
def test_every_operation_can_be_a_candidate(name, build):
    torch.manual_seed(0)
    other = "nor_conv_1x1" if name == "none" else "none"
    space = build(operations=(other, name))
    space(torch.rand(3, 1, 9, 9)).square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in space.parameters())
    for kind in space.edges:
        space.architecture[kind]["alpha"].data[:, 1] += 1
    wanted = other if name == "none" and build is small else name
    assert {edge[0] for node in space.genotype().normal for edge in node} == {wanted}


def test_the_state_of_a_space_in_training_is_drawn_once_a_kind_and_pass():
    calls = []

    class Counted(SoftmaxRelaxation):
        def mixture(self, parameters, edges):
            calls.append(edges)
            return super().mixture(parameters, edges)

    small(cells=6, relaxation=Counted())(torch.rand(2, 1, 8, 8))
    assert len(calls) == 2


def test_equal_alphas_derive_the_first_pool_on_the_two_inputs():
    space = DartsSpace(10, channels=2, stem_multiplier=1, cells=3, fused=False)
    for parameter in space.alphas():
        parameter.data.fill_(0.7)
    nodes = ((("max_pool_3x3", 0), ("max_pool_3x3", 1)),) * 4
    assert space.genotype() == Genotype(nodes, (2, 3, 4, 5), nodes, (2, 3, 4, 5))


def test_none_is_never_derived_but_counts_in_the_ranking_of_edges():
    space = small()
    alpha = space.architecture["normal"]["alpha"].data.zero_()
    alpha[:, 4] = 1.0
    alpha[2, 0] = 9.0  # on the first edge of node 3 nearly everything is none
    assert space.genotype().normal == (
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        (("sep_conv_3x3", 1), ("sep_conv_3x3", 2)),
    )


def test_skips_are_limited_and_operations_forbidden_when_asked():
    space = small(nodes=4, max_skips=2)
    for kind in space.edges:
        space.architecture[kind]["alpha"].data[:, 3] = 3.0
    assert (space.genotype().skips("normal"), space.genotype().skips("reduce")) == (2, 2)
    forbidden = torch.zeros(14, 8, dtype=torch.bool)
    forbidden[:, 3] = True
    genotype = space.genotype({"reduce": forbidden})
    assert (genotype.skips("normal"), genotype.skips("reduce")) == (2, 0)


def test_a_compiled_space_gives_and_learns_the_same():
    torch.manual_seed(0)
    space = small(nodes=1, operations=("none", "skip_connect", "nor_conv_1x1"), fused=True)
    plain, images = copy.deepcopy(space), torch.rand(4, 1, 8, 8)
    found = []
    for network, forward in ((plain, plain), (space, torch.compile(space, backend="aot_eager", fullgraph=True))):
        logits = forward(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
        found.append([logits, *gradients, *network.buffers()])
    for expected, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


# The space and the networks of its genotypes


def choose(space, genotype, alpha=1e4):
    """Make the alphas one-hot: what the genotype has, and `none` on all other edges."""
    names = list(space.operations)
    for kind, edges in space.edges.items():
        values = space.architecture[kind]["alpha"].data.fill_(0.0)
        chosen = {
            (source, target): name
            for target, node in enumerate(genotype.nodes(kind), edges.inputs)
            for name, source in node
        }
        for row, edge in zip(values, zip(edges.sources, edges.targets, strict=True), strict=True):
            row[names.index(chosen.get(edge, "none"))] = alpha


def darts_space(norm, seed, fused=False):
    space = small(nodes=4, cells=5, operations=tuple(OPS), norm=norm, fused=fused).double()
    genotype = random_genotype(space.genotype(), seed)
    return space, genotype, space.network(genotype, affine=False, pool_norm=True).double()


def nasbench201_space(norm, seed, fused=False):
    space = NasBench201Space(3, 1, channels=4, cells_per_stage=2, norm=norm, fused=fused).double()
    genotype = random_genotype(space.genotype(), seed)
    return space, genotype, space.network(genotype, affine=False).double()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("build", [darts_space, nasbench201_space])
def test_the_space_with_one_hot_alphas_is_the_network_of_that_genotype(build, norm, fused):
    torch.manual_seed(fused)
    space, genotype, network = build(norm, int(fused), fused)
    choose(space, genotype)
    # operations that are not chosen run as well, but what they give is multiplied by zero
    images = torch.rand(6, 1, 11, 11, dtype=torch.float64)
    space(images)
    assert not torch.allclose(space(images), network(images))
    copy_shared_weights(space, network)
    torch.testing.assert_close(network(images), space(images), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(network.eval()(images), space.eval()(images), rtol=1e-10, atol=1e-10)
    assert not torch.equal(network(images), network.train()(images)) or norm == "group"


@pytest.mark.parametrize("build", [darts_space, nasbench201_space])
def test_one_hot_alphas_derive_the_genotype_that_they_stand_for(build):
    space, genotype, _ = build("batch", 3)
    choose(space, genotype)
    assert space.genotype().digest() == genotype.digest()


def test_the_network_of_a_space_has_its_size_and_no_architecture_parameters():
    space = small(norm="group", cells=4, nodes=3, stem_multiplier=2)
    network = space.network()
    assert network.genotype == space.genotype()
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert [cell.channels for cell in network.cells] == [3 * cell.channels for cell in space.cells]
    assert not [name for name, _ in network.named_parameters() if "architecture" in name]
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    copy_shared_weights(space, network)  # with the scales of norms, which the space does not have
    assert torch.equal(network.stem[0].weight, space.stem[0].weight)
    other = space.network(genotype=random_genotype(space.genotype(), 0), auxiliary=True)
    copy_shared_weights(space, other)
    assert torch.equal(other.classifier.weight, space.classifier.weight)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cells": 2}, "cells is 2; it must be 3 or more"),
        ({"channels": 5}, "channels is 5; it must be even"),
        ({"channels": 0}, "channels is 0"),
        ({"nodes": 0}, "nodes is 0"),
        ({"stem_multiplier": 0}, "stem_multiplier is 0"),
        ({"max_skips": -1}, "max_skips is -1"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"image_size": 3}, "3 x 3"),
        ({"image_size": (3, 9)}, "3 x 9"),
        ({"channels": 6, "relaxation": PartialChannels(4)}, "6 channels are not divisible by 4"),
        ({"operations": ("none", "sep_conv_3x")}, "sep_conv_3x3"),
        ({"operations": ()}, "nothing to choose"),
        ({"operations": ("none",)}, "nothing to choose"),
        ({"operations": ("sep_conv_3x3",)}, "nothing to choose"),
        ({"operations": ("none", "sep_conv_3x3", "none")}, "none twice"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"cells_per_stage": 0}, "cells_per_stage is 0"),
        ({"image_size": 2}, "2 x 2"),
        ({"operations": ("nor_conv_5x5", "none")}, "nor_conv"),
        ({"operations": ("none",)}, "nothing to choose"),
        ({"relaxation": PartialChannels(3)}, "16 channels are not divisible by 3"),
    ],
)
def test_nasbench201_refuses_what_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        NasBench201Space(3, **arguments)


@pytest.mark.parametrize("name", SPACES)
def test_images_that_do_not_fit_are_refused(name):
    space = SPACES[name]()
    with pytest.raises(UserError, match="3 x 8"):
        space(torch.rand(2, 1, 3, 8))
    with pytest.raises(UserError, match="in_channels"):
        space(torch.rand(2, 2, 8, 8))


def test_alphas_of_another_space_are_refused():
    with pytest.raises(RuntimeError, match=r"architecture\.normal\.alpha"):
        small().load_state_dict(small(operations=DARTS_OPERATIONS[1:]).state_dict())


# A space of one's own


class Blur(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, features):
        return features + self.strength * nn.functional.avg_pool2d(features, 3, 1, 1)


class Ladder(Supernet):
    """Three rungs, each of which sees the one before and the one before that; only the last is used."""

    operations = ("blur", "nor_conv_3x3", "skip_connect")
    wiring = Edges((0, 0, 1, 1, 2), (1, 2, 2, 3, 3), 1)

    def __init__(self, classes=3, channels=4):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.edges = nn.ModuleList(MixedOp(self.operations, channels, 1, nn.BatchNorm2d) for _ in self.wiring.sources)
        self.alpha = nn.Parameter(torch.zeros(5, 3))
        self.relaxation = SoftmaxRelaxation()
        self.classifier = nn.Linear(channels, classes)

    def alphas(self):
        return [self.alpha]

    def forward(self, images):
        mixture = self.relaxation.mixture({"alpha": self.alpha}, self.wiring)
        features = mix([self.stem(images)], self.edges, self.wiring, mixture)[-1]
        return self.classifier(features.mean((2, 3)))

    def genotype(self):
        nodes = strongest(self.alpha.softmax(-1), self.wiring, self.operations, edges_per_node=1)
        return Genotype(nodes, (3,), inputs=1, operations=self.operations)


def test_a_space_with_operations_and_wiring_of_ones_own_trains_and_derives(monkeypatch, tmp_path):
    monkeypatch.setitem(OPS, "blur", Operation(lambda channels, stride, norm: Blur(channels)))
    torch.manual_seed(0)
    space = Ladder()
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
    optimizers = {
        "alphas": torch.optim.Adam(space.alphas(), 0.1),
        "weights": torch.optim.SGD(space.weights(), 0.1),
    }
    for moved, optimizer in optimizers.items():
        before = {name: value.clone() for name, value in space.named_parameters()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(space(images), labels).backward()
        optimizer.step()
        changed = {name for name, value in space.named_parameters() if not torch.equal(value, before[name])}
        assert changed == ({"alpha"} if moved == "alphas" else set(before) - {"alpha"} - silent(space))
    space.alpha.data[[1, 3], 0] = 5.0
    genotype = space.genotype()
    assert genotype.normal[1:] == ((("blur", 0),), (("blur", 1),))
    genotype.save(tmp_path / "genotype.json")
    assert Counter(name for node in genotype.normal for name, _ in node)["blur"] >= 2


def silent(space):
    """Parameters without a gradient: a bias in front of a norm has none, up to rounding."""
    return {name for name, value in space.named_parameters() if value.grad is None or not value.grad.abs().max() > 0}


def test_a_subclass_that_lacks_a_method_is_named():
    class Unfinished(Supernet):
        def alphas(self):
            return []

    with pytest.raises(TypeError, match="genotype"):
        Unfinished()


def test_spaces_are_named_in_yaml_by_their_class_alone():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Supernet, "model")
    for name, given in (
        ("DartsSpace", {"channels": 4, "cells": 3, "norm": "group"}),
        ("NasBench201Space", {"channels": 4}),
    ):
        config = parser.parse_object({"model": {"class_path": name, "init_args": {"num_classes": 3} | given}})
        space = parser.instantiate(parser.parse_string(parser.dump(config))).model
        assert type(space).__name__ == name
        assert space.operations == (DARTS_OPERATIONS if name == "DartsSpace" else NASBENCH201_OPERATIONS)


class Bare(Supernet):
    """A space whose alphas are what the test says."""

    def __init__(self, given):
        super().__init__()
        self.own = nn.Parameter(torch.zeros(2))
        self.head = nn.Linear(2, 2)
        self.given = given

    def alphas(self):
        return self.given(self)

    def genotype(self):
        return random_genotype("darts", 0)


@pytest.mark.parametrize(
    "given",
    [
        lambda space: [],
        lambda space: [space.own.softmax(0)],
        lambda space: [nn.Parameter(space.own.detach().clone())],
        lambda space: [space.own, nn.Parameter(torch.zeros(1))],
    ],
    ids=["none", "no parameter", "a copy", "one that the network does not hold"],
)
def test_alphas_that_would_not_be_trained_or_saved_are_refused(given):
    with pytest.raises(UserError, match=r"alphas\(\) of Bare has to give one or more nn.Parameter that are attributes"):
        Bare(given).weights()
    assert len(Bare(lambda space: [space.own]).weights()) == 2


@pytest.mark.parametrize("relaxation", ["PartialChannels", PartialChannels])
def test_a_relaxation_that_is_none_is_refused(relaxation):
    with pytest.raises(UserError, match=r"relaxation is .*PartialChannels.*; give a Relaxation, such as PartialCha"):
        DartsSpace(3, channels=2, cells=3, relaxation=relaxation)
