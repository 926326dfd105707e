"""What stages of the strategy share: how long one may take, and what becomes of the results of another one."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_automl.auto.clock import Clock


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


def put_aside(place: Path) -> Path:
    """Move what a former plan has left to ``superseded/`` beside it, and return where it is."""
    former = place.parent / "superseded"
    former.mkdir(exist_ok=True)
    aside = former / f"{place.name}-{len(list(former.glob(f'{place.name}-*'))) + 1}"
    return place.rename(aside)
