"""A network that goes wrong in the way that it is told, on the last rank, as trials of a search do."""

import os
import signal
import time

import torch
from torch import nn

FAULTS = ("none", "raise", "nan", "memory", "kill", "exit", "hang")


class FaultyNetwork(nn.Module):
    """One linear layer.

    Args:
        num_classes: Number of logits.
        fault: What happens in the second training step of the last rank.
        width: Must be even, as networks have it with their values.
    """

    def __init__(self, num_classes: int, fault: str = "none", width: int = 2) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width is {width}; it must be even")
        self.linear = nn.Linear(64, num_classes)
        self.fault = fault
        self.steps = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.linear(images.flatten(1))
        self.steps += self.training
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        if self.training and self.steps == 2 and (last or self.fault == "nan"):
            if self.fault == "raise":
                raise RuntimeError("the network broke")
            if self.fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "exit":
                os._exit(0)
            if self.fault == "hang":
                time.sleep(3600)
        return logits * float("nan") if self.fault == "nan" else logits
