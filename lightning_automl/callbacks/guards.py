"""Guards against the collapse of an architecture search: they end it, and say which epoch's architecture to take."""

from typing import Any, Literal

from lightning.pytorch import Callback


class SkipStop(Callback):
    """Ends an architecture search when a cell has too many skip connections (DARTS+)."""

    def __init__(
        self, skips: int = 2, kind: Literal["normal", "reduce"] = "normal", patience: int = 1, not_before: int = 10
    ) -> None:
        self.skips, self.kind, self.patience, self.not_before = skips, kind, patience, not_before

    def record(self) -> dict[str, Any]:
        """Name, settings, whether it fired, and a sentence, for ``architecture.json``."""
        raise NotImplementedError


class EigenvalueStop(Callback):
    """Ends an architecture search when the largest eigenvalue of the validation loss's Hessian grows (R-DARTS)."""

    def __init__(
        self, every: int = 1, window: int = 5, factor: float = 1.3, lag: int = 4, not_before: int = 10
    ) -> None:
        self.every, self.window, self.factor, self.lag, self.not_before = every, window, factor, lag, not_before

    def record(self) -> dict[str, Any]:
        """Name, settings, whether it fired, and a sentence, for ``architecture.json``."""
        raise NotImplementedError
