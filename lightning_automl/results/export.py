"""Hand a trained network on as one file that needs nothing of this project."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_automl import __version__
from lightning_automl.results.compress import Compression, compressed_task
from lightning_automl.results.ensemble import SMALLEST, Ensemble
from lightning_automl.results.network import (
    DIVERGED,
    Trained,
    probabilities,
    read_source,
    trained_task,
    what_was_trained,
)
from lightning_automl.results.run import Run
from lightning_automl.rundir import DisagreementError, UserError, check_target, replacing, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("lightning_automl")

Format = Literal["onnx", "torch", "safetensors"]

SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}

#: Numbers of images that the outputs are compared for.
_BATCHES = (1, 2, 5)


def export(
    directory: str | Path,
    format: Format = "onnx",
    out: str | Path | None = None,
    tolerance: float = 1e-4,
    compress: "str | Compression | None" = None,
) -> Path:
    """Write the network of a run's best epoch, normalisation included, and check that it gives the same outputs.

    The input is float32 ``(batch, channels, height, width)`` in [0, 1], any batch. ``onnx``: the input is called
    ``images``, the outputs ``logits`` and ``probabilities``. ``torch``: what ``torch.export.load(file).module()``
    returns for images is the logits. ``safetensors``: the tensors of the task by name, ``mean`` and ``std`` among
    them, to be read by the argument ``weights`` of a network. Each file holds as metadata, as JSON texts,
    ``class_names``, ``channels``, ``image_size`` (height, width) and ``window`` (for networks trained on images with
    more than 8 bits: what became 0 and 1 of each channel), and ``probabilities``, how they follow from the logits; of
    a compressed network also ``low_rank``, the arguments of the ``LowRankConfig`` that makes its layers again.

    The model of a directory of ``auto`` is one network, whatever the number of its members: its logits are calibrated,
    and the metadata hold also ``unsure_below`` and ``threshold`` (see :class:`Predictor`), ``temperature``,
    ``members``, their number, and ``averaging``, how the logits follow from theirs. In ``safetensors`` the names of
    the tensors of each member's task begin with ``members.0.``, ``members.1.``, …

    Args:
        directory: A run directory, or a directory of ``auto`` that has come to its end.
        format: ``onnx``, ``torch`` (torch.export) or ``safetensors``.
        out: The file; ``model.onnx``, ``model.pt2`` or ``model.safetensors`` in the directory by default.
        tolerance: Largest difference between the outputs of file and network for random images, as a share of the
            largest output where that is above 1; of an average, the largest that a member gives.
        compress: Make the network smaller before, as ``energy=0.95`` or ``flops=0.5,form=spatial,finetune=2``, see
            :class:`~lightning_automl.results.compress.Compression`. What that costs in accuracy on the validation split
            is written to ``compression.json`` in the run directory; the file is ``model_compressed.onnx`` by default.

    Returns:
        Path of the file.

    Raises:
        UserError: If the run has no finished epoch or is an architecture search, ``auto`` has no model yet, onnx is not
            installed, or the network cannot be compressed so.
        DisagreementError: If the outputs differ by more; no file is left.
    """
    import torch

    from lightning_automl.models import Supernet

    if format not in get_args(Format):
        raise UserError(f"unknown format {format!r}; known: {', '.join(get_args(Format))}")
    if format == "onnx":
        _require_onnx()
    wanted = Compression.parse(compress) if isinstance(compress, str) else compress
    source = read_source(directory)
    if isinstance(source, Ensemble) and wanted is not None:
        raise UserError(
            f"the model of {directory} is an average of calibrated networks, and only the network of a run can be "
            f"compressed; give {source.places[0]}"
        )
    trained = what_was_trained(source)
    name = "model" if wanted is None else "model_compressed"
    target = Path(out) if out is not None else source.directory / f"{name}{SUFFIXES[format]}"
    if target.suffix != SUFFIXES[format]:
        raise UserError(f"a file of the format {format} ends with {SUFFIXES[format]}, not {target.name!r}")
    check_target(target)
    task: Any = trained_task(source)
    if any(isinstance(module, Supernet) for module in task.modules()):
        raise UserError(
            f"{directory} is an architecture search, whose network holds all candidates; train the network of its "
            f"genotype (--model.model GenotypeNetwork --model.model.genotype {directory}) and export that run"
        )
    with torch.no_grad():
        if not task(torch.zeros(1, trained.channels, *trained.image_size)).isfinite().all():
            raise UserError(DIVERGED.format(directory))
    if format == "safetensors" and not getattr(task, "mergeable", True):
        places = source.places if isinstance(source, Ensemble) else [source.directory]
        kept = ", ".join(str(place / "adapter") for place in places if (place / "adapter").exists())
        raise UserError(
            f"the adapter of {directory} stays beside the layers, and no plain network could read its tensors; take "
            f"onnx or torch{f', or {kept}, which load_adapter and peft read' if kept else ''}"
        )
    record: dict[str, Any] = {}
    if wanted is not None:
        assert isinstance(source, Run)
        task, record = compressed_task(source, task, wanted)
    write, read = _FORMATS[format]
    deployed: Any = task.deployed() if hasattr(task, "deployed") else task  # without LoRA beside its layers
    deployed.low_rank = getattr(task, "low_rank", None)
    with replacing(target) as partial, torch.no_grad(), _quiet():
        write(deployed, trained, partial)
        difference = _difference(task, trained, read(deployed, partial))
        if not difference <= tolerance:
            raise DisagreementError(
                f"the {format} file does not give what the network gives: outputs differ by {difference:.3g}, more "
                f"than {tolerance:g}; it was removed"
            )
    log.info("%s: outputs differ by at most %.2g from the network's", target, difference)
    if record:
        write_json(
            source.directory / "compression.json", record | {"file": str(target), "bytes": target.stat().st_size}
        )
    return target


def _difference(task: Any, trained: Trained, exported: "Callable[[Tensor], Tensor]") -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in _BATCHES:
        shape = (batch, trained.channels, *trained.image_size)
        # Not noise alone, which deep networks map to one point: from black to white, and smooth from corner to corner.
        images = torch.rand(shape, generator=generator) * torch.linspace(0, 1, batch + 1)[1:, None, None, None]
        images = images * torch.linspace(0, 1, shape[-1]) * torch.linspace(0, 1, shape[-2])[:, None]
        expected, given = task(images), exported(images)
        scale = max(1.0, float(expected.abs().max()), float(task.largest(images)) if _is_average(task) else 0.0)
        differences = (expected - given).abs().max() / scale
        if not differences.isfinite():
            return float("inf")
        largest = max(largest, float(differences))
    return largest


def _is_average(task: Any) -> bool:
    from lightning_automl.results.averaged import AveragedTask

    return isinstance(task, AveragedTask)


def _facts(task: Any, trained: Trained) -> dict[str, str]:
    described = {"input": "float32 (batch, channels, height, width) in [0, 1]", "probabilities": _meaning(task)}
    facts = {name: getattr(trained, name) for name in ("class_names", "channels", "image_size", "window")}
    if _is_average(task):
        facts |= {"unsure_below": trained.unsure_below, "threshold": trained.threshold}
        facts |= {"temperature": task.temperature, "members": len(task.members)}
        meanings = ", ".join(dict.fromkeys(map(_meaning, task.members)))
        described["averaging"] = (
            f"logits = log(max(mean over members of probabilities, {SMALLEST:g})) / temperature, where the "
            f"probabilities of a member are {meanings} of its logits, and tensors are named members.<number from 0>.*"
        )
    plan = getattr(task, "low_rank", None)
    facts |= {} if plan is None else {"low_rank": plan}
    written = {name: json.dumps(value) for name, value in facts.items()}
    return written | described | {"lightning_automl": __version__}


def _meaning(task: Any) -> str:
    loss = getattr(task, "loss", None)
    return f"{type(loss).__name__}.probabilities" if hasattr(loss, "probabilities") else "softmax"


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of, and log, what they do themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _network(task: Any, with_probabilities: bool) -> "nn.Module":
    from torch import nn

    class Exported(nn.Module):
        """What a file computes: the task's forward pass, and what its loss makes of the logits."""

        def __init__(self) -> None:
            super().__init__()
            self.task = task

        def forward(self, images: "Tensor") -> Any:
            logits = self.task(images)
            if not with_probabilities:
                return logits
            return logits, probabilities(self.task, logits)

    return Exported().eval()


