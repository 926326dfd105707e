"""What an architecture costs: expected operations, parameters or milliseconds as a penalty, and a hard limit."""

from typing import Literal, Any
from torch import Tensor, nn


class ArchitectureCost(nn.Module):
    def __init__(
        self,
        of: Literal["flops", "parameters", "latency"] = "flops",
        weight: float = 0.0,
        target: float | None = None,
        limit: float | None = None,
        table: str | None = None,
    ) -> None:
        super().__init__()

    def prepare(self, model: Any, image_shape: tuple[int, int, int]) -> None:
        raise NotImplementedError

    def expected(self, model: Any) -> Tensor:
        raise NotImplementedError

    def penalty(self, model: Any) -> Tensor:
        raise NotImplementedError

    def of_genotype(self, model: Any, genotype: Any) -> float:
        raise NotImplementedError

    def within_limit(self, model: Any) -> Any:
        raise NotImplementedError
