"""Two real processes with gloo stand for two GPUs."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from two_ranks import part, run_twice

from lightning_automl.models.layers import SyncBatchNorm2d, norm_layer

IMAGES = 8
#: How many of the images rank 0 has in each step; rank 1 has the rest.
UNEQUAL = [5, 3, 6]
CASES = {
    "unequal batches": {"shares": UNEQUAL},
    "no images on one rank": {"shares": [0, IMAGES, 0]},
    "cumulative average": {"shares": UNEQUAL, "momentum": None},
    "no tracking": {"shares": UNEQUAL, "track": False},
}


def network(norm, momentum):
    """Two norms with a convolution between them: what the second one's statistics depend on passes the first one."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), norm(4, momentum=momentum), nn.SiLU(), nn.Conv2d(4, 6, 3), norm(6, affine=False)
    ).double()
    with torch.no_grad():
        layers[1].weight.uniform_(0.5, 2)
        layers[1].bias.normal_()
    return layers


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(IMAGES, 3, 7, 6, generator=generator, dtype=torch.float64) * 2 + 1
    return images, torch.randn(IMAGES, 6, 5, 4, generator=generator, dtype=torch.float64)


def add_up(value):
    return all_reduce(value) if dist.is_initialized() else value


def train(norm, share, rank=0, momentum=0.1, track=True, shares=None):
    """A step a share on this rank's images, and what a user would look at after it."""
    layers, found = network(norm, momentum), []
    for module in layers.modules():
        if hasattr(module, "track_running_stats"):
            module.track_running_stats = track
    parameters = list(layers.parameters())
    for step, number in enumerate(shares or [share] * 3):
        images, weights = (value[number:] if rank else value[:number] for value in batch(step))
        images.requires_grad_()
        out = layers(images)
        loss = ((out + out**3) * weights).sum() / 100  # gradients of about 1
        image_gradient, *gradients = torch.autograd.grad(loss, [images, *parameters], create_graph=True)
        gradient = add_up(torch.cat([value.flatten() for value in gradients]))
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        second = torch.autograd.grad(gradient.square().sum() / ranks, parameters)
        second = add_up(torch.cat([value.flatten() for value in second]))
        with torch.no_grad():
            pieces = gradient.detach().split([value.numel() for value in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter -= 1e-2 * piece.view_as(parameter)
        buffers = {name: value.clone() for name, value in layers.named_buffers()}
        found.append({"images": [out.detach(), image_gradient.detach()], "same": [gradient.detach(), second, buffers]})
    with torch.no_grad():
        return {"steps": found, "evaluated": layers.eval()(batch(9)[0])}


def narrow(rank):
    """In less than float64."""
    torch.manual_seed(rank)
    far = (torch.randn(16, 4, 8, 8) + 1e4).contiguous(memory_format=torch.channels_last)
    norm = SyncBatchNorm2d(4)
    out = norm(far)
    half = norm(torch.randn(4, 4, 8, 8).bfloat16())
    return {
        "deviation": out.std((0, 2, 3)).detach(),
        "channels_last": out.is_contiguous(memory_format=torch.channels_last),
        "half": [str(half.dtype), bool(half.isfinite().all()), str(norm.running_var.dtype)],
    }


def on_rank(rank):
    """Runs in each of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: train(SyncBatchNorm2d, None, rank, **case) for name, case in CASES.items()}
    torch.save(found | {"narrow": narrow(rank)}, f"rank{rank}.pt")
    part()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks have found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_twice(__file__, folder, "-W", "error::UserWarning")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_with_the_joint_batch(ranks, name):
    """Values, gradients (also those of gradients), running statistics, and what the trained network then gives."""
    options = {key: value for key, value in CASES[name].items() if key != "shares"}
    expected = train(nn.BatchNorm2d, IMAGES, **options)
    exact = {"rtol": 1e-10, "atol": 1e-10}
    zero, one = (rank[name] for rank in ranks)
    for joint, first, second in zip(expected["steps"], zero["steps"], one["steps"], strict=True):
        parts = [torch.cat(pair) for pair in zip(first["images"], second["images"], strict=True)]
        torch.testing.assert_close(parts, joint["images"], **exact)
        for rank in (first, second):
            torch.testing.assert_close(rank["same"], joint["same"], **exact)
    for rank in (zero, one):
        torch.testing.assert_close(rank["evaluated"], expected["evaluated"], **exact)
    moved = expected["steps"][-1]["same"][2]["1.running_mean"].any()
    assert moved == CASES[name].get("track", True)


def test_plain_batch_normalisation_would_not_pass(ranks):
    joint = train(nn.BatchNorm2d, IMAGES)
    alone = train(nn.BatchNorm2d, UNEQUAL[0])
    out = joint["steps"][0]["images"][0][: UNEQUAL[0]]
    assert (alone["steps"][0]["images"][0] - out).abs().max() > 1e-3


def test_a_mean_far_from_zero_does_not_drown_the_deviation(ranks):
    """In float32 the mean of squares minus the squared mean, 1e8 each, would be anything."""
    for rank in ranks:
        torch.testing.assert_close(rank["narrow"]["deviation"], torch.ones(4), rtol=0.1, atol=0)


def test_the_layout_and_the_dtype_stay(ranks):
    for rank in ranks:
        assert rank["narrow"]["channels_last"]
        assert rank["narrow"]["half"] == ["torch.bfloat16", True, "torch.float32"]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_without_a_process_group_it_is_plain_batch_normalisation(momentum, track):
    found, expected = (
        train(norm, IMAGES, momentum=momentum, track=track) for norm in (SyncBatchNorm2d, nn.BatchNorm2d)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_loads_what_plain_batch_normalisation_has_saved_and_folds_as_such():
    norm = norm_layer("sync_batch", 4)
    assert isinstance(norm, SyncBatchNorm2d)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize(
    ("name", "kind"), [("batch", nn.BatchNorm2d), ("sync_batch", SyncBatchNorm2d), ("group", nn.GroupNorm)]
)
def test_a_norm_has_a_scale_and_a_shift_unless_it_is_not_affine(name, kind):
    for affine, expected in ((True, 2 * 12), (False, 0)):
        norm = norm_layer(name, 12, affine=affine)
        assert isinstance(norm, kind)
        assert sum(value.numel() for value in norm.parameters()) == expected
    assert not list(norm_layer("none", 12, affine=True).parameters())


if __name__ == "__main__":
    on_rank(int(os.environ["RANK"]))
