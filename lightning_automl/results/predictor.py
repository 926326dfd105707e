"""Class probabilities for new images, from a run directory, one of ``auto`` or an exported ONNX file."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_automl.image_files import ImageFile, decode_or_error, read_header, windowed
from lightning_automl.results.network import (
    DIVERGED,
    Trained,
    probabilities,
    read_source,
    trained_task,
    what_was_trained,
)
from lightning_automl.rundir import UserError


class _Network(Protocol):
    """Maps uint8 images ``(batch, channels, height, width)`` to probabilities ``(batch, classes)``."""

    trained: Trained

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Classified:
    """Some files with their probabilities.

    Attributes:
        files: Those that could be read.
        probabilities: float64 ``(files, classes)``.
        broken: The others, with the reason.
        unsure: bool ``(files,)``: whether the model is unsure of an image, which is then better looked at by somebody;
            None for a network that does not know.
    """

    files: list[Path]
    probabilities: NDArray[np.float64]
    broken: dict[Path, str]
    unsure: NDArray[np.bool_] | None = None


class Predictor:
    """Gives class probabilities for new images.

    From an ONNX file neither torch nor lightning is imported; it needs onnxruntime. Images are brought to the network's
    size and channels as ``FolderDataModule`` does, whatever data module it was trained with.

    Args:
        source: A run directory, a directory of ``auto``, whose model gives calibrated probabilities, or an ``.onnx``
            file that ``export`` has written of one of these.
        device: ``cpu`` or ``cuda`` for a directory; ``cuda`` when there is one by default. onnxruntime takes the best
            of what it was installed with.

    Attributes:
        class_names: One name a class, in the order of the probabilities.
        image_size: Height and width in pixels that images are resized to.
        channels: Channels that images are converted to.
        unsure_below: Of a model of ``auto``: it is unsure of an image whose most probable class has less than this, in
            [0, 1]; a tenth of the validation images had. None for other networks.
        threshold: Of a model of ``auto`` with two classes: operating point on the probability of the second class, in
            [0, 1], at which sensitivity and specificity together were best on validation images. The most probable
            class, and so the label, does not depend on it. None for other networks.

    Raises:
        UserError: If the source is none of these, no epoch of the run is finished, or ``auto`` has no model yet.

    Example:
        >>> predictor = Predictor("runs/mine")  # doctest: +SKIP
        >>> result = predictor.files(["a.png", "b.jpg"])  # doctest: +SKIP
        >>> predictor.class_names[result.probabilities[0].argmax()]  # doctest: +SKIP
    """

    def __init__(self, source: str | Path, device: str | None = None) -> None:
        source = Path(source)
        if source.suffix == ".onnx" and not source.exists():
            raise UserError(f"there is no file {source}; give an .onnx file made by export, or a run directory")
        if source.is_file() and source.suffix != ".onnx":
            raise UserError(f"{source} is neither a run directory nor an .onnx file; give one of these")
        self._source = source
        self._network: _Network = _OnnxNetwork(source) if source.is_file() else _TorchNetwork(source, device)
        self._trained = self._network.trained
        self.class_names = self._trained.class_names
        self.image_size = self._trained.image_size
        self.channels = self._trained.channels
        self.unsure_below = self._trained.unsure_below
        self.threshold = self._trained.threshold

    def arrays(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Probabilities ``(images, classes)`` of uint8 images ``(images, channels, height, width)``.

        Raises:
            UserError: If the images are not of the network's size, channels and type.
        """
        expected = (self.channels, *self.image_size)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise UserError(
                f"images are {images.dtype} {images.shape}; the network takes uint8 (images, channels, height, width) "
                f"with the last three {expected}"
            )
        scores = self._network(images)
        if not np.isfinite(scores).all():
            raise UserError(DIVERGED.format(self._source))
        return scores

    def files(self, files: Sequence[str | Path]) -> Classified:
        """Probabilities of image files of any size and mode; those that cannot be read are told apart."""
        parts = list(self.stream(files))
        scores = np.concatenate([part.probabilities for part in parts] or [np.empty((0, len(self.class_names)))])
        return Classified(
            [file for part in parts for file in part.files],
            scores,
            {file: reason for part in parts for file, reason in part.broken.items()},
            self._unsure(scores),
        )

    def stream(self, files: Sequence[str | Path], batch_size: int = 32) -> Iterator[Classified]:
        """The same batch by batch, in the order of ``files``, so that any number of them takes little memory.

        While the network is busy with a batch the next one is decoded.
        """
        paths = [Path(file) for file in files]
        batches = [paths[first : first + batch_size] for first in range(0, len(paths), batch_size)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting: list[list[Future[NDArray[np.uint8] | str]]] = []
            for number, batch in enumerate(batches):
                for ahead in batches[number + len(waiting) : number + 2]:
                    waiting.append([pool.submit(self._pixels, file) for file in ahead])
                results = [future.result() for future in waiting.pop(0)]
                pixels = [result for result in results if not isinstance(result, str)]
                scores = self.arrays(np.stack(pixels)) if pixels else np.empty((0, len(self.class_names)))
                yield Classified(
                    [file for file, result in zip(batch, results, strict=True) if not isinstance(result, str)],
                    scores,
                    {file: result for file, result in zip(batch, results, strict=True) if isinstance(result, str)},
                    self._unsure(scores),
                )

    def _unsure(self, scores: NDArray[np.float64]) -> NDArray[np.bool_] | None:
        return None if self.unsure_below is None else scores.max(1) < self.unsure_below

    def _pixels(self, path: Path) -> NDArray[np.uint8] | str:
        """Pixels ``(channels, height, width)`` as the network wants them, or why there are none."""
        if not os.path.exists(path):  # Path.exists() raises for a name that is too long or a folder that is closed
            return "there is no such file"
        header = read_header(path)
        if header.error:
            return header.error
        result = decode_or_error(header, self.image_size, self.channels)
        if isinstance(result, ImageFile):
            return result.error
        window = self._trained.window
        if result.dtype == np.uint8:
            if window is not None:
                return "it has 8 bits a channel, and the network was trained on images with more"
            return np.asarray(result)
        if window is None and not header.mode.startswith("I;16"):
            return "it has more than 16 bits a channel, and the network was trained on images with 8"
        if window is None:
            window = [[0, 65535]] * self.channels  # of what range a file uses it says nothing
        return np.asarray(windowed(result[None], np.asarray(window))[0])


class _TorchNetwork:
    def __init__(self, directory: Path, device: str | None) -> None:
        source = read_source(directory)
        self.trained = what_was_trained(source)
        import torch

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.task = trained_task(source).to(self.device)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        import torch

        task: Any = self.task
        with torch.inference_mode():
            logits = task(torch.from_numpy(images).to(self.device).float() / 255).float()
            scores = probabilities(task, logits)
        return np.asarray(scores.cpu().double().numpy())


class _OnnxNetwork:
    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f'{path} needs onnxruntime, which is not installed; pip install "lightning-automl[onnx]"'
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime has an exception for each of its states
            raise UserError(f"{path} cannot be read as ONNX ({type(error).__name__}); export it again") from error
        facts = self.session.get_modelmeta().custom_metadata_map
        if "class_names" not in facts:
            raise UserError(f"{path} does not say its classes; only files that `lightning-automl export` wrote will do")
        values = {key.name: json.loads(facts[key.name]) for key in fields(Trained) if key.name in facts}
        self.trained = Trained(**values | {"image_size": tuple(values["image_size"])})

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        (scores,) = self.session.run(["probabilities"], {"images": images.astype(np.float32) / 255})
        return np.asarray(scores, dtype=np.float64)
