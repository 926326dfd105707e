"""The seconds that a directory's commands have taken together, whatever ended them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lightning_automl.rundir import DiskFullError, read_json, write_json

#: Seconds between two writes: a command that is killed loses as much at most.
EVERY = 1.0


class Clock:
    """Counts the wall time of a directory's commands; a context manager.

    ``progress.json`` holds ``seconds``, ``stages`` (seconds of each by name) and ``cuts`` (by name of the stage, a
    sentence that says what was left out because the time ran short). A thread writes it about every second, so that
    after ``kill -9`` the next command knows what was spent, and what was cut stays cut.

    Args:
        directory: Where ``progress.json`` is.
        budget: Seconds for all commands together.
        since: When this command began, as ``now`` tells; by default when the block is entered.
        now: Seconds that only go forward.
        every: Seconds between two writes.
    """

    def __init__(
        self,
        directory: Path,
        budget: float,
        *,
        since: float | None = None,
        now: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ) -> None:
        self.budget = budget
        self._path = directory / "progress.json"
        self._since = since
        self._now = now
        self._every = every
        self._started: float | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)
        self._before = 0.0
        self._stages: dict[str, float] = {}
        self._stage: tuple[str, float] | None = None
        self._cuts: dict[str, str] = {}
        self._load()

    def spent(self) -> float:
        """Seconds so far, those of former commands with them."""
        return self._before + (0.0 if self._started is None else self._now() - self._started)

    def left(self) -> float:
        """Seconds of the budget that are left; below 0 when it is overdrawn."""
        return self.budget - self.spent()

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage so far, in the order in which they began."""
        with self._lock:
            return self._stages_now()

    @property
    def cuts(self) -> dict[str, str]:
        """What was left out for lack of time: a sentence by name of the stage."""
        with self._lock:
            return dict(self._cuts)

    def cut(self, stage: str, sentence: str) -> None:
        """Note what a stage leaves out; it holds for later commands too, until :meth:`forget_cuts`."""
        with self._lock:
            self._cuts[stage] = sentence
        self.write()

    def forget_cuts(self) -> None:
        """Begin without cuts, as with a longer budget."""
        with self._lock:
            self._cuts.clear()
        self.write()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside also as that of a stage; a stage that goes on adds up. Stages do not overlap."""
        with self._lock:
            self._stages.setdefault(name, 0.0)
            self._stage = name, self._now()
        try:
            yield
        finally:
            with self._lock:
                self._stages = self._stages_now()
                self._stage = None
            self.write()

    def write(self) -> None:
        """Keep the state of this moment."""
        with self._lock:
            state: dict[str, Any] = {"seconds": round(self.spent(), 3)}
            state["stages"] = {name: round(seconds, 3) for name, seconds in self._stages_now().items()}
            state["cuts"] = dict(self._cuts)
            write_json(self._path, state)

    def __enter__(self) -> Self:
        self._load()  # the directory may have been another command's until now
        self._started = self._now() if self._since is None else self._since
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.write()
        except OSError:  # a full disk is what is being reported
            if error is None:
                raise
        self._before, self._started = self.spent(), None

    def _load(self) -> None:
        state = read_json(self._path) or {}
        self._before = float(state.get("seconds", 0.0))
        self._stages = dict(state.get("stages", {}))
        self._cuts = dict(state.get("cuts", {}))

    def _stages_now(self) -> dict[str, float]:
        stages = dict(self._stages)
        if self._stage is not None:
            name, since = self._stage
            stages[name] += self._now() - since
        return stages

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            with contextlib.suppress(DiskFullError):  # who does the work will meet it too, and say so
                self.write()
