"""What a network costs: parameters, floating-point operations and time."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    with _evaluating(model), FlopCounterMode(display=False) as counter:
        model(_image(model, input_shape))
    return int(counter.get_total_flops())


def latency(
    model: nn.Module, input_shape: tuple[int, ...], repeats: int = 30, device: torch.device | None = None
) -> float:
    """Milliseconds of the forward pass of one image on the device and with the threads that there are: a median.

    Args:
        model: The network, in evaluation mode meanwhile.
        input_shape: ``(channels, height, width)``, without the batch.
        repeats: Timed passes, after a third as many that are not.
        device: Where the network is; ``None``: where its first parameter is.
    """
    image = _image(model, input_shape, device)
    seconds = []
    with _evaluating(model):
        for turn in range(repeats + repeats // 3):
            start = time.perf_counter()
            model(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            if turn >= repeats // 3:
                seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _image(model: nn.Module, input_shape: tuple[int, ...], device: torch.device | None = None) -> torch.Tensor:
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device if device is None else device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training flags are restored afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
