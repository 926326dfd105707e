"""Load the weights of a network from a file, a run directory or the web, never running code from it."""

import logging
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from lightning_automl.rundir import UserError

log = logging.getLogger(__name__)

#: What wrappers put before the names of a network's tensors: DataParallel, LightningModules, torch.compile, Backbone.
_WRAPPERS = ("module.", "model.", "_orig_mod.", "network.")

#: Parts of the names of tensors in a network with adapters, and in the file of an adapter.
_ADAPTED = re.compile(
    r"\b(base_layer(?=\.(?:weight|bias|in_proj_\w+)$)|original_module\.|modules_to_save\.|base_model\.model\."
    r"|lora_[AB]\.|lora_scale\.|lora_magnitude_vector\.|conv_adapter_(?:down|up|scale|norm)\.)"
)

_loading: ContextVar[bool] = ContextVar("loading", default=True)


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a network and of a file.

    Attributes:
        matched: Names of the network's tensors that were loaded.
        missing: Names of the network's tensors that the file did not fill; they keep the values that they had.
        unused: Names of the file's tensors, as they are in the file, that went nowhere.
    """

    matched: list[str]
    missing: list[str]
    unused: list[str]


@contextmanager
def without_loading() -> Iterator[None]:
    """Build networks inside without their first weights: no file is read, nothing is downloaded.

    For when a checkpoint replaces all weights anyway (testing, classifying, resuming): where the first weights came
    from may be gone by then. It holds for this thread (or task of asyncio) alone.
    """
    token = _loading.set(False)
    try:
        yield
    finally:
        _loading.reset(token)


def is_loading() -> bool:
    """Whether networks load their first weights, that is, whether this is outside :func:`without_loading`."""
    return _loading.get()


def load_weights(model: nn.Module, path: str) -> LoadReport:
    """Load weights into ``model``; nothing happens inside :func:`without_loading`.

    Names are compared without what wrappers put before them, so that the file may be of a wrapped network and ``model``
    the bare one, or the other way round. A classification head for another number of classes is left as it is: its
    names are then both among the missing and among the unused. A first convolution for another number of input channels
    is adapted, see :func:`adapt_channels`. Batch norms' counters of batches, which older files lack and nothing reads,
    are not reported.

    Args:
        model: Network whose tensors are replaced, in place.
        path: A ``.ckpt`` of Lightning, a run directory (its ``checkpoints/best.ckpt``), a ``.safetensors``, a ``.pt``,
            ``.pth`` or ``.th`` with a state dict or ``{"state_dict": …}``, or the http(s) address of one of these
            files, which is downloaded once into torch's hub cache.

    Returns:
        Which names were matched, missing and unused; also logged.

    Raises:
        UserError: If there is no such file, it cannot be read as tensors, or it is of another network.
    """
    if not is_loading():
        return LoadReport([], [], [])
    content = _read(_download(path) if path.startswith(("http://", "https://")) else _find(path))
    names = {_present_name(name): name for name in content}
    given = {present: content[name] for present, name in names.items()}
    own = model.state_dict()
    adapted, known = _adapted(content), _adapted(own)
    if foreign := [name for part, name in adapted.items() if part not in known]:
        raise UserError(
            f"{path} is of a network with adapters (it has {_some(foreign)}); give the weights of the network without "
            "them, or load the adapter with lightning_automl.adapters.load_adapter"
        )
    wrapper = _own_wrapper(own)
    prefix = _common_prefix({name.removeprefix(wrapper) for name in own}, given)
    head = _head(model)
    first = first_convolution(model)
    loaded: dict[str, Tensor] = {}
    used: set[str] = set()
    reshaped: list[str] = []
    for name, value in own.items():
        source = prefix + name.removeprefix(wrapper)
        if source not in given:
            continue
        other = given[source]
        if first is not None and name == f"{first[0]}.weight".removeprefix(".") and _differ_in_channels(value, other):
            log.info("%s: %s adapted from %d to %d channels", path, name, other.shape[1], value.shape[1])
            other = adapt_channels(other, value.shape[1])
        if other.shape == value.shape:
            loaded[name] = other
            used.add(source)
        elif name not in head or other.shape[1:] != value.shape[1:]:
            reshaped.append(f"{name} {tuple(other.shape)} instead of {tuple(value.shape)}")
    if not loaded or reshaped:
        reason = (
            f"tensors of another shape: {_some(reshaped)}"
            if reshaped
            else f"it has {_some(list(content))}, but the network has {_some(list(own))}"
        )
        raise UserError(
            f"{path} is a checkpoint of another network ({reason}); build the network that it was saved from"
        )
    own.update(loaded)  # and not a dictionary of our own: MNASNet refuses one without the version that this one has
    model.load_state_dict(own)
    report = LoadReport(
        matched=list(loaded),
        missing=[name for name in own if name not in loaded and not name.endswith("num_batches_tracked")],
        unused=[name for present, name in names.items() if present not in used],
    )
    partial = set(report.missing) - head
    log.log(
        logging.WARNING if partial else logging.INFO,
        "weights from %s: %d tensors matched, missing: %s, unused: %s",
        path,
        len(report.matched),
        ", ".join(report.missing) or "none",
        ", ".join(report.unused) or "none",
    )
    log.info("matched: %s", _some(report.matched))
    log.debug("all matched: %s", ", ".join(report.matched))  # into log.txt
    return report


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Name and module of the convolution that sees the images, ``None`` if there is none; grouped ones are not."""
    found = next(((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    return found if found is not None and found[1].groups == 1 else None


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Make the weight of a first convolution fit images with another number of channels.

    For one channel the weights are summed: a grey image gives what the same image in grey RGB gave. For more they are
    repeated in turn and scaled by ``inputs / channels``, which keeps the size of the outputs, as timm does.

    Args:
        weight: ``(outputs, inputs, height, width)``.
        channels: Channels of the images.

    Returns:
        ``(outputs, channels, height, width)``.
    """
    inputs = weight.shape[1]
    if channels == inputs:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, [channel % inputs for channel in range(channels)]] * (inputs / channels)


def _differ_in_channels(own: Tensor, given: Tensor) -> bool:
    return (
        own.ndim == given.ndim == 4
        and own.shape[1] != given.shape[1]
        and own.shape[:1] + own.shape[2:] == given.shape[:1] + given.shape[2:]
    )


def _find(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        best = file / "checkpoints" / "best.ckpt"
        if not best.exists():
            raise UserError(
                f"{path} has no checkpoints/best.ckpt; give the directory of a run that has trained, or a file"
            )
        return best
    if not file.exists():
        raise UserError(f"there is no weight file {path}; give an existing file, a run directory or an http(s) address")
    return file


def _download(url: str) -> Path:
    # The name alone is not enough: best.ckpt is everybody's.
    name = Path(urlparse(url).path).name
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256(url.encode()).hexdigest()[:12]}-{name}"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=False)  # written beside and renamed
        except (OSError, ValueError) as error:
            raise UserError(
                f"{url} could not be downloaded ({error}); is this machine offline? give a file that is already here"
            ) from error
    return file


def _read(file: Path) -> dict[str, Tensor]:
    known = (".ckpt", ".safetensors", ".pt", ".pth", ".th")
    if file.suffix not in known:
        raise UserError(f"{file} ends with none of {', '.join(known)}; give a weight file of one of these kinds")
    content: Any
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that meets foreign bytes raises whatever it stumbles over
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{file} holds more than tensors and plain values and is not read, since that would run code from it; "
                "save the state dict alone"
            ) from error
        raise UserError(
            f"{file} cannot be read as weights ({type(error).__name__}); it is damaged, or not what its name says"
        ) from error
    state: Any = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    if "frozen" in content:  # a checkpoint of a PartlyFrozenTask, which lacks what was frozen
        state = _whole(file, state)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no state dict; save model.state_dict(), or a dictionary with it as 'state_dict'")
    return tensors


def _whole(file: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a run has trained, together with what it keeps of the frozen rest of its network."""
    base = file.with_name("base.safetensors")
    if any(".base_model.model." in name for name in state):
        raise UserError(
            f"{file} holds an adapter and not a network; give the file of lightning-automl export --format safetensors"
        )
    if not base.exists():  # nothing was frozen
        return state
    from safetensors.torch import load_file

    return {**load_file(base), **state}


def _present_name(name: str) -> str:
    """The name that torchvision's DenseNets have now; their published files are older than it."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)


def _adapted(names: Iterable[str]) -> dict[str, str]:
    """The parts of names by which tensors of adapters, and of what they are put on, are known; with an example each."""
    found = ((_ADAPTED.search(name), name) for name in names)
    return {part[1]: name for part, name in found if part}


def _own_wrapper(own: Iterable[str]) -> str:
    """The chain of wrappers' names with which all names of the network begin."""
    names, chain = list(own), ""
    while names:
        wrapper = next((part for part in _WRAPPERS if all(name.startswith(chain + part) for name in names)), None)
        if wrapper is None:
            break
        chain += wrapper
    return chain


def _common_prefix(own: set[str], given: Iterable[str]) -> str:
    """The chain of wrappers' names under which most of the network's names are found in the file."""
    found: Counter[str] = Counter()
    for name in given:
        rest = name
        while True:
            if rest in own:
                found[name.removesuffix(rest)] += 1
            wrapper = next((wrapper for wrapper in _WRAPPERS if rest.startswith(wrapper)), None)
            if wrapper is None:
                break
            rest = rest.removeprefix(wrapper)
    return found.most_common(1)[0][0] if found else ""


def _head(model: nn.Module) -> set[str]:
    """The names of the tensors that make the logits: those of the last linear layer, else of the last convolution.

    Those of a network's ``auxiliary_head`` are found in the same way.
    """
    heads: set[str] = set()
    for top, root in (("", model), ("auxiliary_head.", getattr(model, "auxiliary_head", None))):
        for kind in (nn.Linear, nn.Conv2d):
            names = [name for name, module in root.named_modules() if isinstance(module, kind)] if root else []
            if names:
                heads |= {f"{top}{names[-1]}.{part}".removeprefix(".") for part in ("weight", "bias")}
                break
    return heads


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
