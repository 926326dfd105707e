"""What is checked and told about a pruner before a study starts; the pruners are Optuna's."""

import math
from collections.abc import Sequence

from optuna.pruners import BasePruner, HyperbandPruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection

from lightning_automl.rundir import UserError
from lightning_automl.search.samplers.population import PopulationSampler


def check_pruner(
    pruner: BasePruner, directions: Sequence[StudyDirection | str], sampler: BaseSampler | None = None
) -> None:
    """Refuse a pruner that could not judge the trials.

    Args:
        pruner: Of the study.
        directions: One an objective.
        sampler: Of the study.

    Raises:
        UserError: For any pruner but :class:`optuna.pruners.NopPruner` with several objectives, whose intermediate
            values have no order, and with population based training, whose segments are all of one length.
    """
    if isinstance(pruner, NopPruner):
        return
    name = type(pruner).__name__
    if len(directions) > 1:
        raise UserError(
            f"{name} compares one value and the study has {len(directions)} objectives; "
            "give optuna.pruners.NopPruner, or one monitor"
        )
    if isinstance(sampler, PopulationSampler):
        raise UserError(
            f"{name} would stop segments of population based training, which replaces bad members itself; "
            "give optuna.pruners.NopPruner"
        )


def rungs(resource_max: int, eta: int) -> list[list[tuple[int, int]]]:
    """The table of Hyperband: how many configurations are trained for how long.

    Li et al., *Hyperband*, JMLR 18(185), 2018, https://www.jmlr.org/papers/v18/16-558.html (Algorithm 1). In whole
    numbers, as the logarithm of 243 to base 3 is 4.999... in floating point.

    Args:
        resource_max: R, epochs of a whole training, at least 1.
        eta: One of so many configurations survives a rung, at least 2.

    Returns:
        The brackets s = s_max .. 0, each with its rungs ``(configurations, epochs)``. Epochs that are no whole number,
        of an R that is no power of ``eta``, are rounded down.

    Raises:
        UserError: For arguments out of these ranges.
    """
    if resource_max < 1 or eta < 2:
        raise UserError(
            f"Hyperband got {resource_max} epochs and a reduction factor of {eta}; give at least 1 and at least 2"
        )
    largest = _floor_log(resource_max, eta)
    brackets = []
    for s in range(largest, -1, -1):
        configurations = -(-(largest + 1) * eta**s // (s + 1))  # rounded up
        brackets.append([(configurations // eta**i, resource_max // eta ** (s - i)) for i in range(s + 1)])
    return brackets


def hyperband_sentence(pruner: BasePruner) -> str | None:
    """What to tell about a Hyperband pruner that has fewer brackets than the paper's.

    Optuna 5.0.0 takes the floor of a floating-point logarithm. The bracket that is missing is the one without early
    stopping, s = 0.

    Args:
        pruner: Of a study.

    Returns:
        A sentence, or None when there is nothing to tell, as for other pruners and ``max_resource: auto``.
    """
    if not isinstance(pruner, HyperbandPruner) or not isinstance(pruner._max_resource, int):
        return None
    smallest, largest, eta = pruner._min_resource, pruner._max_resource, pruner._reduction_factor
    if smallest < 1 or largest < smallest or eta < 2:  # refused by Optuna with the first report
        return None
    known = _floor_log(largest // smallest, eta) + 1
    made = math.floor(math.log(largest / smallest, eta)) + 1  # optuna/pruners/_hyperband.py
    if made >= known:
        return None
    return (
        f"HyperbandPruner makes {made} brackets of max_resource {largest} with reduction_factor {eta}, not {known}, "
        f"as it rounds a logarithm; give max_resource {largest + 1}"
    )


def _floor_log(number: int, base: int) -> int:
    """The largest power of ``base`` that is not above ``number``, at least 1."""
    power = 0
    while base ** (power + 1) <= number:
        power += 1
    return power
