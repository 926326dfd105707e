"""What the sections of a run's page are made from."""

import base64
import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.image_files import windowed
from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.page import Gallery, Text
from lightning_automl.results.run import Predictions, Run, open_data
from lightning_automl.rundir import index_digest

_THUMBNAIL = 160  # pixels of the longer side at most
_PIXEL_ART = 64  # images up to this size are shown by their pixels and stored without loss


class Evidence:
    """What sections are made from: the run, its predictions, and its data as far as they can still be had.

    Args:
        run: The run directory.

    Attributes:
        run: The same.
        doubts: Sentences about predictions that are there and are not used, and why.
        split: ``test`` if the test split was opened and its predictions can be used, else ``val``.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.doubts: list[str] = []
        self._usable = {"val": self._checked("val")}
        self._usable["test"] = self._checked("test")
        self.split = "val" if self._usable["test"] is None else "test"

    def predictions(self, split: str) -> Predictions | None:
        """What the run's best epoch has predicted for a split, if that is known."""
        return self._usable[split]

    def _checked(self, split: str) -> Predictions | None:
        name = split_name(split)
        try:
            found = self.run.predictions(split)
        except Exception as error:  # whatever the reader of a damaged file stumbles over
            self.doubts.append(f"The {name} predictions cannot be read: {error}.")
            return None
        if found is None:
            return None
        strange = int((~((found.probabilities >= 0) & (found.probabilities <= 1 + 1e-5))).any(1).sum())
        if strange:
            numbers = f"{strange:,} of {len(found.labels):,}"
            self.doubts.append(f"{numbers} {name} predictions are no probabilities, as when training has diverged.")
            return None
        if split == "test":
            best = self._usable["val"]
            if found.origin.get("split") != self.run.data.get("splits", {}).get("test"):
                self.doubts.append("The test predictions that are there are of other images than the run's test split.")
                return None
            if best is not None and any(best.origin.get(key) != found.origin.get(key) for key in ("epoch", "step")):
                then, now = (int(each.origin.get("epoch", -1)) + 1 for each in (found, best))
                self.doubts.append(
                    f"The test predictions that are there are of epoch {then}, and the best one is {now} by now; "
                    "lightning-automl test --dir would open the test split for it."
                )
                return None
        return found

    @property
    def judged(self) -> Predictions | None:
        """The predictions that the run is judged by: those of ``split``."""
        return self.predictions(self.split)

    @property
    def class_names(self) -> list[str]:
        """One name a class."""
        names: list[str] | None = self.run.data.get("class_names")
        if names is None and self.judged is not None:
            names = [str(index) for index in range(self.judged.probabilities.shape[1])]
        return names or []

    @cached_property
    def data(self) -> Any:
        """The data module, or the sentence why there is none; its images are not read."""
        if not self.run.config.get("data"):
            return "The run has no data module."
        try:
            data = open_data(self.run)
        except Exception as error:
            reason = one_sentence(root_cause(error))
            return f"The images cannot be shown, since the data cannot be opened from here: {reason}."
        if not (hasattr(data, "contents") and hasattr(data, "read")):
            return f"The images cannot be shown: {type(data).__name__} does not give single images."
        if self.run.data.get("index") != index_digest(data.contents.names, data.contents.labels.tolist()):
            return "The images cannot be shown, since the data have changed since the run."
        return data

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8] | str:
        """8-bit images ``(rows, channels, height, width)`` of these rows, or a sentence why there are none."""
        if isinstance(self.data, str):
            return self.data
        try:
            images: NDArray[Any] = self.data.read(np.asarray(rows))
        except Exception as error:
            return f"The images cannot be shown: {error}"
        if images.dtype != np.uint8:
            window = self.run.data.get("window")
            if window is None:
                return "The images cannot be shown: the run does not say how they become 8 bits."
            images = windowed(images, np.asarray(window))
        return images

    def thumbnails(self, rows: NDArray[np.int64], captions: Sequence[str]) -> Gallery | Text:
        """Images of these rows of the data module's index, or a text why there are none."""
        images = self.images(rows)
        return Text(images) if isinstance(images, str) else gallery(list(zip(images, captions, strict=True)))


def gallery(images: Sequence[tuple[NDArray[np.uint8], str]]) -> Gallery:
    """Images ``(channels, height, width)`` with their captions, for a page."""
    return Gallery([(_address(image), caption, _is_small(image)) for image, caption in images])


def split_name(split: str) -> str:
    """What a reader calls a split: ``validation`` for ``val``."""
    return {"val": "validation"}.get(split, split)


def _is_small(image: NDArray[np.uint8]) -> bool:
    return int(max(image.shape[1:])) <= _PIXEL_ART


def _address(image: NDArray[np.uint8]) -> str:
    """A ``data:`` address of an image ``(channels, height, width)``; of many channels the first three are shown."""
    from PIL import Image

    pixels = image[:3].transpose(1, 2, 0) if len(image) >= 3 else image[0]
    picture = Image.fromarray(pixels)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kind = "png" if _is_small(image) else "jpeg"
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
