"""What all data modules share: splits, decoded images, order and augmentation that follow the training position."""

import logging
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_automl.augment.crops import random_crop, random_crop_flip
from lightning_automl.augment.policy import ImagePolicy
from lightning_automl.data.cache import ImageCache, progress, readable_size
from lightning_automl.data.datasets import Batch, LabelledImages, Streams
from lightning_automl.data.measure import Facts, facts_type, find_leaks, mean_and_std, measure, measure_window
from lightning_automl.data.policies import base_padding, check_images, find_policy
from lightning_automl.data.samplers import EvalSampler, OverfitSampler, StreamSampler, TrainSampler, mix
from lightning_automl.data.splits import cut_streams, make_splits
from lightning_automl.image_files import windowed
from lightning_automl.rundir import UserError

log = logging.getLogger(__name__)

_VALUES_AT_ONCE = 2**24  # pixels that are read and converted together, 128 MB as float64


@dataclass(frozen=True)
class Index:
    """What is known about the images before any is decoded.

    Args:
        labels: Class ``(images,)`` of each image, int64 in [0, classes).
        class_names: One name a class.
        channels: Number of channels.
        image_size: Height and width, in pixels.
        names: What to call each image in messages: a file name, or ``train[12]``.
        splits: ``"train"``, ``"val"``, ``"test"`` or ``""`` for each image, if the data bring such splits.
        groups: A value for each image; images of one group (a patient, a slide) stay in one split.
    """

    labels: NDArray[np.int64]
    class_names: list[str]
    channels: int
    image_size: tuple[int, int]
    names: Sequence[str]
    splits: NDArray[np.str_] | None = None
    groups: NDArray[Any] | None = None