def _program(task: Any, trained: Trained, with_probabilities: bool) -> Any:
    import torch

    images = torch.rand(2, trained.channels, *trained.image_size)
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(
        _network(task, with_probabilities), (images,), dynamic_shapes={"images": {0: batch}}, strict=False
    )


def _write_onnx(task: Any, trained: Trained, path: Path) -> None:
    import onnx
    import torch

    program = torch.onnx.export(
        _program(task, trained, with_probabilities=True),
        input_names=["images"],
        output_names=["logits", "probabilities"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, _facts(task, trained))
    onnx.save(model, str(path))


def _read_onnx(task: Any, path: Path) -> "Callable[[Tensor], Tensor]":
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torch(task: Any, trained: Trained, path: Path) -> None:
    import torch

    file = io.BytesIO()  # on a full disk torch's own writer would end the process
    torch.export.save(_program(task, trained, with_probabilities=False), file, extra_files=_facts(task, trained))
    path.write_bytes(file.getbuffer())


def _read_torch(task: Any, path: Path) -> "Callable[[Tensor], Tensor]":
    import torch

    with path.open("rb") as file:
        module: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return module


def _write_safetensors(task: Any, trained: Trained, path: Path) -> None:
    from safetensors.torch import save

    tensors = {name: tensor.clone().contiguous() for name, tensor in task.state_dict().items()}
    path.write_bytes(save(tensors, _facts(task, trained)))  # save_file would make it readable for its owner alone


def _read_safetensors(task: Any, path: Path) -> "Callable[[Tensor], Tensor]":
    import torch
    from safetensors.torch import load_file

    other = deepcopy(task)
    for tensor in (*other.parameters(), *other.buffers()):
        torch.nn.init.zeros_(tensor)
    other.load_state_dict(load_file(path))
    given: Callable[[Tensor], Tensor] = other
    return given


_FORMATS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "torch": (_write_torch, _read_torch),
    "safetensors": (_write_safetensors, _read_safetensors),
}


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'the format onnx needs {error.name}, which is not installed; pip install "lightning-automl[onnx]"'
        ) from error
