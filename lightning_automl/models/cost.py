"""What a network costs: parameters and floating-point operations."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameter_count(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters; shared ones are counted once, buffers not at all.

    Args:
        model: The network.
        trainable_only: Leave out frozen parameters.
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable_only)


def flop_count(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Floating-point operations of the forward pass of one image, in evaluation mode.

    Counts convolutions and matrix products; norms, activations and pools, which cost little, are not counted. A
    multiplication and its addition are **two** operations; papers that count multiply-adds print half of this.

    Args:
        model: The network; its training flags are restored afterwards.
        input_shape: ``(channels, height, width)``, without the batch.
    """
    training = {module: module.training for module in model.modules()}
    like = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        for module, flag in training.items():
            module.training = flag
    return int(counter.get_total_flops())
