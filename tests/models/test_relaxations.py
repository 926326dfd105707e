"""Relaxations: what each one mixes, and that the slot takes methods that are not here yet."""

import copy
import inspect

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.distributions import Dirichlet, kl_divergence

from lightning_automl.models import relaxations
from lightning_automl.models.derivation import cell_edges, strongest
from lightning_automl.models.ops import DARTS_OPERATIONS
from lightning_automl.models.relaxations import (
    AuxiliarySkip,
    GumbelSoftmax,
    Mixture,
    PartialChannels,
    Relaxation,
    SoftmaxRelaxation,
)
from lightning_automl.models.supernet import DartsSpace, MixedOp
from lightning_automl.rundir import UserError

RELAXATIONS = {
    name: value
    for name in relaxations.__all__
    if issubclass(value := getattr(relaxations, name), Relaxation) and not inspect.isabstract(value)
}
EDGES = cell_edges(2, 4)
SHAPE = (14, 8)
#: What equal alphas give: the first operation beside `none`, on the two inputs.
FIRST = ((("max_pool_3x3", 0), ("max_pool_3x3", 1)),) * 4


def parameters(relaxation, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(value.shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for name, value in relaxation.initial(EDGES, DARTS_OPERATIONS).items()
    }


def small(relaxation=None, **arguments):
    settings = {"channels": 4, "cells": 3, "nodes": 2, "fused": False} | arguments
    return DartsSpace(3, 1, relaxation=relaxation, **settings)


def test_there_are_relaxations():
    assert {SoftmaxRelaxation, PartialChannels, GumbelSoftmax, AuxiliarySkip} <= set(RELAXATIONS.values())


@pytest.mark.parametrize("name", RELAXATIONS)
def test_every_architecture_parameter_gets_a_finite_gradient_from_mixture_and_strengths(name):
    relaxation = RELAXATIONS[name]()
    values = parameters(relaxation)
    torch.manual_seed(0)
    mixture = relaxation.mixture(values, EDGES)
    assert mixture.operations.shape == SHAPE
    assert mixture.edges is None or mixture.edges.shape == (14,)
    mixed = mixture.operations if mixture.edges is None else mixture.operations * mixture.edges[:, None]
    strengths = relaxation.strengths(values, EDGES)
    assert strengths.shape == SHAPE
    assert (strengths >= 0).all()
    probes = torch.randn(SHAPE, dtype=torch.float64)
    for output in (mixed, strengths):
        for gradient in torch.autograd.grad((output * probes).sum(), list(values.values())):
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", RELAXATIONS)
def test_strengths_and_what_is_derived_are_neither_sampled_nor_scheduled(name):
    relaxation = RELAXATIONS[name]()
    values = parameters(relaxation)
    strengths, derived = relaxation.strengths(values, EDGES), relaxation.derive(values, EDGES, DARTS_OPERATIONS)
    relaxation.at(7, 10)
    relaxation.draw(5)
    relaxation.mixture(values, EDGES)
    assert torch.equal(relaxation.strengths(values, EDGES), strengths)
    assert relaxation.derive(values, EDGES, DARTS_OPERATIONS) == derived


@pytest.mark.parametrize("name", RELAXATIONS)
def test_equal_alphas_derive_the_first_operation_on_the_first_edges(name):
    relaxation = RELAXATIONS[name]()
    values = parameters(relaxation, scale=0.0)
    assert relaxation.derive(values, EDGES, DARTS_OPERATIONS) == FIRST


@pytest.mark.parametrize("name", RELAXATIONS)
def test_architecture_parameters_start_small_and_differ_from_call_to_call(name):
    relaxation = RELAXATIONS[name]()
    torch.manual_seed(0)
    first, second = (relaxation.initial(EDGES, DARTS_OPERATIONS) for _ in range(2))
    for key, value in first.items():
        assert 0.5e-3 < value.std() < 2e-3
        assert not torch.equal(value, second[key])


@pytest.mark.parametrize("name", RELAXATIONS)
def test_a_space_of_every_relaxation_trains_is_copied_and_restored(name):
    torch.manual_seed(0)
    space = small(RELAXATIONS[name]())
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    before = [parameter.clone() for parameter in space.parameters()]
    optimizer = torch.optim.SGD(space.parameters(), 0.1)
    for _ in range(4):  # what is sampled does not run in each
        nn.functional.cross_entropy(space(images), labels).backward()
    optimizer.step()
    names = [name for name, _ in space.named_parameters()]
    still = [name for name, old, new in zip(names, before, space.parameters(), strict=True) if torch.equal(old, new)]
    assert not [name for name in still if "operations" not in name]
    twin, restored = copy.deepcopy(space), small(RELAXATIONS[name]())
    restored.load_state_dict(space.state_dict())
    outputs = [network.eval()(images) for network in (space, twin, restored)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert restored.genotype() == space.genotype()


def test_the_softmax_of_darts_by_hand():
    alpha = torch.zeros(2, 3)
    alpha[0, 0] = torch.tensor(2.0).log()
    mixture = SoftmaxRelaxation().mixture({"alpha": alpha}, cell_edges(2, 1))
    torch.testing.assert_close(mixture.operations, torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]))
    assert mixture.edges is None


