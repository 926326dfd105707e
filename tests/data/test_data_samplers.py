import pytest
import torch

from lightning_automl.data.samplers import EvalSampler, OverfitSampler, TrainSampler, mix
from lightning_automl.rundir import UserError


def labels(images, classes=3):
    return torch.arange(images) % classes


def joint_batches(images, batch_size, world_size, epoch=0):
    ranks = [TrainSampler(labels(images), batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.set_epoch(epoch)
    return [torch.cat(step) for step in zip(*ranks, strict=True)]


def test_mix_is_splitmix64():
    # the first two outputs of https://prng.di.unimi.it/splitmix64.c from the state 0 and 1234567
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    assert mix(1234567) == 6457827717110365317 >> 1


def test_mix_tells_seed_epoch_batch_and_rank_apart():
    seeds = {mix(a, b, c, d) for a in range(5) for b in range(5) for c in range(5) for d in range(5)}
    assert len(seeds) == 5**4
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_take_the_batches_of_one_process(world_size):
    one = joint_batches(96, 32, world_size=1)
    many = joint_batches(96, 32 // world_size, world_size)
    assert len(one) == len(many) == 3
    assert all(set(a.tolist()) == set(b.tolist()) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [8, 17, 100, 101, 257])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 16, 1000])
def test_an_epoch_has_every_index_at_most_once_in_batches_of_equal_size(images, batch_size, world_size):
    ranks = [TrainSampler(labels(images), batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    epochs = [list(rank) for rank in ranks]
    sizes = [[len(batch) for batch in epoch] for epoch in epochs]
    assert all(size == sizes[0] for size in sizes)
    assert max(sizes[0]) - min(sizes[0]) <= 1
    assert max(sizes[0]) <= batch_size
    assert len(sizes[0]) == len(ranks[0])
    if batch_size > 1 and images >= 2 * world_size:
        assert min(sizes[0]) > 1
    seen = torch.cat([batch for epoch in epochs for batch in epoch])
    assert len(seen.unique()) == len(seen)
    assert images - len(seen) < world_size * (2 if batch_size == 2 else 1)


def test_shuffling_changes_with_the_epoch_and_the_seed_only():
    def order(seed, epoch):
        return TrainSampler(labels(50), 50, seed=seed).order(epoch).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 1) != order(1, 0)
    torch.manual_seed(1)
    assert order(3, 4) == order(3, 4)


def test_the_images_that_are_left_out_differ_between_epochs():
    left_out = set()
    for epoch in range(20):
        seen = torch.cat(joint_batches(31, 5, world_size=2, epoch=epoch)).tolist()
        left_out |= set(range(31)) - set(seen)
    assert len(left_out) > 5


def test_batches_that_are_done_are_skipped_in_the_first_epoch_only():
    whole = TrainSampler(labels(40), 10, epoch=2)
    expected = [list(whole), list(whole)]
    resumed = TrainSampler(labels(40), 10, epoch=2, done=3)
    assert len(resumed) == 4
    first, second = list(resumed), list(resumed)
    assert torch.equal(first[0], expected[0][3])
    assert len(first) == 1
    assert all(torch.equal(a, b) for a, b in zip(second, expected[1], strict=True))


def test_an_iterator_that_is_not_used_takes_nothing_away():
    sampler = TrainSampler(labels(40), 10, done=3)
    iter(sampler)
    assert len(list(sampler)) == 1


def test_the_epoch_never_goes_back():
    sampler = TrainSampler(labels(40), 10, epoch=3, done=2)
    sampler.set_epoch(1)
    assert (sampler.epoch, sampler.done) == (3, 2)
    sampler.set_epoch(4)
    assert (sampler.epoch, sampler.done) == (4, 0)


def test_balanced_draws_each_class_equally_often():
    counts = torch.tensor([1000, 90, 10])
    unequal = torch.repeat_interleave(torch.arange(3), counts)
    sampler = TrainSampler(unequal, 100, balanced=True)
    drawn = torch.cat([batch for _ in range(10) for batch in sampler])
    number = len(drawn)
    assert number == 10 * 1100
    frequencies = torch.bincount(unequal[drawn]) / number
    sigma = (1 / 3 * 2 / 3 / number) ** 0.5
    assert (frequencies - 1 / 3).abs().max() < 3 * sigma
    each = torch.bincount(drawn, minlength=1100)[-10:] / number  # the ten images of the rarest class
    assert (each - 1 / 30).abs().max() < 3.5 * (1 / 30 / number) ** 0.5


def test_overfitting_keeps_the_order():
    sampler = OverfitSampler(labels(40), 10)
    first = list(sampler)
    sampler.set_epoch(5)
    assert all(torch.equal(a, b) for a, b in zip(first, sampler, strict=True))


def test_more_processes_than_train_images_are_refused():
    with pytest.raises(UserError, match="the train split has 3 images for 4 processes; use fewer processes"):
        TrainSampler(labels(3), 8, world_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [1, 5, 17, 100])
def test_evaluation_covers_every_image_once(images, world_size):
    ranks = [EvalSampler(images, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = torch.cat([batch for rank in ranks for batch in rank])
    assert sorted(seen.tolist()) == list(range(images))
    assert all(len(rank) == len(list(rank)) >= 1 for rank in ranks)


def test_evaluation_in_one_process_keeps_the_order():
    assert torch.cat(list(EvalSampler(10, 4))).tolist() == list(range(10))
