"""The two streams of an architecture search: what they hold, their order, and that they resume and shard."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F

from lightning_automl.augment import TrivialAugment
from lightning_automl.callbacks import BatchSizeProbe
from lightning_automl.data import DigitsDataModule, ImageDataModule, Index
from lightning_automl.data.samplers import StreamSampler, TrainSampler
from lightning_automl.rundir import UserError

# Lightning 2.6.6 with torch 2.14: Lightning's own code, https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


class NumberedDataModule(ImageDataModule):
    """Image ``i`` is grey of the level ``i``, so that a batch says which images it holds."""

    def __init__(self, labels, groups=None, splits=None, **settings):
        self.labels, self.groups, self.splits = np.asarray(labels), groups, splits
        super().__init__(**settings)

    def index(self):
        names = [f"image[{row}]" for row in range(len(self.labels))]
        classes = [f"class {label}" for label in range(self.labels.max() + 1)]
        return Index(self.labels, classes, 1, (4, 4), names, self.splits, self.groups)

    def read(self, rows):
        return np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), 1, 4, 4))


def numbered(train, classes=2, **settings):
    """``train`` images to train on, after them two a class for val and for test."""
    labels = np.arange(train + 4 * classes) % classes
    splits = np.array(["train"] * train + ["val"] * 2 * classes + ["test"] * 2 * classes)
    return NumberedDataModule(labels, splits=splits, **settings)


def rows_of(batch):
    """Which images a batch of the loaders holds."""
    return batch[0][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("settings", [{}, {"subset": 0.3}, {"fold": 1}, {"train_on_val": True}])
@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.8])
def test_the_streams_are_disjoint_stratified_and_cover_the_train_split(fraction, settings):
    data = DigitsDataModule(arch_fraction=fraction, **settings)
    train, arch = data.stream_rows["train"], data.stream_rows["arch"]
    assert list(data.stream_rows) == ["train", "arch"]
    assert not set(train) & set(arch)
    assert sorted([*train, *arch]) == data.split_rows["train"].tolist()
    counts = np.bincount(data.targets[arch], minlength=10)
    assert np.abs(counts - fraction * data.class_counts.numpy()).max() <= 0.5
    plain = DigitsDataModule(**settings)
    assert plain.stream_rows == {}
    assert all((plain.split_rows[split] == rows).all() for split, rows in data.split_rows.items())
    assert torch.equal(plain.class_counts, data.class_counts)


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.75])
def test_a_group_is_in_one_stream(fraction):
    groups = np.repeat(np.arange(40), 5)
    labels = np.random.default_rng(0).integers(0, 2, 200)
    data = NumberedDataModule(labels, groups, arch_fraction=fraction)
    train, arch = data.stream_rows["train"], data.stream_rows["arch"]
    assert not set(groups[train]) & set(groups[arch])
    assert sorted([*train, *arch]) == data.split_rows["train"].tolist()
    assert len(arch) / len(data.split_rows["train"]) == pytest.approx(fraction, abs=0.1)
    assert set(labels[train]) == set(labels[arch]) == {0, 1}


def test_the_streams_depend_on_split_seed_alone(monkeypatch):
    def arch(seed, split_seed, **settings):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return DigitsDataModule(arch_fraction=0.5, split_seed=split_seed, **settings).stream_rows["arch"].tolist()

    def same_test(seed, split_seed):  # splits that the data bring do not change with split_seed
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return numbered(60, arch_fraction=0.5, split_seed=split_seed).stream_rows["arch"].tolist()

    assert arch(0, 0) == arch(1, 0, batch_size=7, sampling="balanced")
    assert same_test(0, 0) == same_test(1, 0)
    assert same_test(0, 0) != same_test(0, 1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(UserError, match=f"arch_fraction is {fraction}; it must lie between 0 and 1, for example 0.5"):
        DigitsDataModule(arch_fraction=fraction)


def test_a_class_that_cannot_be_in_both_streams_is_refused():
    labels = np.array([0] * 20 + [1] + [0, 1] * 4)
    splits = np.array(["train"] * 21 + ["val"] * 4 + ["test"] * 4)
    with pytest.raises(UserError, match="class 'class 1' has 1 image, too few to be in the weights' part of train"):
        NumberedDataModule(labels, splits=splits, arch_fraction=0.5)
    groups = np.array([f"group {number}" for number in [*range(20), 20, *range(21, 29)]])
    groups[18:21] = "group 18"
    labels[18:21] = 1
    with pytest.raises(UserError, match="class 'class 1' has 1 group, too few to be in the weights' part of train"):
        NumberedDataModule(labels, groups, splits, arch_fraction=0.5)


def test_groups_that_cannot_be_cut_are_refused():
    # each class is in two of three groups, and whichever group stands alone lacks a class
    labels = np.array([0, 2, 0, 1, 1, 2] + [0, 1, 2] * 2)
    groups = np.array([*"aabbcc", *"defghi"])
    splits = np.array(["train"] * 6 + ["val"] * 3 + ["test"] * 3)
    with pytest.raises(UserError, match=r"arch_fraction is 0\.4, and the groups of the train split cannot be cut so"):
        NumberedDataModule(labels, groups, splits, arch_fraction=0.4)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches_is_refused():
    with pytest.raises(UserError, match=r"arch_fraction and trainer\.overfit_batches exclude each other"):
        trainer(overfit_batches=2).fit(Recorder(), DigitsDataModule(arch_fraction=0.5))


def test_a_task_that_is_no_architecture_search_is_refused():
    class Plain(Recorder):
        stages = ("train", "val", "test")

    with pytest.raises(UserError, match=r"arch_fraction makes a stream of batches for an .* and Plain is none; leave"):
        trainer().fit(Plain(), DigitsDataModule(arch_fraction=0.5))


# ------------------------------------------------------------------------------------------------------------- order


def epochs_of(train, arch, batch_size, epochs, world_size=1, **settings):
    """The joint batches ``(train, arch)`` of each step, as lists of all ranks' indices, rank by rank."""
    labels = torch.arange(train) % 2, torch.arange(arch) % 2
    ranks = [StreamSampler(*labels, batch_size, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    steps = [[step for _ in range(epochs) for step in rank] for rank in ranks]
    return [
        tuple([rank[name].tolist() for rank in step] for name in ("train", "arch")) for step in zip(*steps, strict=True)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("train", "arch"), [(60, 60), (70, 30), (30, 70), (97, 11), (50, 8), (24, 24)])
def test_each_arch_image_is_seen_equally_often_to_one(train, arch, world_size):
    steps = epochs_of(train, arch, batch_size=12, epochs=7, world_size=world_size)
    seen = torch.tensor([index for _, ranks in steps for rank in ranks for index in rank]).bincount(minlength=arch)
    assert seen.max() - seen.min() <= 1
    assert seen.min() >= 1
    for train_ranks, arch_ranks in steps:
        assert len({len(rank) for rank in arch_ranks}) == len({len(rank) for rank in train_ranks}) == 1
        assert len(arch_ranks[0]) <= 12
        assert len(arch_ranks[0]) in (len(train_ranks[0]), len(train_ranks[0]) + 1, arch // world_size)


def test_a_cycle_is_a_permutation_and_the_next_another():
    flat = [index for _, (rank,) in epochs_of(40, 40, batch_size=8, epochs=3) for index in rank]
    cycles = [flat[first : first + 40] for first in (0, 40, 80)]
    assert all(sorted(cycle) == list(range(40)) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == 3


def test_the_train_stream_is_that_of_a_train_sampler_and_arch_has_an_order_of_its_own():
    labels = torch.arange(40) % 2
    plain, streams = TrainSampler(labels, 8, seed=3), StreamSampler(labels, labels, 8, seed=3)
    for _ in range(2):
        wanted, found = list(plain), list(streams)
        assert all(torch.equal(a, b["train"]) for a, b in zip(wanted, found, strict=True))
        assert not torch.equal(torch.cat(wanted), torch.cat([step["arch"] for step in found]))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one_process(world_size):
    one = epochs_of(96, 64, batch_size=32, epochs=3)
    many = epochs_of(96, 64, batch_size=32 // world_size, epochs=3, world_size=world_size)
    assert len(one) == len(many) == 9
    for whole, parts in zip(one, many, strict=True):
        for (joint,), ranks in zip(whole, parts, strict=True):
            assert len({len(rank) for rank in ranks}) == 1
            together = [index for rank in ranks for index in rank]
            assert sorted(together) == sorted(joint)
            assert len(set(together)) == len(joint)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_order_is_a_function_of_seed_and_position(balanced):
    settings = {"train": 50, "arch": 23, "batch_size": 8, "balanced": balanced}
    whole = epochs_of(epochs=4, seed=5, **settings)
    torch.manual_seed(1)
    steps = len(whole) // 4
    for epoch, done in ((0, 3), (1, 0), (2, 5), (3, 6)):
        resumed = epochs_of(epochs=4 - epoch, seed=5, epoch=epoch, done=done, **settings)
        assert resumed == whole[epoch * steps + done :]
    assert epochs_of(epochs=4, seed=6, **settings) != whole


def test_balanced_sampling_holds_for_both_streams():
    labels = torch.tensor([0] * 180 + [1] * 20)
    sampler = StreamSampler(labels, labels, 50, balanced=True)
    steps = [step for _ in range(5) for step in sampler]
    for name in ("train", "arch"):
        seen = labels[torch.cat([step[name] for step in steps])]
        assert seen.float().mean() == pytest.approx(0.5, abs=3 * (0.25 / len(seen)) ** 0.5)


def test_fewer_images_of_a_stream_than_processes_are_refused():
    with pytest.raises(UserError, match="has 2 images for 3 processes; use fewer processes"):
        StreamSampler(torch.zeros(9, dtype=torch.long), torch.zeros(2, dtype=torch.long), 4, world_size=3)


# --------------------------------------------------------------------------------------------------------- in a trainer


class Recorder(LightningModule):
    """Trains a little on both streams and keeps what arrives."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 10))
        self.batches = []

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return sum(F.cross_entropy(self(images), labels) for images, labels in batch.values())

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(**settings):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **settings},
    )


class Killed(Exception):
    pass


class SaveAndKill(Callback):
    """Writes a checkpoint after each third batch, and fails before batch ``kill``."""

    def __init__(self, path, kill):
        self.path, self.kill, self.batches = path, kill, 0

    def on_train_batch_start(self, trainer, *_):
        if self.batches == self.kill:
            raise Killed
        self.batches += 1

    def on_train_batch_end(self, trainer, *_):
        if self.batches % 3 == 0:
            trainer.save_checkpoint(self.path)


def weights_after(path, kill=None, ckpt_path=None):
    seed_everything(7, verbose=False)
    data = DigitsDataModule(batch_size=100, arch_fraction=0.4, base_augment="crop", train_policy=TrivialAugment())
    task = Recorder()
    task.model(torch.zeros(1, 1, 8, 8))
    try:
        trainer(max_epochs=3, callbacks=[SaveAndKill(path, kill)]).fit(
            task, data, ckpt_path=ckpt_path, weights_only=True
        )
    except Killed:
        return None
    return torch.cat([parameter.detach().flatten() for parameter in task.parameters()])


@pytest.mark.parametrize("kill", [5, 11, 20])
def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one_bit_for_bit(tmp_path, kill):
    expected = weights_after(tmp_path / "whole.ckpt")
    assert weights_after(tmp_path / "last.ckpt", kill) is None
    assert torch.equal(weights_after(tmp_path / "other.ckpt", ckpt_path=tmp_path / "last.ckpt"), expected)


def test_a_step_gets_a_batch_of_each_stream():
    data = numbered(30, arch_fraction=0.3, batch_size=5)
    data.setup("fit")
    rows = {"train": [], "arch": []}
    for step in data.train_dataloader():
        assert list(step) == ["train", "arch"]
        for name, batch in step.items():
            assert batch[0].dtype == torch.uint8
            assert batch[1].tolist() == (batch[0][:, 0, 0, 0] % 2).tolist()
            rows[name] += rows_of(batch)
    assert sorted(rows["train"]) == data.stream_rows["train"].tolist()
    assert set(rows["arch"]) == set(data.stream_rows["arch"])


def negated(images):
    return 255 - images


@pytest.mark.parametrize("arch_augment", [True, False])
def test_the_architecture_s_images_are_augmented_if_asked(arch_augment):
    task, data = Recorder(), numbered(40, arch_fraction=0.5, train_policy=negated, arch_augment=arch_augment)
    trainer(max_epochs=1, limit_val_batches=0).fit(task, data)
    seen = {name: (batch[0][:, 0, 0, 0] * 255).round().int().tolist() for name, batch in task.batches[0].items()}
    assert sorted(255 - level for level in seen["train"]) == data.stream_rows["train"].tolist()
    levels = [255 - level if arch_augment else level for level in seen["arch"]]
    assert sorted(levels) == data.stream_rows["arch"].tolist()
    assert all(images.dtype == torch.float32 for batch in task.batches for images, _ in batch.values())


def test_what_augments_the_weights_images_does_not_depend_on_arch_augment():
    batches = []
    for arch_augment in (True, False):
        seed_everything(0, verbose=False)
        task, data = Recorder(), DigitsDataModule(arch_fraction=0.5, base_augment="crop", arch_augment=arch_augment)
        trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(task, data)
        batches.append(task.batches)
    assert all(torch.equal(a["train"][0], b["train"][0]) for a, b in zip(*batches, strict=True))
    assert not all(torch.equal(a["arch"][0], b["arch"][0]) for a, b in zip(*batches, strict=True))


def test_an_automatic_batch_size_works_with_two_streams():
    class Limited(Recorder):
        def forward(self, images):
            if len(images) > 40:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(images.float())

    task, data, probe = Limited(), DigitsDataModule(batch_size="auto", arch_fraction=0.5), BatchSizeProbe()
    trainer(max_epochs=1, callbacks=[probe]).fit(task, data)
    assert probe.device_batch_size == 32
    sizes = {name: [len(batch[name][1]) for batch in task.batches] for name in ("train", "arch")}
    assert all(20 < max(each) <= 32 and max(each) - min(each) <= 1 for each in sizes.values())
