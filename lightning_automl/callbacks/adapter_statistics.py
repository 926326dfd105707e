"""Watch what adapters add to the blocks that they adapt: sizes and shapes of both outputs, and gradients."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_automl.rundir import UserError, replacing, write_json

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

log = logging.getLogger(__name__)

#: Ratios of standard deviations, adapter to block, outside of which one drowns the other.
USUAL_RATIO = (0.01, 10.0)
#: Of histograms: bins of an eighth of a standard deviation, the middle one around 0.
BINS, BIN_WIDTH = 97, 0.125


def adapter_report(model: nn.Module, batch: Any) -> list[dict[str, Any]]:
    """Compare what each adapter of a network adds with the output of the block that it adapts.

    A pretrained block gives, behind a ReLU, a peak at exactly zero and a tail to the right; a fresh adapter gives
    something symmetric and small. Where one is much larger than the other, the sum is one of them alone: an adapter
    that is drowned learns nothing visible, and one that drowns its block destroys what that had learned.

    With ``x`` the input of an adapted layer, ``block`` is the layer's output without any adapter and ``adapter`` what
    the layer gives more than that, scale included: ``layer(x) - base_layer(x)``, for any peft method. Modes, gradients,
    buffers and random numbers are as before; the network computes in eval mode, in the precision of its weights.

    Args:
        model: A network with adapters, or what contains one; called with the images alone.
        batch: Images ``(batch, channels, height, width)``, or a sequence that begins with them.

    Returns:
        A mapping for each layer with an active adapter, in the order of the network's modules:

        - ``layer``, its name within the network without adapters, and ``kind``, its class there;
        - ``block`` and ``adapter``, each with ``zero_fraction`` (share of exact zeros), ``mean``, ``std``,
          ``skewness``, ``kurtosis`` (the excess: both are 0 for a normal distribution, NaN for a constant) of all
          elements, and ``histogram``: ``shares`` of 97 bins of an eighth of the output's own ``std`` around 0, and the
          shares ``below`` and ``above`` them;
        - ``ratio``, standard deviation of adapter to block; 0 for an adapter that is zero, as at the start;
        - ``scale``, mean of what the adapter's output is multiplied with, or None where there is no such number;
        - ``gradient_norm`` of the adapter's parameters together, or None while they have no gradient.

    Raises:
        UserError: If the network has no adapter, or its adapters are merged or switched off.
    """
    layers = _adapted_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no adapter to report on; add one, or switch to the one it has")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise UserError(f"the adapter of {merged[0]!r} is merged into its weights; unmerge it, then ask for the report")
    disabled = [name for name, layer in layers.items() if layer.disable_adapters]
    if disabled:
        raise UserError(f"the adapter of {disabled[0]!r} is switched off; enable it, then ask for the report")
    images = batch if isinstance(batch, Tensor) else batch[0]
    rows: dict[str, dict[str, Any]] = {}

    def record(name: str, block: Tensor, output: Tensor) -> None:
        if name not in rows:  # of a layer that is used several times, its first time
            of_block, of_adapter = moments(block), moments(output - block)
            rows[name] = {
                "layer": name,
                "kind": type(layers[name].get_base_layer()).__name__,
                "block": of_block,
                "adapter": of_adapter,
                "ratio": _ratio(of_adapter["std"], of_block["std"]),
                "scale": _scale(layers[name]),
                "gradient_norm": _gradient_norm(layers[name]),
            }

    with _undisturbed(model, images.device):
        with _observed(layers, record):
            model(images)
        if len(rows) < len(layers):
            with _UsedWeights({name: layer for name, layer in layers.items() if name not in rows}, record):
                model(images)
    return [rows[name] for name in layers if name in rows]


def moments(values: Tensor) -> dict[str, Any]:
    """Zero fraction, mean, standard deviation, skewness, excess kurtosis and histogram of all elements of a tensor.

    Those of the numbers themselves, not of a population that they are drawn from; of what is not finite NaN.
    """
    flat = values.detach().flatten()
    flat = flat if flat.dtype == torch.float64 else flat.float()
    mean = flat.mean()
    centred = flat - mean
    std = centred.square().mean().sqrt()
    scaled = centred.div_(std)
    square = scaled.square()
    skewness = scaled.mul_(square).mean()
    kurtosis = square.square_().mean() - 3
    zero = 1 - flat.count_nonzero() / max(1, flat.numel())
    found = torch.stack([zero.to(mean.dtype), mean, std, skewness, kurtosis]).tolist()
    unit = found[2] if 0 < found[2] < math.inf else 1.0
    finite = flat if math.isfinite(found[1]) else flat[flat.isfinite()]
    half = BINS // 2 + 1
    bins = (finite / (unit * BIN_WIDTH)).round_().clamp_(-half, half).add_(half).to(torch.uint8)
    shares = torch.bincount(bins, minlength=BINS + 2) / max(1, flat.numel())
    below, *inside, above = (round(share, 6) for share in shares.tolist())
    return {
        **dict(zip(("zero_fraction", "mean", "std", "skewness", "kurtosis"), found, strict=True)),
        "histogram": {"shares": inside, "below": below, "above": above},
    }


def _adapted_layers(model: nn.Module) -> dict[str, "BaseTunerLayer"]:
    """The layers of a network that have an active adapter, by their name in the network without adapters.

    Adapted layers within an adapted layer are a part of it: the output projection of an attention, for instance.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, BaseTunerLayer] = {}
    outer: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(path.startswith(f"{name}.") for name in outer):
            outer.append(path)
            if set(module.active_adapters) & module._get_available_adapters():
                found[path.rpartition("base_model.model.")[2]] = module
    return found


