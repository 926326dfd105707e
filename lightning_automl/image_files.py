"""Image files: where they are, lists of them, what the header of one says, and its pixels."""

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lightning_automl.rundir import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")

_TIFF = (".tif", ".tiff")
_MOST_CHANNELS = 16
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_DEEP = ("I", "F")  # first letter of Pillow's modes with more than 8 bits
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass(frozen=True)
class ImageFile:
    """An image file and what its header says."""

    path: Path
    size: tuple[int, int] = (0, 0)  # height and width as shown
    channels: int = 0
    deep: bool = False  # more than 8 bits a channel
    mode: str = ""  # Pillow's, if Pillow reads it
    error: str = ""  # why it cannot be read


def visible_files(folder: Path) -> list[Path]:
    """The files below a folder, in order; hidden files and folders are passed over."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
    return found


def only_images(files: Iterable[Path]) -> list[Path]:
    """Those that are image files by their endings."""
    return [path for path in files if path.suffix.lower() in EXTENSIONS]


def read_table(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, separated by commas, semicolons or tabs; missing values are empty.

    Raises:
        UserError: If it has not all columns that are ``needed``.
    """
    # names of files need not be UTF-8: their other bytes come in, and go out to the file system, as surrogates
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter=max(",;\t", key=first.count))
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        for column in needed:
            if column not in columns:
                raise UserError(f"{path} has no column {column!r}; it has {', '.join(columns) or 'nothing'}")
        return [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]


def _orientation(image: Image.Image) -> int:
    # Pillow would decode a whole PNG to look for EXIF data behind the pixels
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(0x0112, 1))


def _needs_tifffile(image: Image.Image) -> bool:
    """Whether Pillow would show only the first page, or take the first of many channels for a grey image."""
    samples = getattr(image, "tag_v2", {}).get(277, 1)
    return image.format == "TIFF" and (getattr(image, "n_frames", 1) > 1 or samples != len(image.getbands()))


def read_header(path: Path) -> ImageFile:
    """Size, channels and depth without decoding the pixels."""
    try:
        if path.stat().st_size == 0:
            return ImageFile(path, error="the file is empty")
        try:
            with Image.open(path) as image:
                if not _needs_tifffile(image):
                    size = (image.height, image.width)
                    size = size[::-1] if _orientation(image) in _ROTATED else size
                    deep = image.mode.startswith(_DEEP)
                    grey = deep or image.mode in ("1", "L", "LA", "La")
                    return ImageFile(path, size, channels=1 if grey else 3, deep=deep, mode=image.mode)
        except (UnidentifiedImageError, SyntaxError):
            if path.suffix.lower() not in _TIFF:
                return ImageFile(path, error="not an image of a known type")
        pixels = _read_tiff(path)
        return ImageFile(path, pixels.shape[1:], channels=pixels.shape[0], deep=pixels.dtype != np.uint8)
    except UserError:
        raise
    except Exception as error:  # whatever a decoder stumbles over
        return ImageFile(path, error=str(error) or type(error).__name__)


def _read_tiff(path: Path) -> NDArray[Any]:
    """Pixels ``(channels, height, width)`` of a TIFF file whose channels Pillow does not know."""
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            f"{path} is a TIFF file with several channels or pages, which needs tifffile; pip install tifffile"
        ) from error
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, pixels = series.axes, np.asarray(series.asarray())
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and axes.endswith("S"):
        pixels = pixels.transpose(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] > _MOST_CHANNELS:
        raise ValueError(f"axes {axes} of {series.shape}, and only flat images with at most {_MOST_CHANNELS} channels")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)


def decode_or_error(file: ImageFile, size: tuple[int, int], channels: int) -> NDArray[Any] | ImageFile:
    """Pixels ``(channels, height, width)``, resized; or the file with the reason why they cannot be read.

    Raises:
        UserError: If a package is missing, so that files of this kind cannot be read at all.
    """
    try:
        return _decode(file, size, channels)
    except UserError:
        raise
    except Exception as error:  # whatever a decoder stumbles over
        return ImageFile(file.path, error=str(error) or type(error).__name__)


def _decode(file: ImageFile, size: tuple[int, int], channels: int) -> NDArray[Any]:
    """Pixels ``(channels, height, width)``."""
    planes: Iterable[Image.Image]
    try:
        with Image.open(file.path) as image:
            if _needs_tifffile(image):
                raise UnidentifiedImageError
            larger = 2 * max(size)  # libjpeg halves large images while decoding, several times as fast
            image.draft(None, (larger, larger))
            orientation = _orientation(image)
            image.load()
            shown = ImageOps.exif_transpose(image) if orientation != 1 else image
            if file.deep:
                planes = [shown.convert("F")]
            else:
                mode = _MODES.get(channels)
                if mode is None:
                    raise ValueError(f"it cannot be read with {channels} channels; known: 1, 2, 3, 4")
                planes = [_convert(shown, mode)]
            pixels = [np.asarray(_resize(plane, size)) for plane in planes]
    except (UnidentifiedImageError, SyntaxError):
        if file.path.suffix.lower() not in _TIFF:
            raise
        raw = _read_tiff(file.path)
        planes = [Image.fromarray(plane) for plane in raw]
        pixels = [np.asarray(_resize(plane, size)) for plane in planes]
    result = np.stack(pixels) if pixels[0].ndim == 2 else pixels[0].transpose(2, 0, 1)
    if len(result) == 1 and channels != 1 and file.deep:
        result = np.repeat(result, channels, axis=0)
    if len(result) != channels:
        raise ValueError(f"it has {len(result)} channels and {channels} were asked for")
    return result


def windowed(pixels: NDArray[Any], window: NDArray[Any]) -> NDArray[np.uint8]:
    """Map pixels ``(images, channels, height, width)`` to 8 bits, a window ``(channels, 2)`` of values to 0 and 255."""
    low, high = np.asarray(window, dtype=np.float64).T[:, :, None, None]
    return np.asarray(np.clip((pixels - low) * (255 / (high - low)), 0, 255).round(), dtype=np.uint8)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode in ("P", "PA") or mode == "LA":  # not every pair of modes has a direct way
        image = image.convert("RGBA")
    return image.convert(mode)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
