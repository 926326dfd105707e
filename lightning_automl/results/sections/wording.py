"""How numbers, times and values are written on a page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def percent(share: float) -> str:
    """A share in [0, 1] as ``97.2 %``."""
    return "unknown" if not math.isfinite(share) else f"{100 * share:.1f} %"


def interval_text(score: tuple[float, float, float]) -> str:
    """What is said of the ends of a score's interval: value, lower and upper end, the ends NaN when there is none."""
    if not math.isfinite(score[1]):
        return "without an interval, since all resamplings agree"
    return f"95 % interval {percent(score[1])} to {percent(score[2])}"


def with_interval(score: tuple[float, float, float]) -> str:
    """A score with the ends of its interval, which are NaN when there is none, for a cell of a table."""
    value, low, high = score
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if math.isfinite(low) else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds as ``1 h 3 min``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def some(names: Sequence[str]) -> str:
    """The first five of a list."""
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def value_text(value: Any) -> str:
    """A value of a config as it is in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if callable(value):
        return getattr(value, "__name__", "…")
    return str(value)


def hardware_text(hardware: Mapping[str, Any]) -> str:
    """Processor, cores, memory and GPUs of an ``environment.json``."""
    gpus = hardware.get("gpus") or []
    device = f"{', '.join(gpus)}; " if gpus else ""
    return f"{device}{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory'] / 2**30:.0f} GiB"


def counted(number: int, noun: str) -> str:
    """``1 trial``, ``1,200 trials``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def joined(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def metric(value: float) -> str:
    """A metric with four decimals, so that several can be compared; as a `number` where these do not fit."""
    return f"{value:.4f}" if 0.001 <= abs(value) < 10 else number(value)


def number(value: float) -> str:
    """A value or a cost, short: four digits, whole numbers whole."""
    if not math.isfinite(value):
        return "unknown"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
