"""A folder of image files as it comes: which size and number of channels the networks get, which files are left out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_automl.image_files import ImageFile, decode_or_error
from lightning_automl.rundir import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_automl.data import FolderDataModule

log = logging.getLogger(__name__)

#: Sides of the squares, in pixels, that larger images are brought to.
SIDES = (224, 160, 128, 96, 64, 48, 32)
#: Images that are all of one size with sides up to this stay as they are.
SMALL = 96
#: Pixels, of all images together, that a second of the budget pays for on a processor: some hundred epochs of a small
#: network in the whole budget.
PIXELS_A_SECOND = 4000
#: How many times as many a GPU works through.
GPU = 20

_SHOWN = 3


@dataclass(frozen=True)
class Opened:
    """A folder that has been looked at.

    Args:
        data: The data module; its images are decoded.
        arguments: What it was made with.
        headers: Of the files that can be read, in its order.
        broken: File and reason of the others.
    """

    data: "FolderDataModule"
    arguments: dict[str, Any]
    headers: list[ImageFile]
    broken: list[list[str]]


def open_folder(
    arguments: Mapping[str, Any],
    build: "Callable[[dict[str, Any]], FolderDataModule]",
    *,
    cache: Path,
    image_size: int | None,
    budget: float,
    gpu: bool,
) -> Opened:
    """Choose what is not given, leave out what cannot be read, and decode all images once, into ``cache``.

    Args:
        arguments: Of a ``FolderDataModule``, ``path`` among them.
        build: Makes it of its arguments.
        cache: Folder for the decoded images, from which all runs take them.
        image_size: Side in pixels; it wins over the arguments'.
        budget: Seconds for the whole strategy, see :func:`choose_size`.
        gpu: Whether networks are trained on a GPU.

    Raises:
        UserError: If the folder is in no known layout, most of its files cannot be read, or they do not fit together.
    """
    from lightning_automl.data.cache import free_space, readable_size
    from lightning_automl.data.folder import read_headers

    path, table = arguments["path"], arguments.get("labels")
    headers = read_headers(path, table)
    good = [header for header in headers if not header.error]
    broken = [header for header in headers if header.error]
    _refuse_majority(broken, headers, Path(path))
    channels = arguments.get("channels") or choose_channels(good, Path(path))
    size = [image_size, image_size] if image_size else arguments.get("image_size")
    size = [size, size] if isinstance(size, int) else size or choose_size(good, budget, gpu)
    chosen = {**arguments, "image_size": list(size), "channels": channels, "cache": arguments.get("cache", str(cache))}
    if chosen["cache"] == "auto":
        chosen["cache"] = str(cache)
    needed, free = len(good) * size[0] * size[1] * channels, free_space(cache)
    if needed > free and not cache.exists():
        raise UserError(
            f"the {len(good)} images of {path} take {readable_size(needed)} at {size[0]} x {size[1]} pixels, and "
            f"{cache.parent} has {readable_size(free)} free; free some, give a smaller image_size, or another --dir"
        )
    chosen["skip_broken"] = bool(broken or arguments.get("skip_broken"))
    try:
        data = build(chosen)
    except UserError as error:
        if not broken:
            raise
        raise UserError(f"{error}; {len(broken)} files cannot be read: {_some(broken, Path(path))}") from error
    if not chosen["skip_broken"]:  # to know broken files beforehand, every file would be decoded twice
        try:
            data.dataset("train")
        except UserError as error:
            log.debug("once more, without files that cannot be read: %s", error)
            chosen["skip_broken"] = True
            data = build(chosen)
    if chosen["skip_broken"]:
        names = {str(Path(path, name)) for name in data.contents.names}
        lost = [header for header in headers if not header.error and str(header.path) not in names]
        errors = (decode_or_error(header, (size[0], size[1]), channels) for header in lost)
        broken += [found for found in errors if isinstance(found, ImageFile)]
        _refuse_majority(broken, headers, Path(path))
        data.dataset("train")
        gone = {header.path for header in broken}
        good = [header for header in good if header.path not in gone]
    told = [[_name(file, Path(path)), file.error] for file in broken]
    return Opened(data, chosen, good, sorted(told))


def choose_size(files: Sequence[ImageFile], budget: float, gpu: bool = False) -> list[int]:
    """Height and width in pixels.

    Images that are all of one size, with both sides up to ``SMALL``, keep it. Others are brought to the largest square
    of ``SIDES`` that is not above the median of their shorter sides, and whose pixels, of all images together, are not
    more than the budget's seconds times ``PIXELS_A_SECOND`` (of a GPU ``GPU`` times that); or to the smallest square,
    where that is still too much. Images whose shorter sides are mostly below it stay that small.

    Args:
        files: Of all images.
        budget: Seconds.
        gpu: Whether networks are trained on a GPU.
    """
    sizes = {file.size for file in files}
    if len(sizes) == 1 and max(files[0].size) <= SMALL:
        return list(files[0].size)
    shorter = int(np.median([min(file.size) for file in files]))
    affordable = budget * PIXELS_A_SECOND * (GPU if gpu else 1) / len(files)
    for side in SIDES:
        if side <= shorter and side**2 <= affordable:
            return [side, side]
    side = min(SIDES[-1], shorter)
    return [side, side]


def choose_channels(files: Sequence[ImageFile], root: Path) -> int:
    """3 if any image has colours, else what all have.

    Raises:
        UserError: If images have other numbers of channels than 1 and 3, and not the same.
    """
    examples = {file.channels: file for file in reversed(files)}
    if examples.keys() <= {1, 3} or len(examples) == 1:
        return max(examples)
    told = ", ".join(f"{number} ({_name(examples[number], root)})" for number in sorted(examples))
    raise UserError(
        f"the images of {root} differ in their number of channels: {told}; "
        "save all with the same number, or name FolderDataModule with channels in a YAML file"
    )


def _refuse_majority(broken: Sequence[ImageFile], files: Sequence[ImageFile], root: Path) -> None:
    if 2 * len(broken) > len(files):
        raise UserError(
            f"{len(broken)} of {len(files)} image files of {root} cannot be read: {_some(broken, root)}; "
            "that is most of them, repair or remove them"
        )


def _some(broken: Sequence[ImageFile], root: Path) -> str:
    shown = ", ".join(f"{_name(file, root)} ({file.error})" for file in broken[:_SHOWN])
    return shown + (f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else "")


def _name(file: ImageFile, root: Path) -> str:
    return str(file.path.relative_to(root)) if file.path.is_relative_to(root) else str(file.path)
