import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_automl.models import Genotype, GenotypeNetwork, flop_count, load_genotype, parameter_count
from lightning_automl.models.genotype_network import AuxiliaryHead, drop_images, pool_to_two
from lightning_automl.models.layers import norm_layer
from lightning_automl.models.ops import OPS

SKIPS = ((("skip_connect", 0), ("skip_connect", 1)),)
#: One node that adds its two inputs.
IDENTITY = Genotype(SKIPS, (2,), SKIPS, (2,))


def network(genotype="darts_v2", **arguments):
    return GenotypeNetwork(**{"num_classes": 5, "genotype": genotype, "channels": 4, "cells": 3} | arguments)


@pytest.mark.parametrize(
    ("genotype", "parameters"), [("darts_v2", 3_349_342), ("darts_v1", 3_169_414), ("pc_darts_cifar", 3_634_678)]
)
def test_the_published_cells_have_the_published_numbers_of_parameters(genotype, parameters):
    with torch.device("meta"):
        assert parameter_count(GenotypeNetwork(10, genotype=genotype)) == parameters


@pytest.mark.parametrize(("genotype", "millions"), [("darts_v2", 4.7), ("pc_darts_imagenet", 5.3)])
def test_the_networks_for_imagenet_have_the_published_size(genotype, millions):
    with torch.device("meta"):
        built = GenotypeNetwork(1000, genotype=genotype, channels=48, cells=14, stem="imagenet")
    assert parameter_count(built) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_auxiliary_head_is_there_in_training_only():
    with torch.device("meta"):
        plain, helped = GenotypeNetwork(10), GenotypeNetwork(10, auxiliary=True)
        assert parameter_count(helped) - parameter_count(plain) == 476_426
    built, images = network(auxiliary=True), torch.rand(2, 3, 32, 32)
    logits, auxiliary = built(images)
    assert logits.shape == auxiliary.shape == (2, 5)
    assert built.eval()(images).shape == (2, 5)
    assert flop_count(built, (3, 32, 32)) == flop_count(network(), (3, 32, 32))


def test_cells_at_one_and_two_thirds_halve_the_image_and_double_the_channels():
    built = network(cells=8)
    shapes = []
    for cell in built.cells:
        cell.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    built(torch.rand(2, 3, 12, 20))
    normal, half, quarter = (16, 12, 20), (32, 6, 10), (64, 3, 5)
    assert shapes == [normal, normal, half, half, half, quarter, quarter, quarter]


def test_a_cell_of_identities_by_hand():
    built = network(IDENTITY, channels=2, stem_multiplier=1, cells=3).eval()
    cell = built.cells[0]
    first, second = torch.randn(2, 2, 6, 6), torch.randn(2, 2, 6, 6)
    by_hand = torch.zeros(2, 2, 6, 6)
    for features, preprocess in ((first, cell.preprocess0), (second, cell.preprocess1)):
        weight = preprocess.conv.weight[:, :, 0, 0]
        mixed = torch.einsum("oi,bihw->bohw", weight, features.relu())
        by_hand += mixed / (1 + preprocess.norm.eps) ** 0.5  # the running statistics are still 0 and 1
    torch.testing.assert_close(cell(first, second), by_hand)


@pytest.mark.parametrize("name", OPS)
def test_any_operation_can_be_on_any_edge(name):
    nodes = (((name, 0), (name, 1)), ((name, 1), (name, 2)))
    genotype = Genotype(nodes, (2, 3), nodes, (2, 3), operations=tuple(OPS))
    built = network(genotype)
    built(torch.rand(2, 3, 9, 9)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 8), (9, 4), (28, 28), (33, 17)])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("genotype", ["darts_v2", "pc_darts_cifar"])
def test_any_size_and_any_channels_will_do(genotype, channels, size):
    built = network(genotype, in_channels=channels, image_size=size, auxiliary=True, drop_path=0.2)
    logits, auxiliary = built(torch.rand(3, channels, *size))
    assert logits.shape == auxiliary.shape == (3, 5)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in built.parameters())


