"""The network of an :class:`~lightning_automl.results.ensemble.Ensemble`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_automl.results.ensemble import SMALLEST
from lightning_automl.results.network import probabilities


class AveragedTask(nn.Module):
    """The average of members' probabilities, calibrated: ``log(max(p, 1e-12)) / temperature`` is its logits.

    Args:
        members: Tasks: each maps images ``(batch, channels, height, width)``, float in [0, 1] or uint8, to logits, and
            says by ``probabilities`` what they mean, or means their softmax.
        temperature: Above 0.
    """

    def __init__(self, members: Iterable[nn.Module], temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Map images to calibrated logits ``(batch, num_classes)``."""
        scores = [probabilities(member, member(images).float()) for member in self.members]
        return torch.stack(scores).mean(0).clamp_min(SMALLEST).log() / self.temperature

    def probabilities(self, logits: Tensor) -> Tensor:
        """Map calibrated logits to probabilities ``(batch, num_classes)``."""
        return logits.softmax(1)

    @property
    def mergeable(self) -> bool:
        """Whether what :meth:`deployed` gives has no layers of adapters."""
        return all(getattr(member, "mergeable", True) for member in self.members)

    def deployed(self) -> "AveragedTask":
        """The same for use alone: LoRA is merged, so that networks have the layers that they had without."""
        members: list[Any] = list(self.members)
        alone = [member.deployed() if hasattr(member, "deployed") else member for member in members]
        return AveragedTask(alone, self.temperature).train(self.training)

    def largest(self, images: Tensor) -> Tensor:
        """The largest logit of any member, divided by the temperature, a scalar: by it rounding is to be judged.

        The logits of the average are bounded, and those of a member that is very sure are not: an error in these is one
        of the same size there, where it may be a much larger share.
        """
        return torch.stack([member(images).abs().max() for member in self.members]).max() / self.temperature
