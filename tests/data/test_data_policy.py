"""Image policies in a data module: where they come from, when they are applied, and what their space says."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from test_data_base import PixelsDataModule, Watcher, load, random_pixels

from lightning_automl.augment import (
    SPACES,
    AutoAugment,
    Identity,
    ImagePolicy,
    Policy,
    RandAugment,
    TrivialAugment,
    policy_to_dict,
    save_policy,
)
from lightning_automl.callbacks import RunWriter
from lightning_automl.data import DigitsDataModule
from lightning_automl.data.policies import BASE_OPERATIONS, policy_kept_in
from lightning_automl.rundir import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")

INVERT = Policy([[{"operation": "invert"}]])
POLICIES = [INVERT, Identity(), TrivialAugment(), TrivialAugment("radiograph"), RandAugment(), AutoAugment("svhn")]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_file_is_read_when_the_data_module_is_built(tmp_path, policy):
    save_policy(policy, tmp_path / "policy.json")
    assert DigitsDataModule(train_policy=str(tmp_path / "policy.json")).train_policy == policy
    assert DigitsDataModule(train_policy=tmp_path / "policy.json").train_policy == policy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("runs/gone/policy.json", "there is no policy file runs/gone/policy.json; give the path of a policy.json"),
        ("TrivialAugmen", "'TrivialAugmen' is no policy file, class or function .* did you mean TrivialAugment?"),
        (TrivialAugment, r"train_policy is the class TrivialAugment; give an object of it, TrivialAugment\("),
        (3, "train_policy is 3; give a policy, the path of a policy.json, or a function"),
        ({"operation": "rotate"}, "give a policy, the path of a policy.json, or a function"),
        ("my_module.policy", "'my_module.policy' is no policy file, class or function that can be imported; known"),
    ],
)
def test_what_is_no_policy_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        DigitsDataModule(train_policy=given)


def test_a_directory_is_no_policy(tmp_path):
    with pytest.raises(UserError, match=r"train_policy is the directory .*; give the policy.json in it"):
        DigitsDataModule(train_policy=str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", '{"version": 99, "policy": "Identity", "arguments": {}}'])
def test_a_file_that_holds_no_policy_is_refused_and_named(tmp_path, content):
    path = tmp_path / "policy.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"the policy file {path}"):
        DigitsDataModule(train_policy=str(path))


def test_a_policy_file_that_is_gone_is_replaced_by_the_copy_of_the_run(tmp_path):
    save_policy(INVERT, tmp_path / "policy.json")
    missing = str(tmp_path / "search" / "policy.json")
    with policy_kept_in(tmp_path):
        assert DigitsDataModule(train_policy=missing).train_policy == INVERT
    with policy_kept_in(tmp_path / "other"), pytest.raises(UserError, match="there is no policy file"):
        DigitsDataModule(train_policy=missing)
    with pytest.raises(UserError, match="there is no policy file"):
        DigitsDataModule(train_policy=missing)


@pytest.mark.parametrize("text", ["{", json.dumps(policy_to_dict(Identity("radiograph")))], ids=["broken", "other"])
def test_a_policy_file_that_changed_is_read_only_by_a_run_that_goes_on(tmp_path, text):
    save_policy(INVERT, tmp_path / "policy.json")
    changed = tmp_path / "changed.json"
    changed.write_text(text)
    settings = {"train_policy": str(changed), "base_augment": "crop_flip"}
    with policy_kept_in(tmp_path):
        assert DigitsDataModule(**settings).train_policy == INVERT
    with policy_kept_in(tmp_path, goes_on=True), pytest.raises(UserError, match=r"changed\.json|horizontal_flip"):
        DigitsDataModule(**settings)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("base_augment", BASE_OPERATIONS)
def test_the_base_augmentation_obeys_the_space_of_the_policy(space, base_augment):
    forbidden = [name for name in BASE_OPERATIONS[base_augment] if not SPACES[space].allows(name)]
    settings = {"base_augment": base_augment, "train_policy": Identity(space)}
    if forbidden:
        message = f"base_augment={base_augment} does {forbidden[0]}, which the space '{space}' .* forbids; use base_"
        with pytest.raises(UserError, match=message):
            DigitsDataModule(**settings)
    else:
        assert DigitsDataModule(**settings).base_augment == base_augment


def test_a_space_without_crop_leaves_no_base_augmentation():
    policy = Identity({"name": "still", "operations": {"gamma": True}})
    with pytest.raises(UserError, match=r"does crop, which the space 'still' .* forbids; use base_augment=none"):
        DigitsDataModule(base_augment="crop", train_policy=policy)


@pytest.mark.parametrize(("cap", "shift"), [(0.5, 4), (0.1, 3), (0.05, 1), (0.02, 0)])
def test_shifts_of_the_base_augmentation_are_within_the_cap_of_the_space(cap, shift, caplog):
    pixels = np.zeros((400, 1, 32, 32), np.uint8)
    pixels[:, :, 15, 15] = 255
    space = {"name": "own", "operations": {"crop": cap}}
    with caplog.at_level(logging.INFO, "lightning_automl.data.policies"):
        data = PixelsDataModule(pixels, base_augment="crop", train_policy=Identity(space))
    places = data.augment(torch.from_numpy(pixels)).nonzero()[:, 2:] - 15
    assert places.abs().max() == shift
    assert ("shifts images by up to" in caplog.text) == (shift < 4)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy([[{"operation": "quarter_turn", "probability": 0.01}]]), "quarter_turn needs square images"),
        (TrivialAugment("histology"), "quarter_turn needs square images"),
        (Policy([[{"operation": "rotate"}]], fill=[1.0, 2.0]), "fill has 2 values and the images have 3 channels"),
    ],
)
def test_images_that_an_operation_cannot_take_are_refused_before_the_training(policy, message):
    with pytest.raises(UserError, match=message):
        PixelsDataModule(random_pixels(shape=(60, 3, 6, 8)), train_policy=policy)


def position(seed, epoch, batch, rank):
    """A trainer as far as the data module looks at it."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
    return SimpleNamespace(
        training=True,
        current_epoch=epoch,
        global_rank=rank,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=SimpleNamespace(convert_input=lambda images: images),
    )