def test_the_stem_for_imagenet_is_the_authors():
    """`NetworkImageNet` of https://github.com/quark0/darts/blob/master/cnn/model.py: a ReLU before each later layer."""
    torch.manual_seed(0)
    built, images = network(stem="imagenet").double().eval(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    conv1, norm1, _, conv2, norm2 = built.stem
    _, conv3, norm3 = built.stem1
    seen = []
    built.cells[0].register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[:2]))
    built(images)
    first = norm2(F.conv2d(norm1(F.conv2d(images, conv1.weight, None, 2, 1)).relu(), conv2.weight, None, 2, 1))
    torch.testing.assert_close(seen, [first, norm3(F.conv2d(first.relu(), conv3.weight, None, 2, 1))])
    assert (first < 0).any()
    assert conv1.out_channels == built.cells[0].channels // 8


@pytest.mark.parametrize("size", [(25, 25), (31, 64), (224, 224)])
def test_the_stem_for_imagenet_takes_an_eighth_of_the_size(size):
    built = network(stem="imagenet", channels=8, cells=3, auxiliary=True)
    seen = []
    built.cells[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2:]))
    assert built(torch.rand(2, 3, *size))[0].shape == (2, 5)
    assert seen == [tuple(-(-side // 8) for side in size)]
    assert not any(isinstance(module, nn.ReLU) and module.inplace for module in built.modules())


@pytest.mark.parametrize("norm", ["batch", "group", "sync_batch"])
def test_every_norm_runs(norm):
    assert network(norm=norm, auxiliary=True)(torch.rand(3, 3, 8, 8))[0].shape == (3, 5)
    kinds = {type(module) for module in network(norm=norm).modules() if "Norm2d" in type(module).__name__}
    assert kinds == ({type(norm_layer(norm, 4))} if norm != "group" else set())


def test_the_form_of_the_search_has_norms_without_parameters_and_behind_pools():
    trained, searched = network(), network(affine=False, pool_norm=True)
    inside = [module for module in searched.cells.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(module.affine for module in inside)
    assert searched.stem[1].affine
    pools = sum(isinstance(module, nn.MaxPool2d | nn.AvgPool2d) for module in searched.modules())
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in each.modules()) for each in (trained, searched)]
    assert pools > 0
    assert norms[1] == norms[0] + pools


def test_what_the_output_does_not_depend_on_is_not_built():
    """Parameters without a gradient would stop DistributedDataParallel."""
    nodes = ((("sep_conv_3x3", 1),), (("sep_conv_3x3", 0),), (("dil_conv_3x3", 2),))
    built = network(Genotype(nodes, (4,), nodes, (4,)))
    assert [[wire.target for wire in cell.wires] for cell in built.cells] == [[2, 4]] * 3
    assert all(cell.preprocess0 is None for cell in built.cells)
    built(torch.rand(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


def test_random_cells_are_of_the_same_space_and_come_from_their_seed():
    found = load_genotype("darts_v2")
    first, again, second = (network(random=seed).genotype for seed in (0, 0, 1))
    assert first == again
    assert len({first.digest(), second.digest(), found.digest()}) == 3
    assert [len(node) for node in first.normal] == [2] * 4
    assert network().genotype == found


def test_two_networks_share_nothing():
    first, second = network(), network()
    own = {id(parameter) for parameter in first.parameters()}
    assert not own & {id(parameter) for parameter in second.parameters()}


# Drop path


def test_drop_path_of_zero_is_no_change():
    images = torch.rand(4, 3, 8, 8)
    built = network()
    assert built.drop_path == 0
    first = built(images)
    torch.testing.assert_close(network_like(built, drop_path=0.0)(images), first)
    torch.manual_seed(1)
    assert not torch.allclose(network_like(built, drop_path=0.5)(images), first, atol=1e-3)


def network_like(other, **attributes):
    copied = copy.deepcopy(other)
    for name, value in attributes.items():
        setattr(copied, name, value)
    return copied


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    features = torch.rand(20_000, 2, 1, 2) + 0.5
    dropped = drop_images(features, torch.tensor(0.5))
    alive = dropped.flatten(1) != 0
    assert (alive.all(1) == alive.any(1)).all()
    assert alive.any(1).double().mean() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(dropped[alive.any(1)], 2 * features[alive.any(1)])
    assert dropped.mean().item() == pytest.approx(features.mean().item(), rel=0.02)


def test_drop_path_leaves_identities_alone_and_drops_all_else():
    """Also the skip of a reduction cell, which is not an identity, and pools."""
    identities = network(IDENTITY).cells[0]
    first, second = torch.rand(64, 12, 4, 4), torch.rand(64, 12, 4, 4)
    identities.eval()
    assert torch.equal(identities(first, second, torch.tensor(0.9)), identities(first, second))
    nodes = ((("max_pool_3x3", 0), ("skip_connect", 1)),)
    built = network(Genotype(nodes, (2,), nodes, (2,))).eval()
    assert dropped_images(built.cells[0]) == (True, False)
    assert dropped_images(built.cells[1]) == (True, True)  # a reduction


def dropped_images(cell):
    """Which of a cell's two edges were ever left out, over many images."""
    inputs = [torch.rand(64, block.conv.in_channels, 4, 4) for block in (cell.preprocess0, cell.preprocess1)]
    results = []
    for operation in cell.operations:
        operation.register_forward_hook(lambda module, given, output: results.append(output))
    whole = cell(*inputs)
    parts = torch.stack(results[-2:])
    dropped = cell(*inputs, torch.tensor(0.5))
    found = []
    for edge in (0, 1):
        # each image is a sum of 0 or 2 times (or of an identity once) each part
        others = [torch.zeros_like(whole), parts[1 - edge], 2 * parts[1 - edge]]
        found.append(any(bool((dropped - other).flatten(1).abs().amax(1).lt(1e-5).any()) for other in others))
    return tuple(found)


def test_evaluation_drops_nothing(warmed):
    built = warmed(network(auxiliary=True, drop_path=0.9), size=8)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(built(images), built(images))
    assert torch.equal(built(images), network_like(built, drop_path=0.0)(images))


def test_a_compiled_network_is_not_compiled_anew_for_each_probability():
    built, graphs = network(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    built.compile(backend=count)
    images = torch.rand(2, 3, 8, 8)
    for probability in (0.1, 0.2, 0.3):
        built.drop_path = probability
        assert built.drop_path == probability
        built(images)
    assert len(graphs) == 1


def test_an_impossible_probability_is_refused_also_later():
    built = network()
    with pytest.raises(ValueError, match="drop_path is 1"):
        built.drop_path = 1


# Auxiliary head


@pytest.mark.parametrize(("size", "stride"), [(8, 3), (7, 2)])
def test_the_auxiliary_pool_is_the_authors(size, stride):
    features = torch.rand(2, 3, size, size)
    expected = nn.AvgPool2d(5, stride=stride, padding=0, count_include_pad=False)(features)
    assert expected.shape[2:] == (2, 2)
    torch.testing.assert_close(pool_to_two(features), expected)


@pytest.mark.parametrize("height", [1, 2, 3, 5, 28])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_the_auxiliary_pool_gives_two_by_two_and_sees_every_pixel(height, width):
    features = torch.rand(1, 1, height, width, requires_grad=True)
    pooled = pool_to_two(features)
    assert pooled.shape == (1, 1, 2, 2)
    pooled.sum().backward()
    assert (features.grad > 0).all()
    torch.testing.assert_close(pool_to_two(torch.full_like(features, 3.0)), torch.full((1, 1, 2, 2), 3.0))


def test_the_auxiliary_head_is_the_authors():
    """`AuxiliaryHeadCIFAR` of https://github.com/quark0/darts/blob/master/cnn/model.py."""
    torch.manual_seed(0)
    head, features = AuxiliaryHead(4, 3, partial(norm_layer, "batch")).double(), torch.randn(2, 4, 8, 8).double()
    pooled = F.avg_pool2d(features.relu(), 5, 3)
    narrow = head.norm1(F.conv2d(pooled, head.conv1.weight)).relu()
    wide = head.norm2(F.conv2d(narrow, head.conv2.weight)).relu()
    expected = F.linear(wide.flatten(1), head.classifier.weight, head.classifier.bias)
    torch.testing.assert_close(head(features), expected)


def test_the_auxiliary_head_does_not_change_what_it_is_given():
    head = AuxiliaryHead(4, 3, partial(norm_layer, "batch"))
    features = torch.randn(2, 4, 8, 8)
    before = features.clone()
    head(features)
    assert torch.equal(features, before)


# Genotypes, weights and mistakes


def test_every_way_to_give_a_genotype_builds_the_same_network(tmp_path):
    genotype = load_genotype("darts_v1")
    genotype.save(tmp_path / "genotype.json")
    ways = ["darts_v1", genotype, genotype.to_dict(), str(tmp_path / "genotype.json"), str(tmp_path)]
    for way in ways:
        built = network(way)
        assert built.genotype == genotype
        assert [wire for cell in built.cells for wire in cell.wires] == [
            wire for cell in network("darts_v1").cells for wire in cell.wires
        ]


@pytest.mark.parametrize("auxiliary", [False, True])
def test_weights_are_loaded_also_for_other_classes_and_channels(tmp_path, auxiliary):
    saved = network(auxiliary=True).eval()
    torch.save({"state_dict": {f"model.{name}": v for name, v in saved.state_dict().items()}}, tmp_path / "a.ckpt")
    given = str(tmp_path / "a.ckpt")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(network(auxiliary=auxiliary, weights=given).eval()(images), saved(images))
    other = network(num_classes=2, in_channels=1, auxiliary=auxiliary, weights=given)
    loaded, heads = saved.state_dict(), ("classifier.", "auxiliary_head.classifier.")
    for name, value in other.state_dict().items():
        if not name.startswith(heads) and name != "stem.0.weight":
            assert torch.equal(value, loaded[name]), name
    torch.testing.assert_close(other.stem[0].weight, saved.stem[0].weight.sum(1, keepdim=True))


def test_the_cell_of_a_network_without_one_kind_of_cell_is_refused():
    with pytest.raises(ValueError, match="no reduction cell"):
        network(Genotype(SKIPS, (2,)))


def test_normalization_is_kept_for_the_task():
    assert network().normalization is None
    assert network(mean=(0.1, 0.2, 0.3), std=[1, 2, 3]).normalization == ([0.1, 0.2, 0.3], [1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cells": 2}, "cells is 2; it must be 3 or more"),
        ({"channels": 5}, "channels is 5; it must be even"),
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"stem_multiplier": 0}, "stem_multiplier is 0"),
        ({"stem": "cfar"}, "unknown stem 'cfar'; known: cifar, imagenet"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"drop_path": 1.0}, r"drop_path is 1.0; it is a probability in \[0, 1\)"),
        ({"image_size": 3}, "images have 3 x 3 pixels.*from 4 x 4"),
        ({"image_size": (32, 3)}, "images have 32 x 3 pixels"),
        ({"image_size": 24, "stem": "imagenet"}, "24 x 24 pixels.*from 25 x 25"),
        ({"genotype": "darts_v3"}, "'darts_v3'.*did you mean darts_v"),
        ({"genotype": "nowhere/genotype.json"}, "no such file"),
        ({"genotype": {"normal": []}}, "normal_concat"),
        ({"genotype": "|skip_connect~0|"}, "one input and those of the network two inputs; use NasBench201Network"),
        ({"random": -1}, "seed"),
        ({"mean": [0.5] * 3}, "std is missing"),
        ({"std": [0.5] * 3}, "mean is missing"),
    ],
    ids=str,
)
def test_impossible_networks_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="3 x 8 pixels"):
        network()(torch.rand(2, 3, 3, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["normal"][0].__setitem__(0, ["sep_conv_9x9", 0]), "unknown operation 'sep_conv_9x9'"),
        (lambda content: content["normal"][0].__setitem__(0, ["sep_conv_3x3", 2]), "source 2"),
        (lambda content: content["reduce_concat"].append(9), "reduce_concat of a genotype has 9"),
    ],
)
def test_files_with_a_mistake_are_refused_with_the_reason(tmp_path, change, message):
    content = load_genotype("darts_v2").to_dict()
    change(content)
    (tmp_path / "g.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        network(str(tmp_path / "g.json"))