def test_betas_share_the_edges_into_a_node():
    values = {"alpha": torch.zeros(14, 8), "beta": torch.arange(14.0)}
    relaxation = PartialChannels(4)
    edges = relaxation.mixture(values, EDGES).edges
    # two edges of node 2 whose betas differ by 1; the edges of all other nodes sum to one as well
    torch.testing.assert_close(edges[:2], torch.tensor([1 / (1 + torch.e), torch.e / (1 + torch.e)]))
    torch.testing.assert_close(torch.stack([part.sum() for part in edges.split([2, 3, 4, 5])]), torch.ones(4))
    torch.testing.assert_close(relaxation.strengths(values, EDGES), edges[:, None].expand(14, 8) / 8)


def test_betas_decide_which_edges_stay():
    beta = torch.zeros(14)
    beta[[4, 12]] = 1.0  # from node 2 to node 3, from node 3 to node 5
    derived = PartialChannels(2).derive({"alpha": torch.zeros(14, 8), "beta": beta}, EDGES, DARTS_OPERATIONS)
    assert [node[0][1] for node in derived] == [0, 2, 0, 3]


def test_with_every_channel_and_equal_edges_partial_channels_are_darts():
    torch.manual_seed(0)
    partial, plain = small(PartialChannels(1)).double(), small().double()
    plain.load_state_dict(partial.state_dict(), strict=False)
    for kind in partial.edges:
        partial.architecture[kind]["beta"].data.fill_(0.3)
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    mixture = partial.mixtures

    def times_fan_in():
        scaled = {}
        for kind, value in mixture().items():
            fan_in = [partial.edges[kind].targets.count(target) for target in partial.edges[kind].targets]
            torch.testing.assert_close(value.edges * torch.tensor(fan_in), torch.ones(len(fan_in), dtype=torch.float64))
            scaled[kind] = value._replace(edges=value.edges * torch.tensor(fan_in))
        return scaled

    partial.mixtures = times_fan_in
    torch.testing.assert_close(partial(images), plain(images), rtol=1e-12, atol=1e-12)


def test_channels_that_pass_by_are_shuffled_among_the_selected_ones():
    edge = MixedOp(("none", "skip_connect"), 8, 1, nn.BatchNorm2d, partial=4)
    features = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 3, 3)
    kept = edge(features, torch.tensor([0.0, 1.0]))
    assert kept[0, :, 1, 1].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    dropped = edge(features, torch.tensor([0.5, 0.5]))
    assert dropped[0, :, 1, 1].tolist() == [0, 2, 4, 6, 0.5, 3, 5, 7]


@pytest.mark.parametrize("size", [4, 5])
def test_at_stride_two_channels_pass_by_through_a_max_pool(size):
    edge = MixedOp(("none", "skip_connect"), 4, 2, nn.BatchNorm2d, partial=2)
    features = torch.arange(float(size * size)).reshape(1, 1, size, size).repeat(1, 4, 1, 1)
    output = edge(features, torch.tensor([1.0, 0.0]))
    pooled = [[5.0, 7.0], [13.0, 15.0]] if size == 4 else [[6.0, 8.0, 9.0], [16.0, 18.0, 19.0], [21.0, 23.0, 24.0]]
    assert output[0, 1].tolist() == output[0, 3].tolist() == pooled
    assert (output[0, [0, 2]] == 0).all()


