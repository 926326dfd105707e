"""The mathematics of searching an architecture by gradients: a virtual step on the weights, and what alphas follow.

Nothing here waits for the device: learning rates are Python numbers, norms stay where they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from lightning_automl.rundir import UserError

#: A direction in weight space that is shorter than this is none.
_SHORTEST = 1e-12
#: Length of the step of the finite difference.
_LENGTH = 0.01


class Gradient(Protocol):
    """The gradient of a loss at the weights as they are now."""

    def __call__(self, parameters: Sequence[Tensor], *, exact: bool = False) -> Sequence[Tensor | None]:
        """The gradient, averaged over ranks; ``None`` for parameters that the loss does not depend on.

        Args:
            parameters: With respect to what.
            exact: Without the reduced precision of autocast, for a difference of two gradients.
        """


class VirtualStep(NamedTuple):
    """A step that an optimizer would do: ``w' = w - rate * (gradient + decay * w) - drift``."""

    rates: list[float]
    decays: list[float]
    drifts: list[Tensor | None]

    def __call__(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Do the step on the weights in place; a weight without a gradient stays, as with the optimizer itself."""
        moved = [number for number, gradient in enumerate(gradients) if gradient is not None]
        if not moved:
            return
        places = [weights[number] for number in moved]
        steps = [gradient for gradient in gradients if gradient is not None]
        # a new list: the gradients may be needed again
        steps = list(torch._foreach_mul(steps, [self.rates[number] for number in moved]))
        shrunk = torch._foreach_mul(places, [self.rates[number] * self.decays[number] for number in moved])
        torch._foreach_add_(steps, shrunk)
        for step, number in zip(steps, moved, strict=True):
            drift = self.drifts[number]
            if drift is not None:
                step.add_(drift)
        torch._foreach_sub_(places, steps)


def virtual_step(optimizer: Optimizer) -> VirtualStep:
    """The next step of SGD, as the released code of DARTS takes it: momentum buffer and weight decay included.

    Args:
        optimizer: Its parameters in the order of its groups are the weights. A momentum buffer is read, not changed;
            before the first step there is none.

    Raises:
        UserError: If the optimizer is not SGD: the steps of others are not linear in the gradient.
    """
    if not isinstance(optimizer, SGD) or any(group["maximize"] for group in optimizer.param_groups):
        name = type(optimizer).__name__ + ("(maximize=True)" if isinstance(optimizer, SGD) else "")
        raise UserError(
            f"unrolled looks one step of the weights' optimizer ahead, which is known for torch.optim.SGD (momentum, "
            f"dampening, nesterov, weight_decay) but not for {name}; take SGD, or set unrolled to false"
        )
    step = VirtualStep([], [], [])
    for group in optimizer.param_groups:
        rate, momentum = float(group["lr"]), float(group["momentum"])
        for parameter in group["params"]:
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            # b' = momentum b + fresh g, where b' = g in the first step; the step is b', or g + momentum b' (nesterov).
            fresh = 1.0 if buffer is None else 1 - float(group["dampening"])
            of_gradient, of_buffer = fresh, momentum
            if group["nesterov"]:
                of_gradient, of_buffer = 1 + momentum * fresh, momentum**2
            step.rates.append(rate * of_gradient)
            step.decays.append(float(group["weight_decay"]))
            step.drifts.append(None if buffer is None else buffer * (rate * of_buffer))
    return step


def begin_momentum(optimizer: Optimizer) -> None:
    """Give fused SGD its momentum buffers, zeros, before the first step; without dampening the steps are the same.

    By itself (torch 2.14) it fails when some weights get their first gradient later than others, as sampled operations
    do, and keeps uninitialised memory as momentum when a scaler for fp16 skips the first step.

    Raises:
        UserError: If fused SGD has dampening, with which the first step is another.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"]:
            if group["dampening"]:
                raise UserError("fused SGD with dampening fails on operations that are sampled; set fused to false")
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def unrolled_gradient(
    alphas: list[Tensor],
    weights: list[Tensor],
    step: VirtualStep,
    train_gradient: Gradient,
    arch_gradient: Gradient,
) -> list[Tensor]:
    """Gradient of ``L_arch(w'(alpha), alpha)`` with respect to alpha, ``w'`` one step on ``L_train`` ahead.

    Liu, Simonyan and Yang, ICLR 2019, https://arxiv.org/abs/1806.09055 (equations 7 and 8). With ``v`` the gradient of
    ``L_arch`` at ``w'`` and ``eps = 0.01 / |v|``, the product of second derivatives is that of a finite difference,
    ``(d L_train(w + eps v) / d alpha - d L_train(w - eps v) / d alpha) / (2 eps)``. Where parameter groups have
    different rates, ``v`` is weighted by them, so that the formula holds. For ``|v| < 1e-12`` the product is zero (the
    released code divides by zero). The weights are put back from a copy, bit for bit.

    Args:
        alphas: Architecture parameters.
        weights: What ``step`` moves; the same tensors are what the losses use.
        step: The step that is looked ahead.
        train_gradient: Gradient of the training loss.
        arch_gradient: Gradient of the loss of the architecture.

    Returns:
        One tensor for each of ``alphas``.
    """
    with torch.no_grad():
        saved = [weight.clone() for weight in weights]
        try:
            step(weights, train_gradient(weights))
            found = arch_gradient([*alphas, *weights])
            own, towards = filled(found[: len(alphas)], alphas), found[len(alphas) :]
            largest = max(map(abs, step.rates), default=0.0)
            if not largest:
                return own
            moved = [number for number, gradient in enumerate(towards) if gradient is not None]
            if not moved:
                return own
            starts = [saved[number] for number in moved]
            places = [weights[number] for number in moved]
            directions = torch._foreach_mul(
                [gradient for gradient in towards if gradient is not None],
                [step.rates[number] / largest for number in moved],
            )
            length = torch.nn.utils.get_total_norm(directions)
            nothing = length < _SHORTEST  # False for NaN, which is let through: a scaler for fp16 finds it
            epsilon = torch.where(nothing, torch.zeros_like(length), _LENGTH / length)
            torch._foreach_copy_(weights, saved)
            ends = []
            for sign in (1, -1):
                shifts = torch._foreach_mul(directions, sign * epsilon)
                torch._foreach_copy_(places, torch._foreach_add(starts, shifts))
                ends.append(filled(train_gradient(alphas, exact=True), alphas))
        finally:
            torch._foreach_copy_(weights, saved)
        scale = torch.where(nothing, torch.zeros_like(length), largest * length / (2 * _LENGTH))
        return [
            gradient - scale.to(gradient.dtype) * (plus - minus)
            for gradient, plus, minus in zip(own, *ends, strict=True)
        ]


def filled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the place of gradients that there are not."""
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


@contextmanager
def untouched_buffers(network: nn.Module) -> Iterator[None]:
    """Let forward passes leave all buffers of a network as they are; what a pass computes is the same.

    Batch norms do not track in the meantime, which costs nothing; other buffers are put back.
    """
    tracking: list[_BatchNorm] = []
    others: list[Tensor] = []
    for module in network.modules():
        if not isinstance(module, _BatchNorm):
            others.extend(buffer for buffer in module.buffers(recurse=False))
        elif module.track_running_stats and module.training:
            tracking.append(module)
    copies = [buffer.clone() for buffer in others]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        with torch.no_grad():
            for buffer, copy in zip(others, copies, strict=True):
                buffer.copy_(copy)


def world_size() -> int:
    """Number of processes that search together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Averages over all ranks, by one exchange; without others the tensors themselves."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = torch.split(flat / world_size(), [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def buffers_of_first_rank(network: nn.Module) -> None:
    """Give all ranks the buffers that rank 0 has, such as the running statistics of its share of the images."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch.distributed.broadcast(flat, src=0)
    parts = torch.split(flat, [buffer.numel() for buffer in buffers])
    with torch.no_grad():
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def shares(counts: Sequence[int], device: torch.device) -> Sequence[Tensor | float]:
    """What to multiply each of this rank's losses by, so that the mean over ranks is that of all images together.

    Args:
        counts: Images of each of the batches of this rank.
        device: Where the losses are.
    """
    if world_size() == 1:
        return [count / sum(counts) for count in counts]
    # in float64 where there is one, since losses may be
    total = torch.tensor(float(sum(counts)), device=device, dtype=None if device.type == "mps" else torch.float64)
    torch.distributed.all_reduce(total)
    return [count * world_size() / total for count in counts]
