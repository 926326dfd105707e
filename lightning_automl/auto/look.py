"""Look at the data before anything is trained: what there is, what is wrong with it, and whether it can work."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_automl.auto.facts import Facts
from lightning_automl.auto.image_folder import open_folder
from lightning_automl.auto.notes import notes_of
from lightning_automl.auto.sources import build_data, class_path_of, find_data
from lightning_automl.rundir import UserError, index_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_automl.data import ImageDataModule

#: Folds when every class has as many images, or groups.
FOLDS = 5

_MOST_PAIRS = 20
_OF_SPLITS = ("subset", "val_fraction", "test_fraction", "split_seed")


def look(
    data: str,
    directory: Path,
    *,
    modality: str = "natural",
    image_size: int | None = None,
    folds: int | None = None,
    budget: float,
) -> Facts:
    """Look at the data, and refuse what cannot work.

    All images are decoded once: those of files into ``directory/cache``, from which the runs take them.

    Args:
        data: ``digits``; a folder (one sub-folder a class; ``train/ val/ test/`` above them; or with a ``labels.csv``);
            an ``.npz`` file in the MedMNIST layout; or a YAML file with ``class_path`` and ``init_args`` of a data
            module, also below the key ``data``.
        directory: Of the strategy.
        modality: Name of a space of safe operations, or a YAML file with one.
        image_size: Side in pixels that images of a folder are resized to; chosen when left out.
        folds: Number of folds; as many as possible up to five when left out.
        budget: Seconds for the whole strategy, which decide about the size of images in a folder.

    Raises:
        UserError: If the data are not there, are of no known kind, or cannot be cut into splits and folds that all hold
            every class; or if the modality is unknown.
    """
    from lightning_automl.augment import load_space

    space = load_space(modality)
    class_path, arguments, ignored = find_data(data)
    broken: list[list[str]] = []
    if class_path.rsplit(".", 1)[-1] == "FolderDataModule" and isinstance(arguments.get("path"), str):
        check_place(arguments, directory)
        opened = open_folder(
            arguments,
            lambda chosen: build_data(class_path, chosen),
            cache=directory.resolve() / "cache",
            image_size=image_size,
            budget=budget,
            gpu=_has_gpu(),
        )
        module: ImageDataModule = opened.data
        arguments, broken = opened.arguments, opened.broken
        sizes = np.array([header.size for header in opened.headers])
    else:
        module = build_data(class_path, arguments)
        if image_size is not None and tuple(module.image_size) != (image_size, image_size):
            height, width = module.image_size
            raise UserError(
                f"image_size is {image_size} and the images of {data} have {height} x {width} pixels; "
                "only image files are resized, leave it out"
            )
        sizes = np.array([module.image_size])
        module.dataset("train")
    units = _units(module)
    number = _folds(module, arguments, units, folds)
    apart = 2 if number >= 5 else 1
    exact = [list(pair) for pair in module.leaks]
    near = _near(module)
    contents = module.contents
    counts = {
        split: np.bincount(contents.labels[rows], minlength=module.num_classes).tolist()
        for split, rows in module.split_rows.items()
    }
    facts = Facts(
        data={"class_path": class_path_of(module), "init_args": arguments},
        images=len(contents.labels),
        counts=counts,
        class_names=list(module.class_names),
        channels=module.channels,
        image_size=[int(side) for side in module.image_size],
        sizes=_describe(sizes),
        units=units.tolist(),
        unit="image" if contents.groups is None else "group",
        groups=None if contents.groups is None else len(np.unique(contents.groups)),
        official_splits=_official(module),
        imbalance=max(counts["train"]) / min(counts["train"]),
        folds=number,
        search_folds=list(range(number - apart)),
        comparison_folds=list(range(number - apart, number)),
        broken=broken,
        exact_duplicates=exact[:_MOST_PAIRS],
        exact_duplicate_count=len(exact),
        near_duplicates=[list(pair) for pair in near or []][:_MOST_PAIRS],
        near_duplicate_count=len(near or []),
        modality=space.name,
        space=space.to_dict(),
        flips=space.allows("horizontal_flip"),
        deep=module.window is not None,
        notes=[],
        digest=index_digest(contents.names, contents.labels.tolist()),
    )
    tested = _units(module, ("test",))
    facts.notes.extend(notes_of(facts, tested.tolist(), compared=near is not None, ignored=ignored))
    return facts


def check_place(arguments: Mapping[str, Any], directory: Path) -> None:
    """Refuse a directory among the images of a folder: the runs would else be taken for classes."""
    root, own = Path(arguments["path"]), directory.resolve()
    if own.is_relative_to(root) and arguments.get("labels") is None and not (root / "labels.csv").is_file():
        if not any(part.startswith(".") for part in own.relative_to(root).parts):
            raise UserError(f"{directory} lies among the images of {root}; give another --dir")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _units(module: "ImageDataModule", splits: tuple[str, ...] = ("train", "val")) -> "NDArray[np.int64]":
    """Images, or groups, ``(classes,)`` of each class in these splits."""
    contents = module.contents
    rows = np.concatenate([module.split_rows[split] for split in splits])
    labels = contents.labels[rows]
    if contents.groups is not None:
        codes = np.unique(contents.groups, return_inverse=True)[1].reshape(-1)[rows]
        labels = np.unique(np.stack([labels, codes]), axis=1)[0]
    return np.bincount(labels, minlength=module.num_classes)


def _folds(
    module: "ImageDataModule", arguments: Mapping[str, Any], units: "NDArray[np.int64]", wanted: int | None
) -> int:
    """Number of folds that all hold every class: the wanted one, or the largest up to ``FOLDS``."""
    if wanted is not None and wanted < 2:
        raise UserError(f"folds is {wanted}; it must be at least 2, or left out")
    most = int(units.min())  # at least 2: one in train, one in val
    tried = range(min(wanted or FOLDS, most), 1, -1)
    largest = next((number for number in tried if _can_cut(module, arguments, number)), 0)
    if not largest:
        raise UserError(
            "the groups outside the test split cannot be cut into two folds that both hold every class; give images of "
            "more groups"
        )
    if wanted is not None and largest < wanted:
        unit = "image" if module.contents.groups is None else "group"
        name = module.class_names[int(units.argmin())]
        why = f"class {name!r} has {most} {unit}s outside the test split"
        if largest < most:
            why = "the groups outside the test split cannot be cut so that more of them hold every class"
        raise UserError(
            f"folds is {wanted}, and {largest} is the largest number that is possible: {why}; give {largest}"
        )
    return largest


def _can_cut(module: "ImageDataModule", arguments: Mapping[str, Any], folds: int) -> bool:
    """Whether the data module could be made for a fold."""
    from lightning_automl.data.splits import make_splits

    contents = module.contents
    names = {"split_seed": "seed"}
    given = {names.get(key, key): arguments[key] for key in _OF_SPLITS if arguments.get(key) is not None}
    last = (folds - 1,) if folds > 2 else ()
    try:
        make_splits(
            contents.labels,
            contents.class_names,
            contents.splits,
            contents.groups,
            fold=0,
            folds=folds,
            without_folds=last,
            **given,
        )
    except UserError:
        return False
    return True


def _near(module: "ImageDataModule") -> list[tuple[str, str]] | None:
    from lightning_automl.auto.duplicates import near_duplicates

    names = {split: [module.contents.names[row] for row in rows] for split, rows in module.split_rows.items()}
    return near_duplicates(module.datasets, names, {name for _, name in module.leaks})


def _official(module: "ImageDataModule") -> list[str]:
    found = module.contents.splits
    return [] if found is None else [split for split in ("train", "val", "test") if (found == split).any()]


def _describe(sizes: "NDArray[np.int64]") -> dict[str, list[int]]:
    """Smallest, median and largest of sizes ``(images, 2)``."""
    areas = sizes[:, 0] * sizes[:, 1]
    return {
        "smallest": sizes[int(areas.argmin())].tolist(),
        "median": [int(side) for side in np.median(sizes, axis=0)],
        "largest": sizes[int(areas.argmax())].tolist(),
    }