def soft_sample(alpha, noise, tau):
    return (((alpha.softmax(-1)).log() + noise) / tau).softmax(-1)


@pytest.mark.parametrize("tau", [10.0, 1.0, 0.3])
def test_gumbel_weights_are_one_hot_with_the_gradient_of_the_soft_sample(tau):
    relaxation = GumbelSoftmax(tau=tau)
    values = parameters(relaxation)
    relaxation.draw(3)
    mixture = relaxation.mixture(values, EDGES)
    relaxation.draw(3)
    soft = soft_sample(values["alpha"], relaxation._noise(values["alpha"]), tau)
    one_hot = nn.functional.one_hot(soft.argmax(-1), 8).double()
    torch.testing.assert_close(mixture.operations, one_hot, rtol=0, atol=1e-6)
    assert mixture.chosen == tuple(soft.argmax(-1).tolist())
    probes = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((weights * probes).sum(), values["alpha"])[0] for weights in (mixture.operations, soft)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.01


def test_gumbel_chooses_each_operation_as_often_as_the_softmax_says():
    alpha = torch.tensor([[0.0, 1.0, 2.0]]).expand(2000, 3)
    relaxation = GumbelSoftmax(tau=0.5)
    relaxation.draw(0)
    chosen = torch.tensor(relaxation.mixture({"alpha": alpha}, EDGES).chosen)
    # a count of 2000 draws has a standard deviation of at most 0.011
    torch.testing.assert_close(chosen.bincount() / 2000, alpha[0].softmax(-1), rtol=0, atol=0.035)


def test_gumbel_draws_are_a_function_of_the_seed_alone():
    assert_draws_are_a_function_of_the_seed_alone(GumbelSoftmax())


