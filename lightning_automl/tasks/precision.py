"""The numeric precision that is fastest on the machine at hand."""

from typing import Literal

import torch
from torch import nn

Precision = Literal["32-true", "bf16-mixed"]


def fast_precision(model: nn.Module, device: str) -> Precision:
    """Choose bf16 autocast where the hardware has it and the network gains from it, else float32.

    On GPUs: where bf16 is native (compute capability 8.0 and newer). On CPUs: with AMX or AVX-512 BF16 instructions
    (one and a half times as fast for a ResNet-20 with the latter, ``benchmarks/training_overhead``) and no grouped
    convolution, whose backward pass is slower in bf16 there. The answer depends on nothing but hardware and network,
    so that a continued run gets the same.

    Args:
        model: The network to train.
        device: ``cpu``, ``cuda`` or ``mps``.

    Returns:
        What Lightning's ``Trainer(precision=...)`` takes.
    """
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if device == "cpu":
        units = torch.cpu.get_capabilities()
        grouped = any(isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 for module in model.modules())
        if (units.get("amx_bf16") or units.get("avx512_bf16")) and not grouped:
            return "bf16-mixed"
    return "32-true"
