"""The numeric precision that is fastest on the machine at hand."""

from typing import Literal

import torch
from torch import nn

Precision = Literal["32-true", "bf16-mixed"]


def fast_precision(model: nn.Module, device: str) -> Precision:
    """Choose bf16 autocast where the hardware has it and where it was measured to be faster, else float32.

    On GPUs: where bf16 is native (compute capability 8.0 and newer). On CPUs: with AMX or AVX-512 BF16 instructions and
    no grouped convolution, whose backward pass is far slower in bf16 there. ``benchmarks/training_overhead`` has the
    measurements. The answer depends on nothing but hardware and network, so that a continued run gets the same.

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
