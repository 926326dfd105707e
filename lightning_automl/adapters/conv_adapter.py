"""Conv-Adapter: a small convolutional branch beside or after the frozen blocks of a convolutional network.

Chen et al., *Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets*, CVPR 2024 workshop,
https://arxiv.org/abs/2208.07463 (sections 3.2 and 3.3). The branch is ``up(activation(down(x)))``: ``down`` has the
kernel, stride, padding and dilation of the block that it adapts and sees ``compression`` channels at a time, ``up`` is
a 1 x 1 convolution. A learnable scale per channel, initially 1, multiplies it.

Departures from the released code, and why:

- ``init="zero_up"`` starts ``up`` at zero, so that the adapted network is the pretrained one at the first step; the
  release starts both layers at random, which ``init="paper"`` does too.
- In the conv schemes the branch is added where the adapted convolution ends; the release adds it behind the norm and
  activation that follow, which is only the same where those are in one container with the convolution.
- Norms, on the input of the branch or on the output of the block, are not in the release.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_automl.adapters.anatomy import anatomy
from lightning_automl.adapters.injection import ImageTuner
from lightning_automl.adapters.registration import register
from lightning_automl.adapters.targets import resolve_blocks
from lightning_automl.rundir import UnsupportedError, UserError

log = logging.getLogger(__name__)

Scheme = Literal["conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential"]
AdapterActivation = Literal["relu", "gelu", "silu", "none"]
AdapterNorm = Literal["none", "layer", "group"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "none": nn.Identity(),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "scheme": get_args(Scheme),
    "activation": get_args(AdapterActivation),
    "scale": ("learnable", "fixed"),
    "scale_per": ("channel", "layer"),
    "init": ("zero_up", "paper"),
    "norm": get_args(AdapterNorm),
    "norm_at": ("input", "block"),
}


class ConvAdapterConfig(PeftConfig):
    """What a conv adapter looks like and where it goes.

    Args:
        scheme: ``conv_parallel``: ``y = conv(x) + s * adapter(x)``; ``conv_sequential``: ``y = c + s * adapter(c)``
            with ``c = conv(x)``; ``residual_parallel`` and ``residual_sequential``: the same with a whole block.
        kernel_size: Odd number of pixels; ``None`` takes the block's, in the sequential schemes the next odd one.
        compression: Input channels that each channel of the bottleneck sees, gamma of the paper.
        activation: Between the two layers.
        scale: Whether ``s`` is trained.
        scale_per: One ``s`` a channel or one a layer.
        scale_init: Value of ``s``, at the start if it is trained.
        init: ``zero_up`` leaves the network as it is at the start; ``paper`` does not.
        norm: ``layer`` normalises an image's channels together, ``group`` in up to 8 groups.
        norm_at: ``input``: of the adapter; ``block``: the block's output before the sum. The latter changes the
            pretrained function: :func:`calibrate` it before training, so that it changes little.
        target_modules: ``auto`` is every block that the scheme fits, but the stem; or a regular expression or a list
            of names.
        modules_to_save: What is trained as a whole and saved with the adapter; ``None`` is the head.
        num_classes: Outputs of a new head for this adapter; ``None`` keeps the network's.
        geometry: Input and output channels, kernel, stride, padding, dilation and padding mode of each adapted block,
            by name. Filled when the adapter is added.
        base_digest: Filled likewise, see :func:`~lightning_automl.adapters.base_digest`. When given, the base must
            have it.
        peft_type: The method's name in files.

    Raises:
        UserError: If an argument cannot be, or the adapter could never change anything.
    """

    def __init__(
        self,
        scheme: Scheme = "conv_parallel",
        kernel_size: int | None = None,
        compression: int = 8,
        activation: AdapterActivation = "relu",
        scale: Literal["learnable", "fixed"] = "learnable",
        scale_per: Literal["channel", "layer"] = "channel",
        scale_init: float = 1.0,
        init: Literal["zero_up", "paper"] = "zero_up",
        norm: AdapterNorm = "none",
        norm_at: Literal["input", "block"] = "input",
        target_modules: str | list[str] = "auto",
        modules_to_save: list[str] | None = None,
        num_classes: int | None = None,
        geometry: dict[str, dict[str, Any]] | None = None,
        base_digest: str | None = None,
        peft_type: str = "CONV_ADAPTER",
    ) -> None:
        super().__init__(peft_type=PeftType(peft_type))
        self.scheme = scheme
        self.kernel_size = kernel_size
        self.compression = compression
        self.activation = activation
        self.scale = scale
        self.scale_per = scale_per
        self.scale_init = scale_init
        self.init = init
        self.norm = norm
        self.norm_at = norm_at
        self.target_modules = target_modules
        self.modules_to_save = modules_to_save
        self.num_classes = num_classes
        self.geometry = dict(geometry or {})
        self.base_digest = base_digest
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if not _is_count(self.compression):
            raise UserError(f"compression is {self.compression!r}; it is a number of channels, 1 or more")
        if self.kernel_size is not None and not (_is_count(self.kernel_size) and self.kernel_size % 2):
            raise UserError(
                f"kernel_size is {self.kernel_size!r}; it is an odd number, 1, 3, 5, …, or null for the block's own"
            )
        if self.num_classes is not None and not _is_count(self.num_classes):
            raise UserError(f"num_classes is {self.num_classes!r}; it is a number of labels, or null to keep the head")
        if not abs(self.scale_init) < float("inf"):
            raise UserError(f"scale_init is {self.scale_init}; it is a finite number, such as 1")
        if self.scale_init == 0 and self.init == "zero_up":
            raise UserError(
                "scale_init is 0 and init is 'zero_up', so no gradient would ever reach the adapter; "
                "set scale_init to 1 or init to 'paper'"
            )
        if self.scale_init == 0 and self.scale == "fixed":
            raise UserError(
                "scale is 'fixed' at 0, so the adapter has no effect; set scale_init to 1 or another number"
            )
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise UserError(
                    f"target_modules {self.target_modules!r} is no regular expression ({error}); "
                    "give one, a list of names, or 'auto'"
                ) from error

    def __repr__(self) -> str:
        return f"ConvAdapterConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as they go into a file."""
        arguments = {name: copy.deepcopy(getattr(self, name)) for name in signature(type(self)).parameters}
        tuples = {name: list(value) for name, value in arguments.items() if isinstance(value, tuple)}
        return {**arguments, **tuples, "peft_type": PeftType(self.peft_type).value}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, without the name of the network's class."""
        kwargs.pop("auto_mapping_dict", None)
        super().save_pretrained(save_directory, **kwargs)

    @property
    def parallel(self) -> bool:
        """Whether the adapter sees what the block sees, rather than what it gives."""
        return self.scheme.endswith("_parallel")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class ConvAdapterLayer(nn.Module, BaseTunerLayer):
    """A block with the conv adapters that were put beside or behind it, one of them active at a time.

    What else is asked of it, such as ``out_channels`` of a convolution, is answered by the block. A block may change
    its input in place, as a first ``nn.ReLU(inplace=True)`` does: an adapter beside it then gets a copy of the input.

    Args:
        base_layer: Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height', width')``;
            further arguments are handed on to it.
        name: What the block is called in the network, for messages.
    """

    adapter_layer_names = ("conv_adapter_down", "conv_adapter_up", "conv_adapter_scale", "conv_adapter_norm")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, name: str = "") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        # one level deep, so that peft finds the adapter's name where it takes it out of the keys of a file
        self.conv_adapter_down = nn.ModuleDict()
        self.conv_adapter_up = nn.ModuleDict()
        self.conv_adapter_scale = nn.ParameterDict()
        self.conv_adapter_norm = nn.ModuleDict()
        self.configs: dict[str, ConvAdapterConfig] = {}
        #: Modes (``training``) in which the block was seen to leave its input as it is.
        self._leaves_input: set[bool] = set()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: ConvAdapterConfig, geometry: dict[str, Any]) -> None:
        """Add an adapter, which is active only once it is set.

        Args:
            adapter_name: Replaces one of the same name.
            config: Kept.
            geometry: ``in_channels``, ``out_channels``, ``kernel_size``, ``stride``, ``padding``, ``dilation`` and
                ``padding_mode`` of the block.

        Raises:
            UserError: If ``compression`` does not divide the channels, or no padding fits ``kernel_size``.
        """
        down, up = _branch(config, geometry, self.name)
        channels = up.out_channels
        if config.init == "zero_up":
            nn.init.zeros_(up.weight)
            nn.init.zeros_(cast(Tensor, up.bias))
        self.configs[adapter_name] = config
        self.conv_adapter_down[adapter_name] = down
        self.conv_adapter_up[adapter_name] = up
        if config.scale == "learnable":
            shape = (1, channels if config.scale_per == "channel" else 1, 1, 1)
            self.conv_adapter_scale[adapter_name] = nn.Parameter(torch.full(shape, float(config.scale_init)))
        if config.norm != "none":
            normalised = channels if config.norm_at == "block" else down.in_channels
            self.conv_adapter_norm[adapter_name] = nn.GroupNorm(_groups(config.norm, normalised), normalised)
        reference = next((tensor for tensor in self.base_layer.parameters() if tensor.is_floating_point()), None)
        if reference is not None:
            self._move_to(adapter_name, reference)

    def _move_to(self, adapter_name: str, reference: Tensor) -> None:
        for layers in (self.conv_adapter_down, self.conv_adapter_up, self.conv_adapter_norm):
            if adapter_name in layers and not next(layers[adapter_name].parameters()).is_meta:
                layers[adapter_name].to(reference.device, reference.dtype)
        if adapter_name in self.conv_adapter_scale and not self.conv_adapter_scale[adapter_name].is_meta:
            scale = self.conv_adapter_scale[adapter_name]
            scale.data = scale.data.to(reference.device, reference.dtype)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, trained unless ``inference_mode``; ``[]`` switches all off.

        Raises:
            UserError: If several are named: with an activation in each, their sum is no adapter of its own.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise UserError(f"one conv adapter can be active at a time, not {' and '.join(adapter_names)}; name one")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    @property
    def current(self) -> str | None:
        """The adapter that is at work here, if any."""
        active = self.active_adapters
        return active[0] if active and active[0] in self.configs and not self.disable_adapters else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(batch, in_channels, height, width)`` to what the block gives, plus the scaled adapter.

        Raises:
            UserError: If the two have different shapes.
        """
        name = self.current
        if name is None:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        config = self.configs[name]
        # The block may change x in place, but the adapter's gradient needs x as it was. The block gets x itself, as the
        # rest of the network may count on the change. A compiler cannot watch, but it drops copies that are not needed.
        copied = config.parallel and torch.is_grad_enabled()
        watched = copied and not torch.compiler.is_compiling() and not x.is_inference()
        copied = copied and not (watched and self.training in self._leaves_input)
        version = x._version if watched else 0
        beside = self._adapter(name, config, x.clone() if copied else x) if config.parallel else None
        block: Tensor = self.base_layer(x, *args, **kwargs)
        if watched and x._version == version:
            self._leaves_input.add(self.training)
        kind = block.dtype
        if config.norm != "none" and config.norm_at == "block":
            block = self.conv_adapter_norm[name](_in_precision_of(self.conv_adapter_up[name], block))
        branch = self._adapter(name, config, block) if beside is None else beside
        if branch.shape != block.shape:
            raise UserError(
                f"at {self.name or 'this block'} the adapter gives (channels, height, width) {tuple(branch.shape[1:])} "
                f"and the block {tuple(block.shape[1:])}; choose other target_modules or a sequential scheme"
            )
        scale = self.conv_adapter_scale[name] if config.scale == "learnable" else config.scale_init
        return (block + scale * branch).to(kind)

    def _adapter(self, name: str, config: ConvAdapterConfig, x: Tensor) -> Tensor:
        x = _in_precision_of(self.conv_adapter_up[name], x)
        if config.norm != "none" and config.norm_at == "input":
            x = self.conv_adapter_norm[name](x)
        hidden = _ACTIVATIONS[config.activation](self.conv_adapter_down[name](x))
        return cast(Tensor, self.conv_adapter_up[name](hidden))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "a conv adapter has an activation between its layers, so it cannot be merged into the block; "
            "use or export the network with the adapter in it"
        )

    def unmerge(self) -> None:
        """Not possible either.

        Raises:
            RuntimeError: Always, as it is never merged.
        """
        raise RuntimeError("a conv adapter is never merged, so it cannot be unmerged")


def _in_precision_of(layer: nn.Module, x: Tensor) -> Tensor:
    # Adapters of a half precision network are float32; autocast, if on, casts by itself.
    weight = cast(nn.Conv2d, layer).weight
    return x if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def _groups(norm: str, channels: int) -> int:
    return 1 if norm == "layer" else next(groups for groups in (8, 7, 6, 5, 4, 3, 2, 1) if channels % groups == 0)


def _branch(
    config: ConvAdapterConfig, geometry: dict[str, Any], name: str, device: str | None = None
) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The two convolutions of an adapter (section 3.2), with the initial values of PyTorch."""
    outputs = geometry["out_channels"]
    inputs = geometry["in_channels"] if config.parallel else outputs
    if inputs % config.compression:
        raise UserError(
            f"{name or 'the block'} has {inputs} channels, which compression {config.compression} does not divide; "
            f"give a compression that does, such as {_divisor(inputs, config.compression)}, or other target_modules"
        )
    width = inputs // config.compression
    down = nn.Conv2d(inputs, width, groups=width, **_window(config, geometry, name), device=device)
    return down, nn.Conv2d(width, outputs, 1, device=device)


