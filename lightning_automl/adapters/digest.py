"""A name for the values of a base network, by which an adapter recognises the network that it was trained on."""

from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def inside(layer: Any) -> nn.Module:
    """The module that a layer of peft was put around."""
    module: nn.Module = layer.base_layer
    return module


def base_tensors(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Give the parameters and persistent buffers of a network without its adapters, under the names of the base.

    Args:
        network: Plain, with adapters, or a ``PeftModel``; merged weights are given as they were before the merge.
        prefix: Put before every name.

    Yields:
        Name and tensor (the network's own, not a copy) of all that ``state_dict`` of the plain network has.
    """
    originals: dict[str, Tensor] = {}
    module: Any = network
    while True:
        if isinstance(module, PeftModel):
            module = module.get_base_model()
        elif isinstance(module, BaseTunerLayer):
            originals |= getattr(module, "originals", {})
            module = inside(module)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            break
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, originals.get(name, parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from base_tensors(child, f"{prefix}{name}.")


def base_digest(network: nn.Module, without: Collection[str] = ()) -> str:
    """Hash names, shapes and values of the base network.

    The digest does not depend on adapters, on merging, on the memory layout (``channels_last``), on the device, nor on
    a conversion to a wider type that keeps the values. Counters of batch normalisation, which no output depends on,
    are left out.

    Args:
        network: Plain or with adapters.
        without: Names of modules to leave out, such as the head, which an adapter brings itself.

    Returns:
        32 hexadecimal digits.
    """
    left_out = tuple(f"{name}." for name in without)
    return digest_of(
        (name, tensor)
        for name, tensor in base_tensors(network)
        if not name.startswith(left_out) and not name.endswith("num_batches_tracked")
    )


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes and values of tensors, in 32 hexadecimal digits.

    The order, the device, the memory layout and a conversion to a wider type that keeps the values change nothing.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        values = tensor.detach().cpu().contiguous()
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        elif values.dtype == torch.float64 and torch.equal(values, values.float().double()):
            values = values.float()
        digest.update(f"{name} {tuple(values.shape)} ".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
