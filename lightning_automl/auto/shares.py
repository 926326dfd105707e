"""What stages of the strategy share: how long one may take, a config in all its words, what becomes of old results."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_automl.auto.clock import Clock
    from lightning_automl.studies.workers import Workers


def seconds_for(stage: str, plan: Mapping[str, Any], clock: "Clock") -> float:
    """Seconds that a stage may take from now: what is left of the budget, without what is planned for later stages.

    So a stage has what former ones have left over, and one that goes on after a kill has no more than before.

    Args:
        stage: Its name in the plan's ``stages``.
        plan: The plan.
        clock: Knows how much time is left.

    Returns:
        0 or less when its time is over.
    """
    names = [each["name"] for each in plan["stages"]]
    later = plan["stages"][names.index(stage) + 1 :]
    return clock.left() - sum(float(each["seconds"]) for each in later)


def resolved(workers: "Workers", what: str, config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A ``fit`` config with all its defaults, as a process of the trial server reads it.

    Args:
        workers: Ask it.
        what: To call it in messages.
        config: The config.
        file: Where it is written for that, a ``.yaml``; beside it, ``.txt``, is what the process prints.

    Raises:
        UserError: If it is refused.
    """
    payload: dict[str, Any] = {"do": "check", "file": str(file), "configs": [config], "built": []}
    whole: dict[str, Any] = workers.do(what, payload, file.with_suffix(".txt"))["resolved"][0]
    return whole


def put_aside(place: Path) -> Path:
    """Move what a former plan has left to ``superseded/`` beside it, and return where it is."""
    former = place.parent / "superseded"
    former.mkdir(exist_ok=True)
    aside = former / f"{place.name}-{len(list(former.glob(f'{place.name}-*'))) + 1}"
    return place.rename(aside)
