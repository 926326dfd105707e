"""Times as people write them."""

import re

from lightning_automl.rundir import UserError


def seconds_of(key: str, text: str | float | None) -> float | None:
    """Seconds of ``90``, ``90s``, ``30m`` or ``2h``; None of None.

    Args:
        key: What the time is of, for the message.
        text: The time.

    Raises:
        UserError: If it is no time above zero.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(text))
    value = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if value <= 0:
        raise UserError(f"{key} is {text!r}; give a time above zero as 90s, 30m or 2h")
    return value
