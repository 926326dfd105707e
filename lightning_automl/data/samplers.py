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
_ARCH = 0x61726368  # tells the orders of the two streams apart


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


class StreamSampler(TrainSampler):
    """Batches of two streams: an epoch of ``train`` as :class:`TrainSampler` gives it, beside it batches of ``arch``.

    The images of ``arch`` come in permutations of their own, one behind the other without end, from which the joint
    batch of step ``t`` of the run (steps of an epoch times epoch, plus step) takes the images ``t * size`` to
    ``(t + 1) * size``: over any number of epochs each is seen as often as another, or once more. ``size`` is that of
    the largest batch of ``train``, if there are so many, and the ranks share it evenly.

    Args:
        labels: Labels ``(images,)`` of ``train``, in [0, classes).
        arch_labels: Labels ``(images,)`` of ``arch``.
        batch_size: Images of each stream that a rank takes in one step at most.
        settings: As those of :class:`TrainSampler`; ``balanced`` holds for both streams.

    Raises:
        UserError: If a stream has fewer images than there are processes.
    """

    def __init__(self, labels: Tensor, arch_labels: Tensor, batch_size: int, **settings: Any) -> None:
        super().__init__(labels, batch_size, **settings)
        seed = mix(self.seed, _ARCH)
        self.arch = TrainSampler(arch_labels, batch_size, **{**settings, "seed": seed})
        self.arch_size = min(-(-self.share // self.steps), self.arch.share) * self.num_replicas
        self._cycles: dict[int, Tensor] = {}  # the orders of the two newest

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]  # of two streams
        position = self.epoch * self.steps + self.done
        for train in super().__iter__():
            yield {"train": train, "arch": self.arch_batch(position)}
            position += 1

    def arch_batch(self, position: int) -> Tensor:
        """This rank's indices into ``arch`` of the step ``position`` of the run."""
        images = len(self.arch.labels)
        cycle, place = divmod(position * self.arch_size, images)
        order = self._cycle(cycle)[place : place + self.arch_size]
        if len(order) < self.arch_size:
            order = torch.cat([order, self._cycle(cycle + 1)[: self.arch_size - len(order)]])
        return order[self.rank :: self.num_replicas]

    def _cycle(self, cycle: int) -> Tensor:
        if cycle not in self._cycles:
            self._cycles = {number: order for number, order in self._cycles.items() if number == cycle - 1}
            self._cycles[cycle] = self.arch.order(cycle)
        return self._cycles[cycle]


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
