"""Samplers that yield one index tensor a batch; the order is a function of (seed, epoch) alone, sharded by rank.

Both are subclasses of ``DistributedSampler`` only so that Lightning does not put its own sampler in their place: the
one it injects for validation pads with repeated images and so changes the metrics.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from lightning_automl.rundir import UserError

_BITS = (1 << 64) - 1


def mix(*values: int) -> int:
    """Mix integers into one seed in [0, 2**63), the same on every platform (splitmix64, one round a value).

    Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014; constants of
    https://prng.di.unimi.it/splitmix64.c.
    """
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _BITS
        state ^= state >> 31
    return state >> 1


class TrainSampler(DistributedSampler[Tensor]):
    """Shuffled batches of nearly equal size, the same joint batches for any number of processes.

    An epoch is cut into ``ceil(images / (batch_size * world_size))`` joint batches whose shares differ by at most one
    image, and each joint batch is dealt out evenly, so that all ranks have the same size at every step. Up to
    ``world_size - 1`` images are left out of an epoch, other ones each epoch. A batch of one image (BatchNorm cannot
    train on it) occurs only with ``batch_size=1`` or a single image a rank.

    Args:
        labels: Labels ``(images,)`` in [0, classes); used by ``balanced``.
        batch_size: Images a rank takes in one step at most.
        seed: With the epoch, all that the order depends on.
        rank: This process.
        world_size: Number of processes.
        balanced: Draw images with replacement, each class equally often on average, instead of a permutation.
        epoch: Epoch to start at; :meth:`set_epoch` never goes back behind it.
        done: Batches of the first epoch to skip, because a checkpoint was written after them.

    Raises:
        UserError: If there are fewer images than processes.
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        balanced: bool = False,
        epoch: int = 0,
        done: int = 0,
    ) -> None:
        super().__init__(cast("Dataset[Any]", labels), num_replicas=world_size, rank=rank, seed=seed)
        images = len(labels)
        if images < world_size:
            raise UserError(f"the train split has {images} images for {world_size} processes; use fewer processes")
        self.labels = labels
        self.balanced = balanced
        self.steps = math.ceil(images / (batch_size * world_size))
        self.share = images // world_size  # images of one rank in an epoch
        if batch_size > 1 and 2 <= self.share < 2 * self.steps:  # some batch would hold one image
            self.steps = self.share // 2
            self.share = min(self.share, self.steps * batch_size)
        self.epoch = epoch
        self.done = done

    def set_epoch(self, epoch: int) -> None:
        """Go on to ``epoch``; an earlier one is ignored, since Lightning counts from an older one after resuming."""
        if epoch > self.epoch:
            self.epoch = epoch
            self.done = 0

    def order(self, epoch: int) -> Tensor:
        """All indices ``(images,)`` in the order of ``epoch``."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        images = len(self.labels)
        if not self.balanced:
            return torch.randperm(images, generator=generator)
        counts = torch.bincount(self.labels)
        present = counts.nonzero().flatten()
        chosen = present[torch.randint(len(present), (images,), generator=generator)]
        within = torch.randint(2**62, (images,), generator=generator) % counts[chosen]
        first = counts.cumsum(0) - counts
        return self.labels.argsort(stable=True)[first[chosen] + within]

    def __iter__(self) -> Iterator[Tensor]:
        epoch, done = self.epoch, self.done
        self.done = 0
        order = self.order(epoch)
        bounds = [step * self.share // self.steps * self.num_replicas for step in range(self.steps + 1)]
        for step in range(done, self.steps):
            yield order[bounds[step] : bounds[step + 1]][self.rank :: self.num_replicas]
        self.set_epoch(epoch + 1)  # a loop without Lightning need not call it

    def __len__(self) -> int:
        return self.steps  # of a whole epoch: Lightning itself counts the batches done before a checkpoint


class OverfitSampler(TrainSampler, SequentialSampler):  # type: ignore[misc]  # yields tensors, not numbers
    """The same order every epoch, and by its base class left alone by ``Trainer(overfit_batches=...)``."""

    def set_epoch(self, epoch: int) -> None:
        """Stay."""


class EvalSampler(DistributedSampler[Tensor], SequentialSampler):
    """Every image exactly once over all ranks, in order, without padding.

    Ranks may have different numbers of batches, so a step must not contain a collective. A rank without images yields
    one empty batch: with no batch at all Lightning skips the loop on that rank, and the others wait for ever in the
    reduction at its end.

    Args:
        images: Number of images.
        batch_size: Images in a batch; the last one may be smaller.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, images: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        rows = torch.arange(images)
        super().__init__(cast("Dataset[Any]", rows), num_replicas=world_size, rank=rank, shuffle=False)
        self.batches = torch.split(rows[rank::world_size], batch_size)

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]  # SequentialSampler yields numbers
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