class _Loader(DataLoader[Any]):
    """A loader that Lightning takes as resumable; what is to be resumed is in the data module's state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _as_is(batch: Any) -> Any:
    return batch


class ImageDataModule(LightningDataModule, ABC):
    """Labelled images, kept as uint8 in memory or on disk; batches are ``(images, labels)``.

    From the loaders ``images`` are uint8 ``(batch, channels, height, width)``; on the device they are augmented (in
    training only) and become float in [0, 1]. Order and augmentation are functions of (seed, epoch, batch, rank) alone,
    so that a run resumed from any checkpoint, in mid-epoch too, equals an uninterrupted one. The loaders shard by rank
    themselves; validation and test see every image exactly once.

    A subclass says what there is in :meth:`index` and brings images in :meth:`read`; it sets what these need before it
    calls ``super().__init__(**kwargs)``::

        class NoiseDataModule(ImageDataModule):
            def __init__(self, images: int = 100, **kwargs: Any) -> None:
                self.pixels = np.random.default_rng(0).integers(0, 256, (images, 1, 8, 8), dtype=np.uint8)
                super().__init__(**kwargs)

            def index(self) -> Index:
                labels = np.arange(len(self.pixels)) % 2
                names = [f"noise[{row}]" for row in range(len(labels))]
                return Index(labels, ["a", "b"], channels=1, image_size=(8, 8), names=names)

            def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
                return self.pixels[rows]

    Right after construction there are ``num_classes``, ``class_names``, ``channels``, ``image_size`` (height, width),
    ``split_rows`` (rows of the index by split), ``stream_rows`` (with ``arch_fraction`` those of the train split that
    ``train`` and ``arch`` have, else empty) and ``class_counts`` (int64 ``(classes,)`` of the train split). After
    :meth:`setup` there are also ``mean`` and ``std`` (float ``(channels,)``, of the train split in [0, 1]), ``window``
    (float ``(channels, 2)``: what became 0 and 255, or None for 8-bit images) and ``leaks`` (pairs of names of
    byte-identical images in different splits).

    Args:
        batch_size: Images a process takes in one step; ``auto`` starts at 128, and whoever tries batch sizes sets
            ``device_batch_size`` before the loaders are made.
        base_augment: Random shift by up to an eighth of the image with zeros from outside, and mirroring left to right;
            within the operation space of ``train_policy``, if that has one.
        train_policy: Applied in training after ``base_augment``: an image policy, the path of a ``policy.json``, or
            anything else that maps uint8 ``(batch, channels, height, width)`` to the same.
        fold: Number of the fold, in [0, folds), that is the val split; train and val together are cut into ``folds``.
        folds: Number of folds.
        without_folds: Numbers of folds whose images are in no split, kept apart for another use, such as the comparison
            that a searched policy has to stand; only with ``fold``.
        subset: Stratified share of the train split to train on, in (0, 1].
        val_fraction: Share of the train split that becomes the val split, if the data bring none.
        test_fraction: Share of all images that becomes the test split, if the data bring none.
        train_on_val: Train on the val split as well, for a last run after all choices are made; set
            ``trainer.limit_val_batches`` to 0, since nothing is left to validate on.
        split_seed: Decides about splits, folds and subset, independently of the run's seed.
        sampling: ``balanced`` draws each class equally often, with replacement, instead of shuffling.
        predict_split: Split that ``predict`` goes through, in order.
        arch_fraction: Stratified share of the train split, in (0, 1), that an architecture search learns its
            architecture on, while it learns the weights on the rest: batches of training then are
            ``{"train": (images, labels), "arch": (images, labels)}``. An epoch goes once through the rest; the share is
            gone through in an order of its own, again and again. Normalisation, class weights and ``split_rows`` remain
            those of the whole train split, as of the network that is trained on it later.
        arch_augment: Whether the images of that share are augmented too, as Liu et al. do in DARTS (2019).

    Raises:
        UserError: If the data or an argument do not allow what was asked for.
    """

    num_classes: int
    class_names: list[str]
    channels: int
    image_size: tuple[int, int]
    split_rows: dict[str, NDArray[np.int64]]
    stream_rows: dict[str, NDArray[np.int64]]
    class_counts: Tensor
    mean: Tensor
    std: Tensor
    window: Tensor | None
    leaks: list[tuple[str, str]]

    def __init__(
        self,
        *,
        batch_size: int | Literal["auto"] = 128,
        base_augment: Literal["none", "crop", "crop_flip"] = "none",
        # In this order: jsonargparse takes the first that fits, and as a text every class and function would do. From
        # Python a Path will do as well.
        train_policy: ImagePolicy | nn.Module | Callable[[Tensor], Any] | str | None = None,
        fold: int | None = None,
        folds: int = 5,
        without_folds: Sequence[int] | None = None,
        subset: float | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        train_on_val: bool = False,
        split_seed: int = 0,
        sampling: Literal["shuffle", "balanced"] = "shuffle",
        predict_split: Literal["train", "val", "test"] = "test",
        arch_fraction: float | None = None,
        arch_augment: bool = True,
    ) -> None:
        super().__init__()
        _check_choice("base_augment", base_augment, ("none", "crop", "crop_flip"))
        _check_choice("sampling", sampling, ("shuffle", "balanced"))
        _check_choice("predict_split", predict_split, ("train", "val", "test"))
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise UserError(f"batch_size is {batch_size!r}; it must be a number of at least 1, or 'auto'")
        self.batch_size = batch_size
        self.device_batch_size = 128 if batch_size == "auto" else batch_size
        self.base_augment = base_augment
        self.train_policy = find_policy(train_policy)
        self.sampling = sampling
        self.predict_split = predict_split
        self.arch_fraction = arch_fraction
        self.arch_augment = arch_augment

        contents = self.index()
        _check_labels(contents)
        self.contents = contents
        self.class_names = list(contents.class_names)
        self.num_classes = len(self.class_names)
        self.channels = contents.channels
        self.image_size = contents.image_size
        self._padding = base_padding(base_augment, self.train_policy, self.image_size)
        check_images(self.train_policy, self.channels, self.image_size)
        self.split_rows = make_splits(
            contents.labels,
            self.class_names,
            contents.splits,
            contents.groups,
            fold=fold,
            folds=folds,
            without_folds=without_folds or (),
            subset=subset,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            train_on_val=train_on_val,
            seed=split_seed,
        )
        self.stream_rows = {}
        if arch_fraction is not None:
            self.stream_rows = cut_streams(
                self.split_rows["train"],
                contents.labels,
                self.class_names,
                contents.groups,
                fraction=arch_fraction,
                seed=split_seed,
            )
        self.class_counts = torch.from_numpy(
            np.bincount(contents.labels[self.split_rows["train"]], minlength=self.num_classes).astype(np.int64)
        )
        self.datasets: dict[str, LabelledImages] = {}
        self._newest: tuple[NDArray[np.int64], NDArray[Any]] | None = None  # rows, and what was read of them
        self._start = (0, 0)  # epoch and batches of it done before this run
        self._epoch: int | None = None  # of the newest train batch of this run
        self._seed = 0
        self._generator: Tensor | None = None  # the state of torch's generator before the training

    @abstractmethod
    def index(self) -> Index:
        """What there is, without decoding an image; called once, by the constructor."""

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Images ``(rows, channels, height, width)`` of these rows of the index: uint8, or to be windowed to 8 bits.

        Called with many rows at a time, several times, always with the same dtype.
        """

    def is_deep(self) -> bool:
        """Whether images have more than 8 bits; a subclass that knows it without reading some says so here."""
        return self._read(self._chunks(self.split_rows["train"])[0]).dtype != np.uint8

    def image_cache(self) -> ImageCache | None:
        """Where decoded images are kept on disk; None keeps them in memory. Called before any is read."""
        return None

    def close(self) -> None:
        """Free what :meth:`read` kept for the next call; called when all images are in memory or on disk."""

    def setup(self, stage: str | None = None) -> None:
        """Read all images, measure the train split and look for images that are in two splits."""
        if stage in (None, "fit"):
            self._start, self._epoch = (0, 0), None
            self._generator = torch.get_rng_state()
        if not self.datasets:
            self._read_all()

    def teardown(self, stage: str) -> None:
        """Give torch's generator back as it was: the next network of a script does not begin as the last one did."""
        if stage == "fit" and self._generator is not None:
            torch.set_rng_state(self._generator)

    def _read_all(self) -> None:
        start = time.monotonic()
        cache = self.image_cache()
        facts = self._read_into_memory() if cache is None else self._read_into(cache)
        self._newest = None
        self.close()
        self.mean, self.std = mean_and_std(facts["train"], self.image_size[0] * self.image_size[1])
        self.leaks = find_leaks(facts, self.split_rows, self.contents.names)
        counts = ", ".join(f"{len(dataset)} {split}" for split, dataset in self.datasets.items())
        size = readable_size(sum(len(dataset) for dataset in self.datasets.values()) * self.image_bytes)
        where = "memory" if cache is None else "the cache"
        seconds = time.monotonic() - start
        log.info("%s images of %d classes (%s) are in %s after %.1f s", counts, self.num_classes, size, where, seconds)
        if self.stream_rows:
            sizes = tuple(map(len, self.stream_rows.values()))
            log.info("of the train images %d are for the weights and %d for the architecture", *sizes)

    @property
    def image_bytes(self) -> int:
        """What one decoded image takes."""
        return self.channels * self.image_size[0] * self.image_size[1]

    def _read_into_memory(self) -> dict[str, Facts]:
        self.window = self._measure_window()
        total = sum(map(len, self.split_rows.values()))
        facts: dict[str, Facts] = {}
        datasets: dict[str, LabelledImages] = {}
        with progress("reading", total, shown=self._rank()[0] == 0) as advance:
            for split, rows in self.split_rows.items():
                images = torch.empty((len(rows), *self.image_size, self.channels), dtype=torch.uint8)
                facts[split] = np.empty(len(rows), facts_type(self.channels))
                first = 0
                for part in self._decode(rows, self.window):
                    here = slice(first, first + len(part))
                    images[here] = torch.from_numpy(part)
                    facts[split][here] = measure(part)
                    advance(len(part))
                    first += len(part)
                datasets[split] = LabelledImages(images, torch.from_numpy(self.contents.labels[rows]))
        self.datasets = datasets
        return facts

    def _read_into(self, cache: ImageCache) -> dict[str, Facts]:
        images, facts, self.window = cache.open(self._measure_window, self._decode)
        labels = torch.from_numpy(self.contents.labels)
        for split, rows in self.split_rows.items():
            places = torch.from_numpy(rows)
            self.datasets[split] = LabelledImages(images, labels[places], places)
        return {split: facts[rows] for split, rows in self.split_rows.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the train split in the order of the epoch, from the position of the checkpoint on."""
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        rank, world_size = self._rank()
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        settings: dict[str, Any] = {
            "seed": self._seed,
            "rank": rank,
            "world_size": world_size,
            "balanced": self.sampling == "balanced",
            "epoch": self._start[0],
            "done": self._start[1],
        }
        dataset: LabelledImages | Streams = self.dataset("train")
        sampler: TrainSampler
        if self.stream_rows:
            self._check_streams(overfit)
            dataset = Streams(self.dataset("train"), self._stream_positions())
            labels = dataset.labels("train"), dataset.labels("arch")
            sampler = StreamSampler(*labels, self.device_batch_size, **settings)
        else:
            kind = OverfitSampler if overfit else TrainSampler
            sampler = kind(self.dataset("train").labels, self.device_batch_size, **settings)
        if self._start[1] >= len(sampler):
            raise UserError(
                f"the checkpoint was written after {self._start[1]} batches of an epoch that has {len(sampler)} now; "
                "resume with the batch size and number of processes that the run was started with"
            )
        return self._loader(dataset, sampler)

    def _check_streams(self, overfit: bool) -> None:
        if overfit:
            raise UserError(
                "arch_fraction and trainer.overfit_batches exclude each other: an architecture is not learned on the "
                "images of the weights; leave one of them out"
            )
        task = None if self.trainer is None else self.trainer.lightning_module
        if "arch" not in getattr(task, "stages", ("arch",)):
            raise UserError(
                f"arch_fraction makes a stream of batches for an architecture search, and {type(task).__name__} is "
                "none; leave arch_fraction out, or use DartsTask"
            )

    def _stream_positions(self) -> dict[str, Tensor]:
        """Where the images of each stream are in the train split, whose rows ascend."""
        train = self.split_rows["train"]
        return {name: torch.from_numpy(np.searchsorted(train, rows)) for name, rows in self.stream_rows.items()}

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the val split, every image once over all ranks."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test split, every image once over all ranks."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches of ``predict_split``, in the order of the index."""
        return self.eval_dataloader(self.predict_split)

    def eval_dataloader(self, split: str) -> DataLoader[Batch]:
        """Batches of any split in the order of the index, not augmented, every image once over all ranks."""
        if split not in self.split_rows:
            raise UserError(f"with train_on_val there is no {split} split; set trainer.limit_val_batches to 0")
        rank, world_size = self._rank()
        dataset = self.dataset(split)
        return self._loader(
            dataset, EvalSampler(len(dataset), self.device_batch_size, rank=rank, world_size=world_size)
        )

    def dataset(self, split: str) -> LabelledImages:
        """Images and labels of ``train``, ``val`` or ``test``, read when first needed."""
        if not self.datasets:
            self._read_all()
        return self.datasets[split]

    def state_dict(self) -> dict[str, int]:
        """Position of the next train batch: epoch, and batches of it that are done."""
        epoch, done = self._start
        if self._epoch is not None and self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            epoch, done = self._epoch, progress.processed  # not `ready`: a batch whose step failed is to be repeated
            if done >= self.trainer.num_training_batches:
                epoch, done = epoch + 1, 0
        return {"epoch": epoch, "done": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next train loader start at the position of the checkpoint."""
        self._start = (int(state_dict["epoch"]), int(state_dict["done"]))
        self._epoch = None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Seed torch by the position, so that dropout and augmentation do not depend on what ran before."""
        if self.trainer is not None and self.trainer.training:
            self._epoch = self.trainer.current_epoch
            ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._seed_torch(mix(self._seed, self._epoch, ready, self.trainer.global_rank))
        return batch

    def _seed_torch(self, seed: int) -> None:
        # torch.manual_seed does the same for every kind of device there might be, which costs 0.2 ms a step
        torch.default_generator.manual_seed(seed)
        device = self._device_type()
        if device == "cuda":
            torch.cuda.manual_seed(seed)
        elif device == "mps":
            torch.mps.manual_seed(seed)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment in training, and turn uint8 into float in [0, 1]; a dict of batches is treated one by one."""
        if not isinstance(batch, dict):
            return self._prepared(batch)
        # in this order, so that the augmentation of the weights' images does not depend on that of the others
        return {name: self._prepared(part, name != "arch" or self.arch_augment) for name, part in batch.items()}

    def _prepared(self, batch: Batch, augmented: bool = True) -> Batch:
        images, labels = batch
        if images.dtype == torch.uint8:
            if augmented and self.trainer is not None and self.trainer.training:
                images = self.augment(images)
            images = images.float().div_(255)
            if self.trainer is not None:
                images = self.trainer.precision_plugin.convert_input(images)  # for precision=16-true and the like
        return images, labels

    def augment(self, images: Tensor) -> Tensor:
        """What training does to uint8 images ``(batch, channels, height, width)``."""
        if self.base_augment == "crop":
            images = random_crop(images, self._padding)
        elif self.base_augment == "crop_flip":
            images = random_crop_flip(images, self._padding)
        if self.train_policy is not None:
            images = self.train_policy(images)
        return images

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, dataset: LabelledImages | Streams, sampler: TrainSampler | EvalSampler) -> DataLoader[Any]:
        # Lightning advises worker processes, which would only add a copy of what is in memory
        warnings.filterwarnings("ignore", "The '.*' does not have many workers")
        on_cuda = torch.cuda.is_available() if self.trainer is None else self._device_type() == "cuda"
        return _Loader(dataset, sampler=sampler, batch_size=None, collate_fn=_as_is, pin_memory=on_cuda)

    def _device_type(self) -> str:
        assert self.trainer is not None
        return str(self.trainer.strategy.root_device.type)

    def _read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        if self._newest is not None and np.array_equal(rows, self._newest[0]):
            return self._newest[1]
        images = self.read(rows)
        shape = (len(rows), self.channels, *self.image_size)
        assert images.shape == shape, f"{type(self).__name__}.read returned the shape {images.shape}, expected {shape}"
        if images.dtype.kind == "f":
            finite = np.isfinite(images).reshape(len(rows), -1).all(1)
            if not finite.all():
                name = self.contents.names[rows[int(finite.argmin())]]
                raise UserError(f"image {name} contains NaN or infinite pixels; replace them or leave the image out")
        self._newest = rows, images
        return images

    def _chunks(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        at_once = max(1, _VALUES_AT_ONCE // self.image_bytes)
        return [rows[first : first + at_once] for first in range(0, len(rows), at_once)]

    def _values(self, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        return map(self._read, self._chunks(rows))

    def _decode(self, rows: NDArray[np.int64], window: Tensor | None) -> Iterator[NDArray[np.uint8]]:
        """Contiguous images ``(images, height, width, channels)`` of rows, some at a time."""
        for values in self._values(rows):
            images = values if window is None else windowed(values, window.numpy())
            yield np.ascontiguousarray(images.transpose(0, 2, 3, 1))

    def _measure_window(self) -> Tensor | None:
        if not self.is_deep():
            return None
        return torch.from_numpy(measure_window(self.split_rows["train"], self._values))


def _check_labels(contents: Index) -> None:
    labels = contents.labels
    if labels.ndim != 1:
        raise UserError(f"labels have the shape {labels.shape}; one label an image is needed (no multi-label)")
    if labels.dtype.kind not in "iu":
        raise UserError(f"labels are of type {labels.dtype}; whole numbers are needed")
    if not len(labels):
        raise UserError("there is no image; give data with at least two classes")
    classes = len(contents.class_names)
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"image {contents.names[row]} has the label {labels[row]}; with {classes} classes "
            f"labels are 0 to {classes - 1}"
        )
    if classes < 2:
        raise UserError(f"there is only one class, {contents.class_names[0]!r}; a classifier needs at least two")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} {value!r}; known: {', '.join(known)}")
