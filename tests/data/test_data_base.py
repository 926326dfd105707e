import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

import lightning_automl.data.base as base
import lightning_automl.data.measure as measure
from lightning_automl.data import DigitsDataModule, ImageDataModule, Index
from lightning_automl.data.samplers import TrainSampler
from lightning_automl.rundir import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


class PixelsDataModule(ImageDataModule):
    """Images that are given as an array ``(images, channels, height, width)``."""

    def __init__(self, pixels, labels=None, splits=None, class_names=("a", "b"), **settings):
        self.pixels = pixels
        self.labels = np.arange(len(pixels)) % 2 if labels is None else labels
        self.splits = splits
        self.names = list(class_names)
        self.closed = 0
        super().__init__(**settings)

    def index(self):
        return Index(
            labels=self.labels,
            class_names=self.names,
            channels=self.pixels.shape[1],
            image_size=self.pixels.shape[2:],
            names=[f"pixels[{row}]" for row in range(len(self.pixels))],
            splits=self.splits,
        )

    def read(self, rows):
        return self.pixels[rows]

    def close(self):
        self.closed += 1


def random_pixels(dtype=np.uint8, shape=(60, 3, 6, 8), high=256):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def load(*args, **settings):
    data = PixelsDataModule(*args, **settings)
    data.setup("fit")
    return data


def test_what_is_known_right_after_construction():
    data = DigitsDataModule()
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, (8, 8))
    assert data.class_names == [str(digit) for digit in range(10)]
    train = data.split_rows["train"]
    assert data.class_counts.tolist() == np.bincount(data.targets[train]).tolist()
    assert data.class_counts.dtype == torch.int64


def test_batches_are_the_images_and_labels_of_the_rows():
    data = load(random_pixels(), batch_size=7)
    for split, rows in data.split_rows.items():
        images, labels = zip(*data.eval_dataloader(split), strict=True)
        assert torch.equal(torch.cat(images), torch.from_numpy(data.pixels[rows]))
        assert torch.equal(torch.cat(labels), torch.from_numpy(data.labels[rows]))
    images, labels = next(iter(data.train_dataloader()))
    assert images.dtype == torch.uint8
    assert images.shape == (6, 3, 6, 8)  # 41 images in 6 batches
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert data.closed == 1


def test_setup_is_not_needed_outside_of_a_trainer():
    data = DigitsDataModule(batch_size=100)
    assert sum(len(labels) for _, labels in data.train_dataloader()) == len(data.split_rows["train"])
    loader = data.train_dataloader()
    first, second = (torch.cat([labels for _, labels in loader]) for _ in range(2))
    assert not torch.equal(first, second)


def test_the_order_follows_the_seed_of_the_run(monkeypatch):
    data = DigitsDataModule()
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    first = next(iter(data.train_dataloader()))[1]
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert not torch.equal(first, next(iter(data.train_dataloader()))[1])


def test_mean_and_std_are_those_of_numpy():
    data = load(random_pixels(shape=(60, 3, 6, 8)))
    pixels = data.pixels[data.split_rows["train"]] / 255
    assert data.mean.numpy() == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-6)
    assert data.std.numpy() == pytest.approx(pixels.std((0, 2, 3)), rel=1e-6)


def test_the_deviation_of_a_constant_channel_is_one():
    pixels = random_pixels()
    pixels[:, 1] = 77
    data = load(pixels)
    assert data.std[1] == 1
    assert data.mean[1] == pytest.approx(77 / 255)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float16, np.float32, np.float64])
def test_other_types_are_windowed_by_percentiles_of_the_train_split(dtype, caplog):
    pixels = random_pixels(dtype, high=4000)
    pixels[:, 1] = pixels[:, 1] / 100
    with caplog.at_level(logging.INFO, "lightning_automl.data.measure"):
        data = load(pixels)
    train = pixels[data.split_rows["train"]].astype(np.float64)
    expected = np.percentile(train, [0.5, 99.5], axis=(0, 2, 3)).T
    assert data.window.numpy() == pytest.approx(expected, rel=1e-6)
    low, high = data.window.double().numpy().T[:, :, None, None]
    for split, rows in data.split_rows.items():
        want = np.clip((pixels[rows] - low) * 255 / (high - low), 0, 255)
        have = torch.cat([images for images, _ in data.eval_dataloader(split)]).numpy()
        assert np.abs(have - want).max() <= 0.501
    assert f"{np.dtype(dtype)} images are windowed to 8 bits by the 0.5 and 99.5 percentile" in caplog.text


def test_the_window_of_many_images_is_taken_from_a_fixed_sample(monkeypatch):
    monkeypatch.setattr(measure, "_WINDOW_IMAGES", 20)
    monkeypatch.setattr(measure, "_WINDOW_VALUES", 20 * 30)
    monkeypatch.setattr(base, "_VALUES_AT_ONCE", 5 * 3 * 48)
    pixels = random_pixels(np.uint16, high=4000)
    one, other = load(pixels), load(pixels)
    assert torch.equal(one.window, other.window)
    assert one.window.numpy() == pytest.approx(np.array([[20, 3980]] * 3), abs=60)
    images, _ = one.datasets["test"][torch.arange(12)]
    assert images.float().mean() == pytest.approx(127.5, abs=8)


def test_constant_16_bit_images_do_not_divide_by_zero():
    data = load(np.full((60, 1, 4, 4), 500, np.uint16))
    assert data.window.tolist() == [[500, 501]]


def test_8_bit_images_are_kept_as_they_are():
    assert load(random_pixels()).window is None


