"""How a data module comes to its policy, and what the policy's operation space says about the base augmentation."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_automl.augment
from lightning_automl.augment.engine import Plan, apply
from lightning_automl.augment.ops import OPS
from lightning_automl.augment.policy import ImagePolicy, load_policy
from lightning_automl.rundir import UserError

log = logging.getLogger(__name__)

TrainPolicy = ImagePolicy | nn.Module | Callable[[Tensor], Any]

#: What each base augmentation does to images, as policies and spaces call it.
BASE_OPERATIONS = {"none": (), "crop": ("crop",), "crop_flip": ("crop", "horizontal_flip")}


#: The policy file of the run that is being read back, if one is, and whether the run goes on.
_kept: ContextVar[tuple[Path, bool] | None] = ContextVar("kept", default=None)


@contextmanager
def policy_kept_in(directory: Path, *, goes_on: bool = False) -> Iterator[None]:
    """Let data modules that are built inside take the run's own ``policy.json`` for the policy file that they name.

    That file may have changed since, or be gone with the directory of the search that wrote it, and the run is to be
    tested and reported as it was trained. It holds for this thread (or task of asyncio) alone.

    Args:
        directory: Of the run.
        goes_on: The run is trained on: the named file counts if it is there, so that a change of it is noticed.
    """
    token = _kept.set((directory / "policy.json", goes_on))
    try:
        yield
    finally:
        _kept.reset(token)


def find_policy(given: TrainPolicy | str | Path | None) -> TrainPolicy | None:
    """What to augment with: ``given`` itself, or what the policy file of this path holds.

    Raises:
        UserError: If there is no such file, it holds no policy, or it is something else that cannot augment.
    """
    if isinstance(given, Path):
        given = str(given)
    if isinstance(given, type):
        raise UserError(f"train_policy is the class {given.__name__}; give an object of it, {given.__name__}(…)")
    if not isinstance(given, str):
        if given is not None and not callable(given):
            raise UserError(f"train_policy is {given!r}; give a policy, the path of a policy.json, or a function")
        return given
    kept, goes_on = _kept.get() or (None, False)
    if kept is not None and given.endswith(".json") and kept.is_file():
        there = Path(given).is_file()
        if not there:
            log.info("the policy file %s is not there any more; taking the run's own, %s", given, kept)
        return load_policy(given if there and goes_on else kept)
    if Path(given).is_file():
        return load_policy(given)
    if Path(given).is_dir():
        raise UserError(f"train_policy is the directory {given}; give the policy.json in it")
    if "/" in given or given.endswith((".json", ".yaml")):
        raise UserError(f"train_policy: there is no policy file {given}; give the path of a policy.json")
    known = [name for name, each in vars(lightning_automl.augment).items() if _is_policy(each)]
    close = get_close_matches(given.removeprefix("lightning_automl.augment."), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"train_policy {given!r} is no policy file, class or function that can be imported; {hint}known classes: "
        f"{', '.join(sorted(known))}"
    )


def _is_policy(each: object) -> bool:
    return isinstance(each, type) and issubclass(each, ImagePolicy) and each is not ImagePolicy


def base_padding(base_augment: str, policy: TrainPolicy | None, image_size: tuple[int, int]) -> int:
    """Largest shift in pixels of the base augmentation: an eighth of the image, or less where a space says so.

    Raises:
        UserError: If the policy's space does not allow what ``base_augment`` does.
    """
    padding = max(1, min(image_size) // 8)
    space = policy.space if isinstance(policy, ImagePolicy) else None
    if space is None:
        return padding
    operations = BASE_OPERATIONS[base_augment]
    for name in operations:
        if not space.allows(name):
            allowed = [each for each, needed in BASE_OPERATIONS.items() if all(map(space.allows, needed))]
            raise UserError(
                f"base_augment={base_augment} does {name}, which the space {space.name!r} of the train_policy forbids; "
                f"use base_augment={allowed[-1]}"
            )
    cap = space.cap("crop") if "crop" in operations else None
    if cap is None or (most := int(cap * min(image_size))) >= padding:
        return padding
    log.info(
        "base_augment=%s shifts images by up to %d pixels instead of %d, since the space %r allows %g of the size",
        *(base_augment, most, padding, space.name, cap),
    )
    return most


def check_images(policy: TrainPolicy | None, channels: int, image_size: tuple[int, int]) -> None:
    """Let an operation that cannot take such images say so before the training.

    Raises:
        UserError: If one of the policy's operations, or its fill, does not fit them.
    """
    if not isinstance(policy, ImagePolicy):
        return
    names = list(OPS)
    places = torch.tensor([[names.index(name) for name in sorted(policy.operations())]], dtype=torch.int64)
    plan = Plan(places, torch.zeros(places.shape), torch.zeros_like(places))
    blank = torch.zeros(1, channels, *image_size, dtype=torch.uint8)
    apply(blank, plan, interpolation=policy.interpolation, fill=policy.filling(blank))