def test_what_is_drawn_follows_seed_epoch_batch_and_rank_and_nothing_else():
    data = load(random_pixels(shape=(60, 3, 16, 16)), train_policy=TrivialAugment())
    batch = torch.from_numpy(data.pixels), torch.from_numpy(data.labels)

    def seen(seed, epoch, batch_number, rank):
        torch.rand(int(torch.randint(5, ())))  # what ran before
        data.trainer, data._seed = position(seed, epoch, batch_number, rank), seed
        return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)[0]

    first = seen(1, 2, 3, 0)
    assert torch.equal(first, seen(1, 2, 3, 0))
    for other in ((0, 2, 3, 0), (1, 1, 3, 0), (1, 2, 2, 0), (1, 2, 3, 1)):
        differ = (first != seen(*other)).flatten(1).any(1).float().mean()
        assert differ > 0.8, other


def test_each_image_of_a_batch_has_its_own_draw():
    pixels = np.repeat(random_pixels(shape=(1, 3, 16, 16)), 60, axis=0)
    data = PixelsDataModule(pixels, train_policy=RandAugment())
    augmented = data.augment(torch.from_numpy(pixels))
    assert len({image.numpy().tobytes() for image in augmented}) > 50


class Darker(ImagePolicy):
    """A policy of the user's own, which no file can name."""

    def draw(self, count, channels, size, generator=None):
        return Policy([[{"operation": "brightness", "sign": -1}]]).draw(count, channels, size, generator)

    def strongest(self):
        return {"brightness": 0.9}

    def arguments(self):
        return {}


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (INVERT, policy_to_dict(INVERT)),
        (TrivialAugment("radiograph"), policy_to_dict(TrivialAugment("radiograph"))),
        (Darker(), None),
        (torch.nn.Identity(), None),
        (None, None),
    ],
    ids=lambda value: None if isinstance(value, dict) else type(value).__name__,
)
def test_a_run_directory_keeps_the_policy_that_files_can_hold(tmp_path, policy, kept):
    (tmp_path / "policy.json").write_text("{}")  # of a first command that was corrected before anything was trained
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunWriter(tmp_path, "val_loss")],
        default_root_dir=tmp_path,
    )
    task = Watcher()
    task.validation_step = lambda batch, batch_idx: task.log("val_loss", 1.0)
    trainer.fit(task, PixelsDataModule(random_pixels(), train_policy=policy))
    path = tmp_path / "policy.json"
    assert (json.loads(path.read_text()) if path.exists() else None) == json.loads(json.dumps(kept))
