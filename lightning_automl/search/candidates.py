"""What a score gets: values, and the means to report on the way and to learn when to stop."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial

from lightning_automl.rundir import UserError


class Infeasible(ValueError):
    """Raised by a score that refuses the values before it works on them; the text is a sentence for the user.

    The trial is PRUNED and has the constraint ``feasible`` violated, so that samplers avoid its neighbourhood. It is no
    failure.
    """


class TrialFailed(RuntimeError):
    """Raised by a score that failed, with the reason as a sentence; what else it raises is a failure too."""


class Unfinished(RuntimeError):
    """Raised by a score that was stopped before it came to a value: the trial is lost, and tried again."""


class Misconfigured(UserError):
    """Raised by a score when no candidate can ever be scored: it ends the search with its sentence."""


class Limits:
    """When a search has to end, whatever its trials do.

    Args:
        epochs: In all of the study.
        timeout: Seconds from now.
        clock: Seconds that only go forward.
    """

    def __init__(self, epochs: int | None, timeout: float | None, clock: Callable[[], float]) -> None:
        self.epochs = epochs
        self.timeout = timeout
        self.clock = clock
        self.started = clock()
        self.running: dict[int, Candidate] = {}
        self._elsewhere = 0  # epochs of all but the running trials of this process
        self._lock = threading.Lock()

    def reached(self) -> str:
        """Which limit was reached, as a sentence; "" if none."""
        if self.timeout is not None and self.clock() - self.started >= self.timeout:
            return f"stopped: the limit of {self.timeout:g} s was reached"
        with self._lock:
            total = self._elsewhere + sum(candidate.epochs for candidate in self.running.values())
        if self.epochs is not None and total >= self.epochs:
            return f"stopped: the limit of {self.epochs} epochs was reached"
        return ""

    def begin(self, candidate: "Candidate") -> None:
        """Count the epochs of a running candidate as they come."""
        with self._lock:
            self.running[candidate.number] = candidate

    def end(self, candidate: "Candidate") -> None:
        """Keep the epochs of one that has ended."""
        with self._lock:
            self._elsewhere += self.running.pop(candidate.number).epochs

    def recount(self, trials: Sequence[FrozenTrial]) -> None:
        """Take up what the storage knows of all trials, those of other processes too."""
        with self._lock:
            self._elsewhere = sum(
                int(trial.user_attrs.get("epochs", 0)) for trial in trials if trial.number not in self.running
            )


class Candidate:
    """Values to be scored, and what the score says about them on the way. Made by `search`.

    Attributes:
        number: Of the trial.
        values: By name, as ``Space.suggest`` gives them.
        attributes: The trial's user attributes: ``directory``, ``retry_of``, those that it was enqueued with and those
            of the sampler.
        slot: In 0 .. workers - 1, that of no other candidate at the time; devices may be chosen by it.
        interrupted: Set when the search ends in a hurry; what works on the candidate is then to be killed.
        epochs: Trained for it so far.
        counts_itself: Whether epochs are counted by `trained` alone, and not by reports.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        values: dict[str, Any],
        attributes: dict[str, Any],
        slot: int,
        limits: Limits,
        pruning: threading.Lock,
    ) -> None:
        self.number = trial.number
        self.values = values
        self.attributes = attributes
        self.slot = slot
        self.interrupted = threading.Event()
        self.epochs = 0
        self.counts_itself = False
        self.metrics: dict[str, Any] = {}
        self.reports: dict[int, float] = {}
        self.taken = False  # by another process that has heard nothing of this one for long
        self.stopped = ""  # the limit that a report was answered with
        self.pruned_at: int | None = None
        self.trial = trial
        self._limits = limits
        self._pruning = pruning
        self._single = len(trial.study.directions) == 1
        self._replayed = 0
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return round(time.perf_counter() - self._began, 3)

    @property
    def stopping(self) -> str:
        """Why it should end as soon as it can, as a sentence, for scores that cannot report; "" when it should not."""
        if self.taken:
            return "taken over by another process"
        return "interrupted" if self.interrupted.is_set() else self._limits.reached()

    def started(self) -> None:
        """Say that the work begins now, so that ``seconds`` are without what came before."""
        self._began = time.perf_counter()

    def report(self, step: int, value: float, *, last: bool = False) -> bool:
        """Report a value on the way, and ask whether to go on.

        A step that is reported for the first time counts as an epoch, unless the score counts by `trained`. With
        several objectives the value is not kept, as Optuna has no place for it.

        Args:
            step: Epochs or folds done, from 1, increasing.
            value: The objective's value after them.
            last: Whether no step follows, so that there is nothing left to stop.

        Returns:
            Whether to stop now, by raising :class:`optuna.TrialPruned`: the pruner says so, or the search has reached a
            limit.

        Raises:
            FloatingPointError: If the value is not finite.
        """
        value = float(value)
        new = step not in self.reports
        if new and not self.counts_itself:
            self.epochs += 1
        _check_finite(value, f"the value of step {step}")
        if new:
            self._keep(step, value)
        return not last and (self._stops() or self._is_pruned(step))

    def trained(self, value: float | None = None) -> bool:
        """Count an epoch for which there is no report, as when a report is a fold's; from then on reports count none.

        Args:
            value: What it came to; looked at only for whether it is finite.

        Returns:
            Whether to stop now, because the search has reached a limit.

        Raises:
            FloatingPointError: If the value is not finite.
        """
        self.counts_itself = True
        self.epochs += 1
        if value is not None:
            _check_finite(float(value), f"the value of epoch {self.epochs}")
        return self._stops()

    def replay(self, reports: Sequence[tuple[int, float]]) -> None:
        """Report again what the trial had reported that this one continues; it counts no epochs and asks nothing."""
        for step, value in reports:
            if step not in self.reports and math.isfinite(value):
                self._replayed += 1
                try:
                    self.trial.set_user_attr("replayed", self._replayed)
                except UpdateFinishedTrialError:
                    self.taken = True
                self._keep(step, float(value))

    def note(self, **metrics: Any) -> None:
        """Keep further results, as JSON, in the trial's user attribute ``metrics``."""
        self.metrics |= metrics

    def progress(self) -> dict[str, Any]:
        """The attributes that are renewed while it runs."""
        return {"epochs": self.epochs, "seconds": self.seconds}

    def _keep(self, step: int, value: float) -> None:
        self.reports[step] = value
        if self._single:
            try:
                self.trial.report(value, step)
            except UpdateFinishedTrialError:
                self.taken = True

    def _stops(self) -> bool:
        if self.taken or self.interrupted.is_set():
            return True
        self.stopped = self._limits.reached()
        return bool(self.stopped)

    def _is_pruned(self, step: int) -> bool:
        if not self._single:
            return False
        with self._pruning:  # pruners keep what they compute first, as Hyperband its brackets, and know no threads
            pruned = bool(self.trial.should_prune())  # some pruners answer with numpy's, which JSON does not know
        if pruned:
            self.pruned_at = step
        return pruned


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value}")
