"""Image files: one folder a class, or a table of files and labels."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.data.base import ImageDataModule, Index
from lightning_automl.data.cache import ImageCache, available_memory, fingerprint, readable_size
from lightning_automl.image_files import (
    EXTENSIONS,
    ImageFile,
    decode_or_error,
    only_images,
    read_header,
    read_table,
    visible_files,
)
from lightning_automl.rundir import UserError, read_json, write_json

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_SHOWN = 5


@dataclass(frozen=True)
class _Listed:
    """A file that is to be read, and what folder or table say about it."""

    path: Path
    label: str
    split: str = ""
    group: str = ""


class FolderDataModule(ImageDataModule):
    """Image files in a folder.

    Three layouts: one sub-folder a class; ``train/``, ``val/`` (or ``valid/``, ``validation/``) and ``test/`` above
    such folders; or a table with the columns ``file`` and ``label``, and optionally ``group`` and ``split``. PNG, JPEG,
    WebP, TIFF, BMP and the first frame of GIF; TIFF with any number of channels needs the package tifffile. Hidden
    files and others are passed over. EXIF orientation is respected, palettes, CMYK and YCbCr become RGB,
    black-and-white becomes grey, and transparency is dropped unless ``channels`` asks for it. Colour images with 16
    bits a channel are read with 8, as Pillow does; grey ones, and TIFF that tifffile reads, keep theirs and are
    windowed.

    Args:
        path: The folder.
        labels: The table, a CSV file; ``labels.csv`` in the folder is found without it.
        image_size: Height and width to resize all images to, or one number for both; needed if sizes differ. Images are
            squashed, not cropped, with Pillow's bilinear filter, which averages when it makes them smaller.
        channels: 1 (grey), 2 (grey and transparency), 3 (RGB) or 4 (RGB and transparency); needed if images differ.
        skip_broken: Leave out files that cannot be read. To know them, every file is decoded when the index is made;
            if ``cache`` is a folder, those that could be decoded are remembered there until they change.
        cache: Where decoded images are kept. ``auto``: in memory if they take less than half of what is available, else
            on disk in ``cache/`` of the run directory (the trainer's ``default_root_dir``; without a trainer of the
            working directory). A folder: on disk there, decoded once for all runs that name it. None: in memory. A
            cache on disk follows the files: it is made anew when one of them is changed, added or removed.
        kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If the folder is in no such layout, or files cannot be read or do not fit together.
    """

    def __init__(
        self,
        path: str,
        labels: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        skip_broken: bool = False,
        cache: str | None = "auto",
        **kwargs: Any,
    ) -> None:
        self.path = path
        self.labels = labels
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        if image_size is not None and min(image_size) < 1:
            raise UserError(f"image_size is {image_size}; it is height and width in pixels, for example [224, 224]")
        if channels is not None and channels < 1:
            raise UserError(f"channels is {channels}; known: 1, 2, 3, 4, or the number of a multi-channel TIFF")
        self._wanted_size = image_size
        self._wanted_channels = channels
        self.skip_broken = skip_broken
        if cache == "":
            raise UserError("cache is empty; known: auto, the path of a folder, or null to keep images in memory")
        self.cache = cache
        super().__init__(**kwargs)

    def index(self) -> Index:
        """File names, labels, and the headers of the images."""
        listed, class_names = self._list_files()
        files = _in_threads(read_header, [entry.path for entry in listed])
        if self.skip_broken:
            files = self._check_decoding(files)
        broken = [file for file in files if file.error]
        if broken and not self.skip_broken:
            raise UserError(_tell_broken(broken, len(files), Path(self.path)))
        if broken:
            left_out = (
                "1 file that cannot be read is" if len(broken) == 1 else f"{len(broken)} files that cannot be read are"
            )
            log.warning("%s left out: %s", left_out, _some(broken, Path(self.path)))
            kept = [(entry, file) for entry, file in zip(listed, files, strict=True) if not file.error]
            listed, files = [entry for entry, _ in kept], [file for _, file in kept]
            if not files:
                told = _some(broken, Path(self.path))
                raise UserError(f"none of the {len(broken)} image files in {self.path} can be read: {told}")
        size = self._wanted_size or _common_size(files, Path(self.path))
        channels = self._wanted_channels or _common_channels(files, Path(self.path))
        _check_depth(files, Path(self.path))
        self._files: list[ImageFile] = files
        number = {name: label for label, name in enumerate(class_names)}
        root = Path(self.path)
        has_splits = any(entry.split for entry in listed)
        has_groups = any(entry.group for entry in listed)
        return Index(
            labels=np.array([number[entry.label] for entry in listed], dtype=np.int64),
            class_names=class_names,
            channels=channels,
            image_size=size,
            names=[_relative(entry.path, root) for entry in listed],
            splits=np.array([entry.split for entry in listed]) if has_splits else None,
            # an image without a group is a group of its own
            groups=np.array([entry.group or f"file {entry.path}" for entry in listed]) if has_groups else None,
        )

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Images ``(rows, channels, height, width)``, uint8 or, where files have more bits, float32."""
        size, channels = self.image_size, self.channels
        images = np.empty((len(rows), *size, channels), np.float32 if self.is_deep() else np.uint8)

        def decode(place: int) -> ImageFile | None:
            result = decode_or_error(self._files[rows[place]], size, channels)
            if isinstance(result, ImageFile):
                return result
            images[place] = result.transpose(1, 2, 0)
            return None

        broken = [file for file in _in_threads(decode, range(len(rows))) if file is not None]
        if broken:
            raise UserError(_tell_broken(broken, len(rows), Path(self.path)))
        return images.transpose(0, 3, 1, 2)

    def is_deep(self) -> bool:
        """Whether images have more than 8 bits, by their headers."""
        return self._files[0].deep

    def image_cache(self) -> ImageCache | None:
        """By ``cache`` and the memory that is available now."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.trainer is None else self.trainer.num_devices
        count = sum(map(len, self.split_rows.values()))
        needed, available = processes * count * self.image_bytes, available_memory()
        fits = 2 * needed <= available
        told = f"{readable_size(available)} of memory are available" + (f" to {processes} processes" * (processes > 1))
        if self.cache == "auto" and self.trainer is not None and self.trainer.world_size > 1:
            # memory changes while one process after the other asks; this is called in setup, where all of them are
            fits = self.trainer.strategy.broadcast(fits)
        if self.cache is None or (self.cache == "auto" and fits):
            height, width = self.image_size
            size = readable_size(count * self.image_bytes)
            log.info("%d images of %d x %d pixels (%s) are decoded into memory; %s", count, height, width, size, told)
            return None
        if self.cache != "auto":
            place, told = Path(self.cache), "asked for by --data.init_args.cache"
        else:
            place = Path("." if self.trainer is None else self.trainer.default_root_dir) / "cache"
            told += "; --data.init_args.cache DIR would let several runs share them"
        root = Path(self.path).resolve()
        table = self._table()
        # the window of deep images is that of the train split
        variant = fingerprint(self.split_rows["train"].tolist()) if self.is_deep() else ""
        return ImageCache(
            self._cache_folder(place),
            fingerprint([self.contents.names, _in_threads(_version, [file.path for file in self._files])]),
            (len(self._files), *self.image_size, self.channels),
            variant,
            about={"path": str(root), "labels": None if table is None else str(table)},
            why=told,
        )

    def _cache_folder(self, place: Path) -> Path:
        root = Path(self.path).resolve()
        table = self._table()
        self._check_place(place, root)
        source = fingerprint([str(root), None if table is None else str(table.resolve())])[:8]
        return place / f"{root.name[:60]}-{source}"

    def _check_decoding(self, files: Sequence[ImageFile]) -> list[ImageFile]:
        """The files, with the reason as ``error`` where the pixels cannot be read as they are wanted.

        Only good files are remembered: what was wrong with another may be mended without a change of the file, by a
        package that is installed.
        """
        size, channels, root = self._wanted_size, self._wanted_channels, Path(self.path)

        def check(file: ImageFile) -> ImageFile:
            result = decode_or_error(file, size or file.size, channels or file.channels)
            return result if isinstance(result, ImageFile) else file

        memory = None
        if self.cache not in (None, "auto"):
            memory = self._cache_folder(Path(self.cache)) / f"readable-{fingerprint([size, channels])}.json"
        known = {} if memory is None else _recall(memory)
        # before decoding: a file that is changed meanwhile is decoded again next time
        versions = [list(version) for version in _in_threads(_version, [file.path for file in files])]
        names = [_relative(file.path, root) for file in files]
        unknown = [
            place for place, file in enumerate(files) if not file.error and known.get(names[place]) != versions[place]
        ]
        checked = list(files)
        for place, file in zip(unknown, _in_threads(check, [files[place] for place in unknown]), strict=True):
            checked[place] = file
        good = {names[place]: versions[place] for place in unknown if not checked[place].error}
        if memory is not None and good:
            _remember(memory, known | good)
        return checked

    def _check_place(self, place: Path, root: Path) -> None:
        inside = place.resolve()
        if self._table() is None and inside.is_relative_to(root):
            if not any(part.startswith(".") for part in inside.relative_to(root).parts):
                raise UserError(
                    f"the cache {place} would be among the class folders of {self.path}; "
                    "give another place by --data.init_args.cache"
                )

    def _table(self) -> Path | None:
        return _find_table(self.path, self.labels)

    def _list_files(self) -> tuple[list[_Listed], list[str]]:
        return _list_files(self.path, self.labels)


def read_headers(path: str, labels: str | None = None) -> list[ImageFile]:
    """What the headers of all image files say, for whoever has to choose a size and a number of channels.

    Args:
        path: As of :class:`FolderDataModule`.
        labels: Likewise.

    Returns:
        One a file, those that cannot be read with the reason as ``error``.

    Raises:
        UserError: If the folder is in no layout that is known.
    """
    listed, _ = _list_files(path, labels)
    return _in_threads(read_header, [entry.path for entry in listed])


def _find_table(path: str, labels: str | None) -> Path | None:
    root = Path(path)
    if labels is None:
        return root / "labels.csv" if (root / "labels.csv").is_file() else None
    for table in (Path(labels), root / labels):
        if table.is_file():
            return table
    raise UserError(f"there is no table {labels}, neither here nor in {path}")


def _list_files(path: str, labels: str | None) -> tuple[list[_Listed], list[str]]:
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"there is no folder {path}; give the folder that holds the images")
    table = _find_table(path, labels)
    return _list_folders(root) if table is None else _list_table(table, root)


def _version(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; a file that is gone is told when it is decoded."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _recall(memory: Path) -> dict[str, list[int]]:
    try:
        known = read_json(memory)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, known: dict[str, list[int]]) -> None:
    try:
        write_json(memory, known)
    except OSError as error:  # only time is lost; that nothing can be written there, the cache itself tells
        log.debug("which files can be read is not remembered in %s: %s", memory, error)


def _list_folders(root: Path) -> tuple[list[_Listed], list[str]]:
    folders = _subfolders(root)
    split_folders = [folder for folder in folders if folder.name in SPLIT_FOLDERS]
    if any(folder.name == "train" for folder in folders):
        others = [folder.name for folder in folders if folder.name not in SPLIT_FOLDERS]
        if others:
            raise UserError(
                f"{root} holds train/ and also {others[0]}/; known beside train/: val/, valid/, validation/, test/"
            )
    elif folders and len(split_folders) == len(folders):
        raise UserError(f"{root} holds {', '.join(f'{folder.name}/' for folder in folders)} but no train/; add it")
    else:
        split_folders = []
    above = {folder: SPLIT_FOLDERS[folder.name] for folder in split_folders} or {root: ""}
    listed: list[_Listed] = []
    passed_over = 0
    for parent, split in above.items():
        classes = _subfolders(parent)
        if not classes:
            raise UserError(
                f"{parent} holds no folders; known layouts: one folder a class, train/ val/ test/ above such folders, "
                "or a table labels.csv with the columns file and label"
            )
        for folder in classes:
            everything = visible_files(folder)
            files = only_images(everything)
            passed_over += len(everything) - len(files)
            if not files:
                raise UserError(f"the class folder {folder} holds no images; known: {', '.join(EXTENSIONS)}")
            listed += [_Listed(file, folder.name, split) for file in files]
    if passed_over:
        log.info("%d files in %s that are no images are passed over", passed_over, root)
    class_names = sorted({entry.label for entry in listed})
    if len(class_names) == 1:
        raise UserError(f"{root} holds one class folder, {class_names[0]!r}; a classifier needs at least two")
    return listed, class_names


def _list_table(table: Path, root: Path) -> tuple[list[_Listed], list[str]]:
    rows = read_table(table, ("file", "label"))
    if not rows:
        raise UserError(f"{table} has no rows; give one a file")
    listed = []
    lines: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        name, label, split = row["file"], row["label"], row.get("split", "")
        if not name or not label:
            raise UserError(f"line {line} of {table} has no {'label' if name else 'file'}")
        if not label.isascii() and label.encode(errors="replace").decode() != label:
            raise UserError(f"line {line} of {table} has a label that is not UTF-8, {label!r}; save the table as UTF-8")
        if split and split not in SPLIT_FOLDERS:
            raise UserError(
                f"line {line} of {table} has the unknown split {split!r}; known: {', '.join(SPLIT_FOLDERS)}"
            )
        if lines.setdefault(os.path.normpath(name), line) != line:
            raise UserError(
                f"{table} has {name!r} in line {lines[os.path.normpath(name)]} and line {line}; name it once"
            )
        path = root / name
        if not path.is_file() and (table.parent / name).is_file():
            path = table.parent / name
        listed.append(_Listed(path, label, SPLIT_FOLDERS.get(split, ""), row.get("group", "")))
    missing = [entry.path for entry in listed if not entry.path.is_file()]
    if missing:
        names = ", ".join(_relative(path, root) for path in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(f"{len(missing)} of {len(listed)} files in {table} do not exist in {root}: {names}{more}")
    other = [entry.path.name for entry in listed if entry.path.suffix.lower() not in EXTENSIONS]
    if other:
        raise UserError(f"{other[0]} in {table} is of no known image type; known: {', '.join(EXTENSIONS)}")
    class_names = sorted({entry.label for entry in listed})
    if len(class_names) == 1:
        raise UserError(f"{table} has only one label, {class_names[0]!r}; a classifier needs at least two")
    return listed, class_names


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _in_threads(function: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    # decoders release the interpreter's lock; headers wait for the disk
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, arguments))


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _some(files: Sequence[ImageFile], root: Path) -> str:
    shown = ", ".join(f"{_relative(file.path, root)} ({file.error})" for file in files[:_SHOWN])
    return shown + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")


def _tell_broken(broken: Sequence[ImageFile], number: int, root: Path) -> str:
    return (
        f"{len(broken)} of {number} image files cannot be read: {_some(broken, root)}; "
        "repair them, or set --data.init_args.skip_broken true to leave such files out"
    )


def _common_size(files: Sequence[ImageFile], root: Path) -> tuple[int, int]:
    if len({file.size for file in files}) == 1:
        return files[0].size
    small = min(files, key=lambda file: file.size[0] * file.size[1])
    large = max(files, key=lambda file: file.size[0] * file.size[1])
    raise UserError(
        f"the images differ in size, from {small.size[0]} x {small.size[1]} ({_relative(small.path, root)}) to "
        f"{large.size[0]} x {large.size[1]} ({_relative(large.path, root)}) pixels; "
        "set --data.init_args.image_size to resize them, for example to 64"
    )


def _common_channels(files: Sequence[ImageFile], root: Path) -> int:
    examples = {file.channels: file for file in reversed(files)}
    if len(examples) == 1:
        return files[0].channels
    told = ", ".join(f"{number} ({_relative(examples[number].path, root)})" for number in sorted(examples))
    raise UserError(
        f"the images differ in their number of channels: {told}; "
        "set --data.init_args.channels to 1 for grey or 3 for colour"
    )


def _check_depth(files: Sequence[ImageFile], root: Path) -> None:
    examples = {file.deep: file for file in reversed(files)}
    if len(examples) == 2:
        raise UserError(
            f"{_relative(examples[False].path, root)} has 8 bits a channel and {_relative(examples[True].path, root)} "
            "more; save all images with the same number of bits"
        )
