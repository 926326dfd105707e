"""How far a search is, for people: a bar on a terminal, and words for times."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Show on a terminal how many of ``total`` are done and how long the rest will take; elsewhere nothing.

    Args:
        what: Is counted, in the plural.
        total: How many there will be, if that is known.

    Yields:
        To be called with the number that are done, and words to show beside.
    """
    if not sys.stderr.isatty():
        yield lambda done, words: None
        return
    from rich import get_console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=get_console(), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda done, words: shown.update(task, completed=done, description=words)


class Pace:
    """How long the rest will take, by what was done since the first step, before which there may be other work.

    Args:
        total: How much there is to do.
        done: How much of it was done before.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.total = total
        self.done = done
        self._before = done
        self._started: float | None = None

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        if self._started is None:
            self._started, self._before = time.monotonic(), self.done

    def left(self) -> str:
        """``, about 3 min left``, or "" when that cannot be said."""
        new = self.done - self._before
        if self._started is None or not new or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self._started) / new * (self.total - self.done)
        return f", about {spoken(seconds)} left"


def spoken(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