def _trained_parameters(layer: "BaseTunerLayer") -> list[nn.Parameter]:
    """The parameters of a layer's adapters that are trained, with those of adapters within it."""
    assert isinstance(layer, nn.Module)
    from peft.tuners.tuners_utils import BaseTunerLayer

    parameters = {name: each for name, each in layer.named_parameters() if not name.startswith("base_layer.")}
    for path, inner in layer.named_modules():
        if inner is not layer and isinstance(inner, BaseTunerLayer):
            parameters |= {f"{path}.{at}": each for at, each in enumerate(_trained_parameters(inner))}
    return [each for each in {id(each): each for each in parameters.values()}.values() if each.requires_grad]


class AdapterStatistics(Callback):
    """Records each epoch how large adapters are beside the blocks that they adapt, and warns if one drowns the other.

    Each epoch the first images of the first validation batch (without a validation, of the epoch's first training
    batch) go through the network once more, see :func:`adapter_report`; weights are those that are validated. Training
    is what it would be without this callback. Gradient norms are means over the steps of the epoch so far, before
    clipping.

    Writes ``adapter_statistics.json`` after each epoch, with the histograms of the first and of the newest one, and
    ``adapter_outputs.png`` at the end. The records are a part of the checkpoint: a continued run has each epoch once.

    A layer is warned about once, when the ratio of standard deviations, adapter to block, is outside [0.01, 10] at the
    end of an epoch. An adapter that is zero at the start is as it should be and not looked at; one that is still zero
    after an epoch did not learn, and is warned about like others that are too small.

    Args:
        images: At most so many of the batch.
        directory: Where the files go; the trainer's ``default_root_dir``, a run's directory, when left out.

    Raises:
        UserError: If ``images`` is below 1, or when training starts with a network that has no adapter.
    """

    def __init__(self, images: int = 32, directory: str | Path | None = None) -> None:
        if images < 1:
            raise UserError(f"images is {images}; it is the number of images to look at, 1 or more")
        self.images = images
        self.directory = None if directory is None else Path(directory)
        #: One mapping an epoch: ``epoch`` (from 0) and ``layers``, what `adapter_report` gives.
        self.rows: list[dict[str, Any]] = []
        #: Sentences.
        self.warnings: list[str] = []
        self._warned: list[str] = []
        self._norms: Tensor | None = None  # sums over the steps of the epoch, one a layer
        self._steps = 0
        self._batch: Tensor | None = None
        self._layers: dict[str, list[nn.Parameter]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The rows and warnings so far, and the sums of the epoch's gradient norms."""
        norms = None if self._norms is None else self._norms.tolist()
        rows = [dict(row) for row in self.rows]
        return {
            "rows": rows,
            "warnings": list(self.warnings),
            "warned": list(self._warned),
            "norms": norms,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the records of the run that is continued."""
        self.rows, self.warnings, self._warned = (list(state_dict[name]) for name in ("rows", "warnings", "warned"))
        norms = state_dict["norms"]
        self._norms, self._steps = None if norms is None else torch.tensor(norms), state_dict["steps"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters."""
        layers = _adapted_layers(pl_module)
        if not layers:
            raise UserError(
                f"AdapterStatistics watches adapters, and {type(pl_module).__name__} has none; give it an adapter, or "
                "take AdapterStatistics out of trainer.callbacks"
            )
        self._layers = {name: _trained_parameters(layer) for name, layer in layers.items()}
        if self._norms is not None and len(self._norms) != len(layers):
            self._norms, self._steps = None, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the sums of the epoch; an epoch that is continued in its middle has them from the checkpoint."""
        self._norms, self._steps, self._batch = None, 0, None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient norms of this step, without waiting for the device."""
        if not trainer.is_global_zero:
            return
        own = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if not any(id(each) in own for parameters in self._layers.values() for each in parameters):
            return  # of a task with several optimizers, one that trains something else
        norms = _gradient_norms(list(self._layers.values()))
        self._norms = norms if self._norms is None else self._norms.to(norms.device) + norms
        self._steps += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first images where no validation has any."""
        if not trainer.enable_validation and self._batch is None and trainer.is_global_zero:
            self._batch = _images(batch)[: self.images].clone()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the adapters on the first batch."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and batch_idx == dataloader_idx == 0 and trainer.is_global_zero:
            self._record(trainer, pl_module, _images(batch)[: self.images])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known by now."""
        if not trainer.is_global_zero:
            return
        if self._batch is not None:
            self._record(trainer, pl_module, self._batch)
            self._batch = None
        write_json(self._file(trainer, "adapter_statistics.json"), {"epochs": self.rows, "warnings": self.warnings})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the outputs of blocks and adapters."""
        if not trainer.is_global_zero or not self.rows:
            return
        from lightning_automl.plots import adapter_outputs

        with replacing(self._file(trainer, "adapter_outputs.png")) as path:
            adapter_outputs(self.rows).savefig(path, dpi=150, format="png")

    def _file(self, trainer: Trainer, name: str) -> Path:
        return (self.directory or Path(trainer.default_root_dir)) / name

    def _record(self, trainer: Trainer, pl_module: LightningModule, images: Tensor) -> None:
        layers = adapter_report(pl_module, images)
        norms: Sequence[float | None] = [None] * len(self._layers)
        if self._norms is not None and self._steps:
            norms = (self._norms / self._steps).tolist()
        by_name = dict(zip(self._layers, norms, strict=True))
        for layer in layers:
            layer["gradient_norm"] = by_name.get(layer["layer"])
        row = {"epoch": trainer.current_epoch, "layers": layers}
        if self.rows and self.rows[-1]["epoch"] == row["epoch"]:  # several validations within an epoch
            self.rows.pop()
        if len(self.rows) > 1:  # histograms are large: those of the first and of the newest epoch will do
            self.rows[-1] = {**self.rows[-1], "layers": [_without_histograms(each) for each in self.rows[-1]["layers"]]}
        self.rows.append(row)
        self._warn(row)

    def _warn(self, row: Mapping[str, Any]) -> None:
        low, high = USUAL_RATIO
        small = {each["layer"]: each["ratio"] for each in row["layers"] if each["ratio"] < low}
        large = {each["layer"]: each["ratio"] for each in row["layers"] if each["ratio"] > high}
        for found, what in (
            (small, f"is below {low:g}: the block drowns the adapter; more epochs, a larger scale or rate would help"),
            (large, f"is above {high:g}: the adapter drowns its block; lower its scale or its learning rate"),
        ):
            new = {name: ratio for name, ratio in found.items() if name not in self._warned}
            if new:
                shown = ", ".join(f"{name} {ratio:.3g}" for name, ratio in list(new.items())[:3])
                which = f"{len(new)} of {len(row['layers'])} layers ({shown}{', …' if len(new) > 3 else ''})"
                sentence = (
                    f"In epoch {row['epoch'] + 1}, in {which}, the standard deviation of the adapter's output divided "
                    f"by that of its block {what}."
                )
                self.warnings.append(sentence)
                self._warned += new
                log.warning("%s", sentence)


def _images(batch: Any) -> Tensor:
    images: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return images


def _without_histograms(layer: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(layer)
    for part in ("block", "adapter"):
        kept[part] = {name: value for name, value in layer[part].items() if name != "histogram"}
    return kept


def _ratio(adapter: float, block: float) -> float:
    if block > 0 or math.isnan(adapter) or math.isnan(block):
        return adapter / block
    return math.inf if adapter > 0 else 0.0  # a block that is constant


def _gradient_norm(layer: "BaseTunerLayer") -> float | None:
    parameters = _trained_parameters(layer)
    if all(each.grad is None for each in parameters):
        return None
    return float(_gradient_norms([parameters]))


def _gradient_norms(layers: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """The norm of the gradients of each list of parameters together ``(lists,)``; 0 where there is none."""
    gradients = [each.grad for parameters in layers for each in parameters if each.grad is not None]
    sizes = [sum(each.grad is not None for each in parameters) for parameters in layers]
    device = gradients[0].device if gradients else "cpu"
    norms = torch.stack(torch._foreach_norm(gradients)).float() if gradients else torch.zeros(0)
    empty = torch.zeros(1, device=device)
    return torch.stack(torch._foreach_norm([part if len(part) else empty for part in torch.split(norms, sizes)]))


def _scale(layer: "BaseTunerLayer") -> float | None:
    """Mean of a layer's learned scale, else its fixed one, over the active adapters."""
    assert isinstance(layer, nn.Module)
    active = set(layer.active_adapters)
    learned = [
        each.detach().float().mean()
        for name, each in layer.named_parameters()
        if "scale" in name.split(".")[0] and name.rpartition(".")[2] in active
    ]
    if learned:
        return float(torch.stack(learned).mean())
    fixed = getattr(layer, "scaling", None)
    values = [float(fixed[name]) for name in active if name in fixed] if isinstance(fixed, Mapping) else []
    return sum(values) / len(values) if values else None


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients, autocast and compilation; afterwards all modes and random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of attention rounds otherwise than the one that adapted attention takes.
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modes:  # not eval(), which classes override
            module.training = False
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            # A compiled network does not see hooks that were added since.
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _observed(layers: Mapping[str, "BaseTunerLayer"], record: Any) -> Iterator[None]:
    """Call ``record(name, block, output)`` whenever a layer is called."""
    blocks: dict[str, Tensor] = {}
    handles = []

    def before(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Copies, as a block may begin with an operation in place.
            args, kwargs = _copied((args, kwargs), {})
            with _without_adapters(layer):
                blocks[name] = _first(layer.base_layer(*args, **kwargs)).clone()  # type: ignore[operator]

        return hook

    def behind(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            record(name, blocks.pop(name), _first(output))

        return hook

    try:
        for name, layer in layers.items():
            assert isinstance(layer, nn.Module)
            handles.append(layer.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(behind(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _UsedWeights(TorchFunctionMode):
    """Calls ``record`` for layers that are never called and whose weight is used all the same.

    torchvision's Swin transformers hand ``qkv.weight`` to a function. Which layer a weight is of is seen by its values.
    """

    def __init__(self, layers: Mapping[str, "BaseTunerLayer"], record: Any) -> None:
        weights = {name: getattr(layer, "weight", None) for name, layer in layers.items()}
        self.weights = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        self.layers = layers
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("linear", "conv2d"):
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            for name, known in self.weights.items():
                if known.shape == weight.shape and torch.equal(known, weight):
                    base = self.layers[name].get_base_layer().weight
                    if len(args) > 1:
                        block = func(args[0], base, *args[2:], **kwargs)
                    else:
                        block = func(*args, **(kwargs | {"weight": base}))
                    self.record(name, block, output)
                    del self.weights[name]
                    break
        return output


@contextlib.contextmanager
def _without_adapters(layer: nn.Module) -> Iterator[None]:
    """Switch off adapters within a layer, without touching what is trained as peft's own switch does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = [each for each in layer.modules() if isinstance(each, BaseTunerLayer)]
    before = [each._disable_adapters for each in inner]
    try:
        for each in inner:
            each._disable_adapters = True
        yield
    finally:
        for each, disabled in zip(inner, before, strict=True):
            each._disable_adapters = disabled


def _copied(values: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(values, Tensor):  # attention computes otherwise when query, key and value are one tensor
        return copies.setdefault(id(values), values.clone())
    if isinstance(values, Mapping):
        return {name: _copied(value, copies) for name, value in values.items()}
    return tuple(_copied(value, copies) for value in values) if isinstance(values, tuple) else values


def _first(output: Any) -> Tensor:
    """The tensor of an output; attention gives it with its weights."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found
