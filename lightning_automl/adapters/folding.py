"""Fold batch norms into the layers before them, found by watching a pass instead of by names."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Call:
    """One execution of a layer: what came in and went out; keeping it keeps the identities of tensors unique."""

    name: str
    module: nn.Module
    given: Tensor
    result: Tensor


LAYERS = (nn.Linear, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and attention by its modules instead of one fused call; restored after."""
    flags = {module: module.training for module in network.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    network.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in flags.items():
            module.training = flag


def trace(network: nn.Module, image: Tensor) -> tuple[list[Call], Tensor]:
    """The calls of linear layers, convolutions and batch norms, in order, and the network's outputs."""
    calls: list[Call] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                calls.append(Call(name, module, inputs[0], output))

        return note

    kinds = (*LAYERS, *NORMS)
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with evaluating(network):
            outputs: Tensor = network(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs


def fold_batchnorm(network: nn.Module, image: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """Make batch norms that follow layers a part of these, as evaluation mode computes them.

    A pair is found where a norm is given the very tensor that a layer has returned. Whether something else uses that
    tensor too, or the layer computes more than its weight says, no pass can tell. The pairs are hence folded in
    float64, and, if that changes the network's outputs, once more one by one; each that does is taken back.

    Args:
        network: It stays as it is.
        image: Images ``(batch, channels, height, width)`` that the network takes; values near those of real images.

    Returns:
        A copy with ``nn.Identity`` in the place of the norms (what a norm of timm does behind its norm stays), and the
        names of the layers by those of their norms.
    """
    copied = deepcopy(network)
    types = {name: tensor.dtype for name, tensor in copied.state_dict(keep_vars=True).items()}
    exact = _in_double(copied, image)
    image = image.double() if exact else image
    calls, before = trace(copied, image)
    names = Counter(call.name for call in calls)
    made = {id(call.result): call for call in calls if isinstance(call.module, LAYERS)}
    pairs = [
        (source, call)
        for call in calls
        if isinstance(call.module, NORMS)
        and (source := made.get(id(call.given))) is not None
        and names[call.name] == names[source.name] == 1
    ]
    folded: dict[str, str] = {}

    def attempt(pairs: list[tuple[Call, Call]]) -> bool:
        kept = [(source.module.weight, source.module.bias) for source, _ in pairs]
        done = [fold(copied, source.name, norm.name) for source, norm in pairs]
        with evaluating(copied):
            after: Tensor = copied(image)
        agrees = agree(before, after, 1e-9 if exact else 1e-4)
        for (source, norm), parameters, changed in zip(pairs, kept, done, strict=True):
            if changed and agrees:
                folded[norm.name] = source.name
            elif changed:
                source.module.weight, source.module.bias = parameters
                replace_module(copied, norm.name, norm.module)
        return agrees

    if not attempt(pairs):
        for pair in pairs:
            attempt([pair])
    _restore_types(copied, types, next((kind for kind in types.values() if kind.is_floating_point), torch.float32))
    return copied, folded


def _in_double(network: nn.Module, image: Tensor) -> bool:
    """Make the network float64, unless it computes in a fixed type."""
    kinds = {name: tensor.dtype for name, tensor in network.state_dict(keep_vars=True).items()}
    network.double()
    try:
        with evaluating(network):
            network(image.double())
    except RuntimeError:
        _restore_types(network, kinds, torch.float32)
        return False
    return True


def _restore_types(network: nn.Module, kinds: dict[str, torch.dtype], default: torch.dtype) -> None:
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(kinds.get(name, default))
    for name, buffer in network.named_buffers():  # those that no state dict has
        if name not in network.state_dict(keep_vars=True) and buffer.dtype == torch.float64:
            buffer.data = buffer.data.to(default)


def agree(before: Tensor, after: Tensor, tolerance: float) -> bool:
    """Whether no two values differ by more than a share of the largest."""
    difference = (before - after).abs().max()
    return bool(difference <= tolerance * before.abs().max().clamp_min(1e-30))


def fold(network: nn.Module, layer_name: str, norm_name: str) -> bool:
    """Fold a norm into a layer, in place; False where its kind or its state does not allow it."""
    layer, norm = network.get_submodule(layer_name), network.get_submodule(norm_name)
    assert isinstance(layer, LAYERS)
    assert isinstance(norm, NORMS)
    if "weight" not in layer._parameters or norm.running_mean is None or norm.running_var is None:
        return False
    behind: list[Any] = [getattr(norm, child, None) for child in ("drop", "act")]  # of timm's BatchNormAct2d
    if type(norm) in NORMS:
        rest: nn.Module = nn.Identity()
    elif all(isinstance(child, nn.Module) for child in behind):
        rest = nn.Sequential(*behind)
    else:
        return False
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
        shift = shift if layer.bias is None else shift + layer.bias * scale
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(layer.weight.dtype), layer.weight.requires_grad)
    replace_module(network, norm_name, rest.train(norm.training))
    return True


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of a name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