def assert_draws_are_a_function_of_the_seed_alone(relaxation):
    values = {"alpha": torch.zeros(SHAPE)}

    def draws(seed):
        relaxation.draw(seed)
        return [relaxation.mixture(values, EDGES).operations.tolist() for _ in range(2)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draws(11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert draws(11) == first
    assert draws(12) != first
    assert first[0] != first[1]


def test_without_a_seed_of_their_own_gumbel_draws_are_torchs():
    values = {"alpha": torch.zeros(SHAPE)}
    chosen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        chosen.append(GumbelSoftmax().mixture(values, EDGES).chosen)
    assert chosen[0] == chosen[1] != chosen[2]


def test_gumbel_draws_are_the_same_in_single_and_double_precision():
    relaxation = GumbelSoftmax()
    alpha = torch.randn(SHAPE)
    chosen = []
    for dtype in (torch.float32, torch.float64):
        relaxation.draw(2)
        chosen.append(relaxation.mixture({"alpha": alpha.to(dtype)}, EDGES).chosen)
    assert chosen[0] == chosen[1]


def test_without_training_gumbel_takes_the_largest_alpha():
    relaxation = GumbelSoftmax().eval()
    values = parameters(relaxation)
    assert relaxation.mixture(values, EDGES).chosen == tuple(values["alpha"].argmax(-1).tolist())


def test_of_each_edge_exactly_one_operation_runs_the_same_in_all_cells_of_a_kind():
    torch.manual_seed(0)
    space = small(GumbelSoftmax(), cells=6)
    ran = {}
    for kind, cell, edge, mixed in space.mixed_ops():
        for name, module in mixed.operations.items():
            module.register_forward_hook(
                lambda *_, at=(kind, cell, edge), name=name: ran.setdefault(at, []).append(name)
            )
    space(torch.rand(2, 1, 8, 8))
    assert len(ran) == 6 * 5
    assert all(len(names) == 1 for names in ran.values())
    for kind in ("normal", "reduce"):
        for edge in range(5):
            assert len({tuple(names) for at, names in ran.items() if (at[0], at[2]) == (kind, edge)}) == 1
    assert len({tuple(names) for names in ran.values()}) > 1


def test_temperature_goes_linearly_from_the_first_to_the_last_epoch():
    relaxation = GumbelSoftmax(tau=10.0, tau_end=2.0)
    taus = []
    for epoch in range(5):
        relaxation.at(epoch, 5)
        taus.append(relaxation.temperature.item())
    assert taus == [10, 8, 6, 4, 2]
    relaxation.at(0, 1)
    assert relaxation.temperature == 10


@pytest.mark.parametrize(("schedule", "quarter"), [("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2)])
def test_the_auxiliary_skip_fades_from_beta_to_nothing(schedule, quarter):
    relaxation = AuxiliarySkip(schedule=schedule)
    values = parameters(relaxation)
    weights = []
    for epoch in (0, 1, 2, 4):
        relaxation.at(epoch, 4)
        weights.append(relaxation.mixture(values, EDGES).skip)
    assert weights == pytest.approx([1.0, quarter, 0.5, 0.0])


@pytest.mark.parametrize("stride", [1, 2])
def test_an_edge_has_beta_times_a_skip_of_its_own(stride):
    torch.manual_seed(0)
    edge = MixedOp(DARTS_OPERATIONS, 4, stride, nn.BatchNorm2d, auxiliary=True).eval()
    features, weights = torch.randn(2, 4, 6, 6), torch.full((8,), 0.125)
    skip = features if stride == 1 else edge.auxiliary(features)
    torch.testing.assert_close(edge(features, weights, skip=0.7), edge(features, weights) + 0.7 * skip)
    scaled = edge(features, weights, torch.tensor(0.5), skip=0.7)
    torch.testing.assert_close(scaled, 0.5 * edge(features, weights, skip=0.7))


def test_a_checkpoint_keeps_the_weight_of_the_auxiliary_skip_and_the_temperature():
    for relaxation in (AuxiliarySkip(), GumbelSoftmax()):
        space, again = small(relaxation), small(type(relaxation)())
        space.relaxation.at(3, 8)
        again.load_state_dict(space.state_dict())
        for name, value in space.relaxation.named_buffers():
            assert torch.equal(dict(again.relaxation.named_buffers())[name], value)
    values = parameters(AuxiliarySkip())
    relaxation, again = AuxiliarySkip(), AuxiliarySkip()
    relaxation.at(1, 3)
    again.load_state_dict(relaxation.state_dict())
    assert again.mixture(values, EDGES).skip == relaxation.mixture(values, EDGES).skip == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PartialChannels(0), "k is 0"),
        (lambda: GumbelSoftmax(tau=0.0), r"tau is 0\.0"),
        (lambda: GumbelSoftmax(tau_end=-1.0), r"tau_end is -1\.0"),
        (lambda: GumbelSoftmax(tau=float("nan")), "tau is nan"),
        (lambda: AuxiliarySkip(beta=-0.5), r"beta is -0\.5"),
        (lambda: AuxiliarySkip(schedule="step"), "unknown schedule 'step'; known: linear, cosine"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


# Two methods that are not in the package: if they fit here, each is one file there.


class Dirichlets(Relaxation):
    """Chen et al., DrNAS, ICLR 2021: weights from a Dirichlet distribution, pulled towards the uniform one."""

    def initial(self, edges, operations):
        if "none" in operations:
            raise UserError("a Dirichlet distribution has no use for 'none'; leave it out of operations")
        return super().initial(edges, operations)

    def concentration(self, parameters):
        return nn.functional.elu(parameters["alpha"]) + 1 + 1e-8

    def mixture(self, parameters, edges):
        distribution = Dirichlet(self.concentration(parameters))
        if not self.training:
            return Mixture(distribution.mean)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.next_seed())
            return Mixture(distribution.rsample())

    def penalty(self, parameters):
        concentration = self.concentration(parameters)
        return kl_divergence(Dirichlet(concentration), Dirichlet(torch.ones_like(concentration))).sum()


class Fair(Relaxation):
    """Chu et al., Fair-DARTS, ECCV 2020: each operation has a weight of its own; what passes 0.85 stays."""

    def initial(self, edges, operations):
        return {"alpha": torch.zeros(len(edges.sources), len(operations))}

    def mixture(self, parameters, edges):
        return Mixture(self.strengths(parameters, edges))

    def strengths(self, parameters, edges):
        return parameters["alpha"].sigmoid()

    def penalty(self, parameters):
        return -10 * (parameters["alpha"].sigmoid() - 0.5).square().mean()

    def derive(self, parameters, edges, operations, **options):
        nodes = strongest(self.strengths(parameters, edges), edges, operations, **options)
        strengths = dict(
            zip(zip(edges.sources, edges.targets, strict=True), self.strengths(parameters, edges), strict=True)
        )
        return tuple(
            tuple(edge for edge in node if strengths[edge[1], target][operations.index(edge[0])] > 0.85) or node[:1]
            for target, node in enumerate(nodes, edges.inputs)
        )


WITHOUT_NONE = DARTS_OPERATIONS[1:]


@pytest.mark.parametrize("relaxation", [Dirichlets, Fair])
def test_a_relaxation_that_is_not_here_yet_is_one_small_class(relaxation):
    torch.manual_seed(0)
    space = small(relaxation(), operations=WITHOUT_NONE)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for parameter in space.alphas():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    loss = nn.functional.cross_entropy(space(images), labels)
    plain = torch.autograd.grad(loss, space.alphas(), retain_graph=True)
    pulled = torch.autograd.grad(loss + space.penalty(), space.alphas())
    for without, with_penalty in zip(plain, pulled, strict=True):
        assert without.isfinite().all()
        assert with_penalty.isfinite().all()
        assert not torch.allclose(without, with_penalty)
    assert len(space.genotype().normal) == 2


def test_dirichlet_weights_are_distributions_and_start_nearly_uniform():
    torch.manual_seed(0)
    space = small(Dirichlets(), operations=WITHOUT_NONE)
    weights = space.mixtures()["normal"].operations
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    assert (weights >= 0).all()
    torch.testing.assert_close(
        space.eval().mixtures()["normal"].operations, torch.full((5, 7), 1 / 7), rtol=0.02, atol=0
    )
    assert_draws_are_a_function_of_the_seed_alone(Dirichlets())
    with pytest.raises(UserError, match="'none'"):
        small(Dirichlets())


def test_a_relaxation_may_derive_by_a_rule_and_start_from_values_of_its_own():
    space = small(Fair(), operations=WITHOUT_NONE)
    assert all((parameter == 0).all() for parameter in space.alphas())
    assert space.penalty() == 0
    alpha = space.architecture["normal"]["alpha"].data
    alpha[:, 3] = torch.tensor([4.0, 1.0, 4.0, 3.0, 4.0])  # of node 2's two edges only the first passes 0.85
    assert space.genotype().normal == (
        (("sep_conv_3x3", 0),),
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 2)),
    )
    assert space.genotype().reduce == ((("max_pool_3x3", 0),),) * 2


# The command line


@pytest.mark.parametrize("name", RELAXATIONS)
def test_a_relaxation_is_named_in_yaml_by_its_class_alone(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model")
    arguments = {"PartialChannels": "{k: 2}", "GumbelSoftmax": "{tau: 5.0}"}.get(name, "{}")
    text = f"""
model:
  class_path: lightning_automl.models.supernet.DartsSpace
  init_args:
    num_classes: 3
    channels: 4
    cells: 3
    relaxation: {{class_path: {name}, init_args: {arguments}}}
"""
    config = parser.parse_string(text)
    space = parser.instantiate(parser.parse_string(parser.dump(config))).model
    assert type(space.relaxation) is RELAXATIONS[name]
    assert space.relaxation.partial == (2 if name == "PartialChannels" else 1)


@pytest.mark.parametrize("name", RELAXATIONS)
def test_a_space_is_exported_for_any_number_of_images(name):
    space = small(RELAXATIONS[name](), fused=True, operations=["none", "max_pool_3x3", "skip_connect"]).eval()
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(space, (torch.rand(2, 1, 8, 8),), dynamic_shapes=shapes)
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(images), space(images))
