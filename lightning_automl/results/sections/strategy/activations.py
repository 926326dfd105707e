"""Where the network looks: images with their class activation maps."""

import numpy as np
from numpy.typing import NDArray

from lightning_automl.results.evidence import gallery
from lightning_automl.results.page import Section, Text
from lightning_automl.results.sections.wording import counted
from lightning_automl.results.strategy import StrategyRecord

_FILE = "activations.safetensors"
_SIDE = 112  # pixels: smaller images are enlarged before a map is laid over them
_SHOWN = 12


def activations(record: StrategyRecord) -> Section | None:
    """Images of the split that the model is judged by, each beside itself with its map."""
    path = record.directory / _FILE
    if not path.exists() or record.chosen is None:
        return None
    title = "Where the network looks"
    from lightning_automl.plots import activation_overlay

    try:
        maps, images, labels, predicted = _read(record)
    except Exception as error:  # whatever the reader of a damaged file stumbles over
        return Section(title, [Text(f"{_FILE} cannot be read: {error}.")])
    names = _names(record, int(max(labels.max(initial=0), predicted.max(initial=0))) + 1)
    shown = []
    for image, values, label, given in list(zip(images, maps, labels, predicted, strict=True))[:_SHOWN]:
        image, values = _enlarged(image, values)
        right = "right" if label == given else f"it is {names[label]}"
        shown.append((image, f"original: {names[label]}"))
        shown.append((activation_overlay(image, values), f"what speaks for {names[given]} ({right})"))
    if not shown:
        return None
    text = (
        f"{counted(len(shown) // 2, 'image')}, each beside itself with the class activation map of the predicted "
        "class: where it is bright, the last layers saw what speaks for that class. A map that lies beside the object, "
        "on a border or on a label is a sign that the network has learned something else. It is coarse, and shows "
        "where, not why."
    )
    return Section(title, [Text(text), gallery(shown)])


def _read(
    record: StrategyRecord,
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    from safetensors.numpy import load_file

    found = load_file(record.directory / _FILE)
    maps, images = found["maps"], found["images"]
    if maps.ndim != 3 or images.ndim != 4 or len(maps) != len(images) or images.dtype != np.uint8:
        raise ValueError(f"maps have shape {maps.shape} and images {images.shape}")
    values = np.clip(np.nan_to_num(maps.astype(np.float32)), 0, 1)
    return values, images, found["labels"].astype(np.int64), found["predicted"].astype(np.int64)


def _names(record: StrategyRecord, classes: int) -> list[str]:
    names = list(record.model.get("class_names") or record.look.get("class_names") or ())
    return [*names, *(str(index) for index in range(len(names), classes))]


def _enlarged(image: NDArray[np.uint8], values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Both at one size, which is not too small for a smooth map: pixels become squares, the map is interpolated."""
    from PIL import Image

    factor = -(-_SIDE // max(image.shape[1:]))
    image = image.repeat(factor, 1).repeat(factor, 2)
    size = (image.shape[2], image.shape[1])
    map_ = Image.fromarray(values, mode="F").resize(size, Image.Resampling.BILINEAR)
    return image, np.clip(np.asarray(map_), 0, 1)
