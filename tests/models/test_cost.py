import torch
from torch import nn

from lightning_automl.models import flop_count, parameter_count


def test_flops_of_a_convolution_by_hand():
    convolution = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    assert flop_count(convolution, (3, 16, 12)) == 2 * (8 * 6) * 8 * (
        3 * 5 * 5
    )  # outputs x filters x products and sums


def test_flops_of_a_grouped_convolution_are_divided_by_the_groups():
    assert flop_count(nn.Conv2d(8, 8, 3, groups=8), (8, 5, 5)) == 2 * 9 * 8 * 9


def test_flops_of_a_linear_layer_by_hand():
    assert flop_count(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(12, 7)), (3, 2, 2)) == 2 * 12 * 7


def test_a_network_without_parameters_costs_nothing():
    assert flop_count(nn.ReLU(), (3, 4, 4)) == 0


def test_counting_leaves_training_flags_statistics_and_gradients_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flop_count(network, (3, 4, 4))
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network[0].weight.grad is None


def test_parameters_are_counted_once_and_frozen_ones_on_request():
    first, second = nn.Linear(4, 3), nn.Linear(3, 3)
    network = nn.Sequential(first, second, second, nn.BatchNorm1d(3))
    assert parameter_count(network) == 15 + 12 + 6
    first.requires_grad_(False)
    assert parameter_count(network, trainable_only=True) == 12 + 6
