"""What the sections of a strategy's page call things, and the rule for what may be claimed."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_automl.results.sections.policy_search.verdict import signed
from lightning_automl.results.sections.wording import duration, metric, percent
from lightning_automl.results.strategy import KINDS, StrategyRecord, finite

#: What stages are called, in their order.
STAGES = {
    "look": "look at the data",
    "measure": "measure trainings",
    "plan": "plan",
    "selection": "arms compete",
    "policy_search": "search for a policy",
    "architecture_search": "search for an architecture",
    "comparison": "searched against simple",
    "final": "final trainings",
    "evaluation": "calibration and test",
}

#: What metrics are called, without the name of the split.
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1",
    "loss": "loss",
    "calibration_error": "calibration error",
}


def time_words(seconds: float) -> str:
    """``30 min``, ``1 min 5 s``; what is short stays in one line."""
    text = duration(seconds).removesuffix(" 0 s").removesuffix(" 0 min").replace(".0 s", " s")
    return unbroken(text) if text.count(" ") == 1 else text


def unbroken(text: str) -> str:
    """The same, in one line of a table."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def stage_name(name: str) -> str:
    """What a reader calls a stage."""
    return STAGES.get(name, name.replace("_", " "))


def metric_name(name: str) -> str:
    """``AUROC`` of ``val_auroc``."""
    bare = name.removeprefix("val_").removeprefix("test_")
    return METRICS.get(bare, bare.replace("_", " "))


def cell(value: float) -> str:
    """A metric in a table; empty where it is not known."""
    return metric(value) if math.isfinite(value) else ""


def ends(low: float, high: float) -> str:
    """The ends of an interval, "" where there is none."""
    return f"{metric_or_zero(low)} to {metric_or_zero(high)}" if math.isfinite(low) and math.isfinite(high) else ""


def metric_or_zero(value: float) -> str:
    """With four decimals, zero too."""
    return f"{value:.4f}" if abs(value) < 10 else metric(value)


def mean_recall(value: float, low: float, high: float) -> str:
    """A share with its interval in a sentence."""
    return f"{percent(value)} ({percent(low)} to {percent(high)})" if math.isfinite(low) else percent(value)


def is_better(entry: Mapping[str, Any], maximize: bool) -> bool:
    """Whether a difference may be called better: it says so, and its interval is on the good side of 0."""
    low, high = finite(entry.get("low")), finite(entry.get("high"))
    return bool(entry.get("better")) and (low > 0 if maximize else high < 0)


def is_worse(entry: Mapping[str, Any], maximize: bool) -> bool:
    """Whether the interval is on the bad side of 0."""
    low, high = finite(entry.get("low")), finite(entry.get("high"))
    return high < 0 if maximize else low > 0


def difference_words(entry: Mapping[str, Any], name: str) -> str:
    """``AUROC 0.0123 higher, 95 % interval +0.0020 to +0.0230``."""
    value = finite(entry.get("difference"))
    if not math.isfinite(value):
        return "there are no values to compare"
    low, high = finite(entry.get("low")), finite(entry.get("high"))
    how = f"{name} {metric_or_zero(abs(value))} {'higher' if value > 0 else 'lower'}" if value else f"the same {name}"
    if math.isfinite(low) and math.isfinite(high):
        return f"{how}, 95 % interval {signed(low)} to {signed(high)}"
    return f"{how}, without an interval"


def kind_words(record: StrategyRecord) -> str:
    """What was searched: ``hyper-parameters``, ``an augmentation policy``, ``an architecture``."""
    kind = str(record.comparison.get("kind") or "")
    name = KINDS.get(kind, kind)
    article = "" if kind == "hyper-parameters" else "an " if name[:1] in "aeiou" else "a "
    return f"{article}{name}" if name else "something"