def _divisor(channels: int, limit: int) -> int:
    return max(number for number in range(1, min(channels, limit) + 1) if channels % number == 0)


def _window(config: ConvAdapterConfig, geometry: dict[str, Any], name: str) -> dict[str, Any]:
    """Kernel, stride, padding, dilation and padding mode, such that the shape is that of the block's output."""
    kernel, stride, padding, dilation = (
        _pair(geometry[key]) for key in ("kernel_size", "stride", "padding", "dilation")
    )
    wanted = kernel if config.kernel_size is None else (config.kernel_size, config.kernel_size)
    if not config.parallel:
        stride = (1, 1)
        wanted = (wanted[0] | 1, wanted[1] | 1)
        padding = (dilation[0] * (wanted[0] // 2), dilation[1] * (wanted[1] // 2))
    else:
        # d * (k' - k) pixels more are seen; half of them on each side keep the output where it is
        extra = [step * (new - old) for step, new, old in zip(dilation, wanted, kernel, strict=True)]
        before, padding = padding, (padding[0] + extra[0] // 2, padding[1] + extra[1] // 2)
        if any(pixels % 2 for pixels in extra) or min(padding) < 0:
            raise UserError(
                f"{name or 'the block'} has a kernel of {kernel[0]} x {kernel[1]} pixels and a padding of "
                f"{before[0]} x {before[1]}, for which kernel_size {config.kernel_size} gives another output size; "
                "leave kernel_size out, or give other target_modules"
            )
    return {
        "kernel_size": wanted,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "padding_mode": geometry["padding_mode"],
    }


def _pair(value: int | Iterable[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


class ConvAdapterModel(ImageTuner):
    """peft's engine for :class:`ConvAdapterConfig`."""

    prefix = "conv_adapter_"
    tuner_layer_cls = ConvAdapterLayer

    def resolve(self, config: Any, network: nn.Module) -> list[str]:
        """The blocks to adapt. Their geometry is filled in, or checked if it comes from a file."""
        if not config.geometry:
            config.geometry = _geometries(config, network)
        _check_places(config.geometry, network)
        return list(config.geometry)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, ConvAdapterLayer) else ConvAdapterLayer(target, current_key)
        layer.update_layer(adapter_name, peft_config, peft_config.geometry[current_key])
        if layer is not target:
            layer.train(target.training)
            setattr(parent, target_name, layer)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # peft's also copies a weight, which a block does not have


def _geometries(config: ConvAdapterConfig, network: nn.Module) -> dict[str, dict[str, Any]]:
    """The blocks to adapt, with their geometry. By ``auto`` those are left out whose channels do not divide."""
    found = anatomy(network)
    blocks = dict(resolve_blocks(network, config.scheme, config.target_modules, found))
    if config.target_modules == "auto":
        channels = {name: block["in_channels" if config.parallel else "out_channels"] for name, block in blocks.items()}
        left_out = [name for name, number in channels.items() if number % config.compression]
        if len(left_out) == len(blocks):
            raise UserError(
                f"compression {config.compression} divides the channels of no block "
                f"({', '.join(f'{name}: {channels[name]}' for name in left_out[:5])}); give a smaller one"
            )
        if left_out:
            log.info(
                "compression %d does not divide the channels of %s, which have no adapter",
                config.compression,
                ", ".join(f"{name} ({channels[name]})" for name in left_out),
            )
        blocks = {name: block for name, block in blocks.items() if name not in left_out}
    for name, block in blocks.items():
        down, up = _branch(config, block, name, device="meta")
        if name not in found.shapes:
            continue
        before, after = (tuple(shape) for shape in found.shapes[name])
        try:
            given = tuple(up(down(torch.empty(1, *(before if config.parallel else after), device="meta"))).shape[1:])
        except RuntimeError as error:  # such as a reflection that is wider than the image
            raise UserError(f"no adapter fits {name}: {error}; choose other target_modules") from error
        if given != after:
            raise UserError(
                f"at {name} the adapter would give (channels, height, width) {given} and the block {after}; "
                "choose other target_modules or a sequential scheme"
            )
    return blocks


def _check_places(places: Iterable[str], network: nn.Module) -> None:
    modules = dict(network.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    names = [name.replace(".base_layer", "") for name in layers]
    for name in places:
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        inner = next((other for other in names if other.startswith(f"{name}.")), None)
        if outer or inner:
            raise UserError(
                f"the adapter would go to {name}, but another one is at {outer or inner} already, "
                f"{'around' if outer else 'within'} it; adapters on one network need the same places or separate ones"
            )
    if missing := [name for name in places if name not in modules]:
        raise UserError(
            f"the network has no {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}, where the adapter goes; "
            "build the architecture that it was made for"
        )


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Start norms on the blocks' outputs from the mean and standard deviation that those have.

    A norm with affine weight 1 and bias 0 would change what the following layers of the pretrained network see. With
    the standard deviation and mean of the block's output, both averaged over images, it changes an image only as far
    as its own two differ from those. The network runs without adapters and in eval mode for this; afterwards modes are
    as before. On several processes the average is over all of them, so each has to call it.

    Args:
        model: A network with conv adapters. Without ``norm_at="block"`` nothing is done.
        batches: Images ``(batch, channels, height, width)``, on the model's device.

    Raises:
        UserError: If there is no batch.
    """
    norms = {
        layer: cast(nn.GroupNorm, layer.conv_adapter_norm[layer.current])
        for layer in model.modules()
        if isinstance(layer, ConvAdapterLayer)
        and layer.current is not None
        and layer.configs[layer.current].norm != "none"
        and layer.configs[layer.current].norm_at == "block"
    }
    if not norms:
        return
    # of each group: sum of means, sum of standard deviations, number of images
    sums = {
        layer: torch.zeros(3, norm.num_groups, dtype=torch.float64, device=norm.weight.device)
        for layer, norm in norms.items()
    }

    def add(layer: ConvAdapterLayer, output: Tensor) -> None:
        norm = norms[layer]
        groups = output.double().reshape(len(output), norm.num_groups, -1)
        deviation = (groups.var(dim=2, correction=0) + norm.eps).sqrt()
        seen = torch.full_like(deviation[0], len(output))
        sums[layer] += torch.stack([groups.mean(dim=2).sum(dim=0), deviation.sum(dim=0), seen])

    hooks = [
        layer.base_layer.register_forward_hook(lambda _block, _inputs, output, layer=layer: add(layer, output))
        for layer in norms
    ]
    try:
        with torch.no_grad(), _plain(model):
            for images in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for layer, norm in norms.items():
        if distributed:
            torch.distributed.all_reduce(sums[layer])
        mean, deviation, images_seen = sums[layer]
        if not images_seen.all():
            raise UserError("there is no batch to calibrate the norms of the conv adapters with; give at least one")
        repeats = norm.num_channels // norm.num_groups
        with torch.no_grad():
            norm.bias.copy_((mean / images_seen).repeat_interleave(repeats))
            norm.weight.copy_((deviation / images_seen).repeat_interleave(repeats))


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Eval mode and no conv adapters, for a while; what requires gradients stays as it is."""
    training = {module: module.training for module in model.modules()}
    layers = {module: module._disable_adapters for module in model.modules() if isinstance(module, ConvAdapterLayer)}
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in layers.items():
            layer._disable_adapters = disabled
        for module, mode in training.items():
            module.training = mode


register("conv_adapter", ConvAdapterConfig, ConvAdapterModel, ConvAdapterModel.prefix)