def test_identical_images_in_two_splits_are_told(caplog):
    pixels = random_pixels()
    splits = np.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    pixels[45] = pixels[3]
    pixels[55] = pixels[3]
    pixels[57] = pixels[48]
    pixels[8] = pixels[9]  # in one split
    data = load(pixels, splits=splits)
    assert data.leaks == [
        ("pixels[3]", "pixels[45]"),
        ("pixels[3]", "pixels[55]"),
        ("pixels[48]", "pixels[57]"),
    ]
    assert "3 images of val or test are also in another split: pixels[3] (train) = pixels[45] (val); " in caplog.text


def test_many_identical_images_are_counted(caplog):
    data = load(np.zeros((200, 1, 4, 4), np.uint8))
    assert len(data.leaks) == sum(len(data.split_rows[split]) for split in ("val", "test"))
    assert f"and {len(data.leaks) - 20} more" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(60) % 3, r"image pixels\[2\] has the label 2; with 2 classes labels are 0 to 1"),
        (np.arange(60) % 2 - 1, r"image pixels\[0\] has the label -1; with 2 classes labels are 0 to 1"),
        (np.full(60, np.nan), "labels are of type float64; whole numbers are needed"),
        (
            np.zeros((60, 2), np.int64),
            r"labels have the shape \(60, 2\); one label an image is needed",
        ),
        (np.zeros(0, np.int64), "there is no image"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        PixelsDataModule(random_pixels(), labels)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="there is only one class, 'a'; a classifier needs at least two"):
        PixelsDataModule(random_pixels(), np.zeros(60, np.int64), class_names=["a"])


def test_nan_pixels_are_refused():
    pixels = random_pixels(np.float32)
    pixels[37, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"image pixels\[37\] contains NaN or infinite pixels; replace them or"):
        load(pixels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be a number of at least 1, or 'auto'"),
        ({"batch_size": "big"}, "batch_size is 'big'; it must be a number"),
        ({"base_augment": "flip"}, "unknown base_augment 'flip'; known: none, crop, crop_flip"),
        ({"sampling": "even"}, "unknown sampling 'even'; known: shuffle, balanced"),
        ({"predict_split": "all"}, "unknown predict_split 'all'; known: train, val, test"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DigitsDataModule(**settings)


def test_an_automatic_batch_size_starts_at_128_and_may_be_lowered():
    data = DigitsDataModule(batch_size="auto")
    assert data.device_batch_size == 128
    data.device_batch_size = 32
    assert max(len(labels) for _, labels in data.train_dataloader()) <= 32
    assert max(len(labels) for _, labels in data.val_dataloader()) <= 32


def test_balanced_sampling_sees_rare_classes_more_often():
    labels = np.array([0] * 180 + [1] * 20)
    data = load(random_pixels(shape=(200, 1, 4, 4)), labels, sampling="balanced")
    seen = torch.cat([labels for _ in range(5) for _, labels in data.train_dataloader()])
    assert seen.float().mean() == pytest.approx(0.5, abs=3 * (0.25 / len(seen)) ** 0.5)


class Watcher(LightningModule):
    """Keeps what arrives at the steps."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**settings):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **settings},
    )


def negate(images):
    return 255 - images


def test_only_training_augments_and_all_stages_get_floats(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    task, data = Watcher(), PixelsDataModule(random_pixels(), train_policy=negate)
    run = trainer(num_sanity_val_steps=2)
    run.fit(task, data)
    run.test(task, data, verbose=False)
    predictions = run.predict(task, data)
    images, labels = task.seen["train"][0]
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    rows = data.split_rows["train"][TrainSampler(data.datasets["train"].labels, 128).order(0)]
    assert torch.equal(images, torch.from_numpy(255 - data.pixels[rows]).float() / 255)
    assert torch.equal(labels, torch.from_numpy(data.labels[rows]))
    for split in ("val", "test"):
        images, labels = task.seen[split][-1]
        assert torch.equal(images, torch.from_numpy(data.pixels[data.split_rows[split]]).float() / 255)
        assert torch.equal(labels, torch.from_numpy(data.labels[data.split_rows[split]]))
    assert torch.equal(predictions[0], task.seen["test"][-1][1])


@pytest.mark.parametrize("base_augment", ["none", "crop", "crop_flip"])
def test_the_policy_comes_after_the_base_augmentation(base_augment):
    data = load(random_pixels(shape=(60, 3, 16, 16)), base_augment=base_augment, train_policy=negate)
    images = data.datasets["train"][torch.arange(30)][0]
    torch.manual_seed(0)
    augmented = 255 - data.augment(images)
    assert augmented.shape == images.shape
    assert torch.equal(augmented, images) == (base_augment == "none")
    assert (augmented == 0).sum() >= (images == 0).sum()  # zeros come in from outside, before the policy


def test_a_dict_of_batches_is_prepared_one_by_one():
    data = load(random_pixels())
    batch = data.datasets["train"][torch.arange(4)]
    result = data.on_after_batch_transfer({"arch": batch, "train": batch}, 0)
    assert torch.equal(result["arch"][0], batch[0].float() / 255)


def test_half_precision_gets_half_images():
    task = Watcher()
    trainer(precision="bf16-true").fit(task, DigitsDataModule())
    assert task.seen["train"][0][0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches_sees_the_same_batches_every_epoch():
    task = Watcher()
    trainer(overfit_batches=2, max_epochs=3).fit(task, DigitsDataModule(batch_size=50))
    labels = [labels for _, labels in task.seen["train"]]
    assert len(labels) == 6
    assert torch.equal(labels[0], labels[2])
    assert torch.equal(labels[1], labels[5])


def test_limited_batches_count_as_an_epoch():
    data, run = DigitsDataModule(batch_size=50), trainer(limit_train_batches=3)
    run.fit(Watcher(), data)
    assert data.state_dict() == {"epoch": 2, "done": 0}
