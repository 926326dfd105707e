"""Label new images with a trained network."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_automl.image_files import EXTENSIONS, only_images, read_table, visible_files
from lightning_automl.results.predictor import Predictor
from lightning_automl.rundir import UserError, check_target, replacing

log = logging.getLogger("lightning_automl")

_SHOWN = 20


def classify(source: str | Path, images: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a table of image files with their most probable class and the probability of each class.

    The columns are ``file``, ``label`` and ``probability_<class>``; of a model of ``auto``, whose probabilities are
    calibrated, also ``unsure`` after ``label``: ``yes`` where the model is less sure of its label than of nine in ten
    validation images, else ``no``. Files of a folder are named as seen from it, so that ``FolderDataModule(folder,
    labels=table)`` reads the table; if more than one folder, file or list is given, all files are named as seen from
    here. Files that cannot be read are not in it and are listed at the end.

    Args:
        source: A run directory, a directory of ``auto``, or an ``.onnx`` file that ``export`` has written.
        images: Folders (looked through with their sub-folders), image files, and lists of files: a ``.txt`` with one
            path a line, or a ``.csv`` with a column ``file``, separated by commas, semicolons or tabs; a path that is
            not there from here is looked for beside the list.
        out: The CSV file; ``classified.csv`` in the directory by default.

    Returns:
        Path of the table.

    Raises:
        UserError: If there is no image, or none that can be read, or ``auto`` has no model yet.
    """
    source = Path(source)
    if out is None and source.suffix == ".onnx":
        raise UserError("say where the table is to go: --out labels.csv")
    target = source / "classified.csv" if out is None else Path(out)
    names = {path: name for each in images for path, name in _listed(Path(each)).items()}
    if len(images) > 1:  # two folders may each have a 0.png
        names = {path: str(path) for path in names}
    if not names:
        raise UserError(f"there is no image in {', '.join(map(str, images))}; known: {', '.join(EXTENSIONS)}")
    check_target(target)
    predictor = Predictor(source)
    broken: dict[Path, str] = {}
    as_given: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be UTF-8
    with replacing(target) as partial, partial.open("w", newline="", **as_given) as file:
        table = csv.writer(file)
        unsure = [] if predictor.unsure_below is None else ["unsure"]
        table.writerow(["file", "label", *unsure, *(f"probability_{name}" for name in predictor.class_names)])
        for part in predictor.stream(list(names)):
            broken |= part.broken
            for number, (path, row) in enumerate(zip(part.files, part.probabilities, strict=True)):
                label = predictor.class_names[int(row.argmax())]
                flag = [] if part.unsure is None else ["yes" if part.unsure[number] else "no"]
                table.writerow([names[path], label, *flag, *(f"{value:.6g}" for value in row)])
        if len(broken) == len(names):
            raise UserError(f"none of the {len(names)} image files can be read: {_some(broken, names)}")
    log.info("%d images are labelled in %s", len(names) - len(broken), target)
    if broken:
        log.warning(
            "%d of %d files cannot be read and are not in it: %s", len(broken), len(names), _some(broken, names)
        )
    return target


def _listed(given: Path) -> dict[Path, str]:
    """The files that an argument names, with what they are called in the table."""
    if given.is_dir():
        return {path: str(path.relative_to(given)) for path in only_images(visible_files(given))}
    if not given.exists():
        raise UserError(f"there is no file or folder {given}")
    kind = given.suffix.lower()
    if kind == ".csv":
        lines = [row["file"] for row in read_table(given, ["file"])]
    elif kind == ".txt":
        lines = given.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    elif kind in EXTENSIONS:
        return {given: str(given)}
    else:
        raise UserError(
            f"{given} is neither a folder, an image ({', '.join(EXTENSIONS)}) nor a list of files (.txt, .csv)"
        )
    named = [line.strip() for line in lines if line.strip()]
    return {Path(name) if os.path.exists(name) else given.parent / name: name for name in named}


def _some(broken: dict[Path, str], names: dict[Path, str]) -> str:
    shown = ", ".join(f"{names[path]} ({reason})" for path, reason in list(broken.items())[:_SHOWN])
    return shown + (f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else "")
