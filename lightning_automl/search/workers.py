"""Whose a running trial is, whether its owner still lives, and what becomes of the trials of the dead.

Optuna has heartbeats for ``RDBStorage`` alone, and only inside ``Study.optimize``; a journal and the gRPC proxy have
none. So one mechanism of our own, made of user attributes, serves every storage: ``worker`` says whose a running trial
is, and ``beat`` changes as long as its owner lives. On the same machine the process itself is looked at.

A trial whose owner has died ends in steps, and a process that dies between two of them leaves what the next one
completes:

1. its values are completed, since some samplers cannot do with a part of them;
2. ``epochs``, ``reason``, ``recovered_by`` and ``lost`` are noted while it is running: afterwards nothing can be;
3. it is told to have failed. The storage lets one process alone do that, and that one goes on;
4. a trial with the same values is enqueued that names it in ``retry_of``.

After 1 or 2 the trial is still running without an owner, and all is done again. After 3 it is a lost trial that no
other one names: whoever sees that, and that its ``recovered_by`` is dead, does the fourth step. Should two have done
it, the trial with the smaller number counts, and the other is withdrawn when its turn comes. Lost trials do not count.
"""

import contextlib
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BruteForceSampler, GridSampler
from optuna.trial import FrozenTrial, TrialState

from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import allowing_experiments

log = logging.getLogger(__name__)

#: Seconds between two beats, and of silence after which a worker of another machine is dead.
BEAT = 30.0
SILENCE = 4 * BEAT

#: Attributes that are about one trial, and so are not taken over by the trial that continues it.
_OF_ONE_TRIAL = {"worker", "beat", "epochs", "seconds", "reason", "lost", "retry_of", "directory", "infeasible"}
_OF_ONE_TRIAL |= {"metrics", "recovered_by", "replayed", "withdrawn"}

#: What GridSampler notes about a trial; a trial without it is not of the grid.
_OF_THE_GRID = ("grid_id", "search_space")

#: The searches of this process that are going on: a trial of an earlier one that ended badly has no owner any more.
_SEARCHES: set[str] = set()


# ---- owners


@contextlib.contextmanager
def working() -> Iterator[dict[str, Any]]:
    """Give this process a name as a worker, for as long as a search goes on."""
    token = uuid.uuid4().hex
    _SEARCHES.add(token)
    pid = os.getpid()
    try:
        yield {"host": _host(), "pid": pid, "started": (_process(pid) or ("", ""))[1], "token": token}
    finally:
        _SEARCHES.discard(token)


def lives(worker: Mapping[str, Any]) -> bool | None:
    """Whether a worker's process is alive; ``None`` if it is of another machine or container, with pids of its own."""
    if worker["host"] != _host():
        return None
    found = _process(worker["pid"])
    if found is None or found[0] in "ZX" or found[1] != worker["started"]:  # a zombie is a process that was not buried
        return False
    return worker["pid"] != os.getpid() or worker.get("token") in _SEARCHES


def _host() -> str:
    """A running kernel and, in it, a numbering of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode()}"


def _process(pid: int) -> tuple[str, str] | None:
    """State and start time, which tells a process from a later one with its number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


class Watch:
    """Looks after the signs of life of other workers, by this machine's clock alone, since those of machines differ.

    Args:
        silence: Seconds without a change of ``beat`` after which a worker is dead. It starts when the trial is first
            seen. A trial that nobody has claimed, as a kill in the wrong moment leaves it, is without a sign as well.
        clock: Seconds that only go forward.
    """

    def __init__(self, silence: float = SILENCE, clock: Callable[[], float] = time.monotonic) -> None:
        self.silence = silence
        self.clock = clock
        self._signs: dict[int, tuple[Any, float, bool]] = {}

    def lives(self, trial: FrozenTrial) -> bool | None:
        """Whether the owner of a running trial lives; ``None`` as long as that is not known."""
        worker = trial.user_attrs.get("worker")
        known = None if worker is None else lives(worker)
        return self._hears(trial.number, (worker, trial.user_attrs.get("beat"))) if known is None else known

    def recoverer_lives(self, trial: FrozenTrial) -> bool | None:
        """The same of who has ended a lost trial, and was to enqueue it again."""
        worker = trial.user_attrs.get("recovered_by")
        known = None if worker is None else lives(worker)
        return self._hears(trial.number, ("lost", worker)) if known is None else known

    def _hears(self, number: int, sign: Any) -> bool | None:
        now = self.clock()
        last, since, moved = self._signs.get(number, (sign, now, False))
        if sign != last:
            since, moved = now, True
        self._signs[number] = (sign, since, moved)
        if now - since > self.silence:
            return False
        return True if moved else None


class Pulse:
    """A thread that renews ``beat``, and the progress, of this process's running trials.

    A storage that does not answer for a while is no reason to end: the next beat may come through.

    Args:
        every: Seconds between two beats.
    """

    def __init__(self, every: float = BEAT) -> None:
        self.every = every
        self._trials: dict[int, tuple[optuna.Trial, Callable[[], Mapping[str, Any]]]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def add(self, trial: optuna.Trial, progress: Callable[[], Mapping[str, Any]]) -> None:
        """Beat for a trial from now on; ``progress`` gives the attributes that are noted with each beat."""
        self._trials[trial.number] = trial, progress

    def remove(self, number: int) -> None:
        """Beat no more for a trial."""
        self._trials.pop(number, None)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)  # it may hang in a storage that is gone

    def _run(self) -> None:
        while not self._ended.wait(self.every):
            for number, (trial, progress) in list(self._trials.items()):
                try:
                    for name, value in {"beat": time.time(), **progress()}.items():
                        trial.set_user_attr(name, value)
                except UpdateFinishedTrialError:  # it has ended in between
                    self.remove(number)
                except Exception as error:
                    log.debug("no beat for trial %d: %s", number, error)


# ---- lost trials


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial ended with its worker and not of its own making."""
    return trial.state == TrialState.FAIL and bool(trial.user_attrs.get("lost"))


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts for the limit of trials: it runs, or has ended of its own making."""
    return trial.state != TrialState.WAITING and not is_lost(trial)


def has_values(trial: FrozenTrial) -> bool:
    """Whether all values of a trial of a search have been chosen: then its directory is noted."""
    return "directory" in trial.user_attrs


def goes_through(sampler: optuna.samplers.BaseSampler) -> bool:
    """Whether a sampler visits every point of the space once, so that a point that was not scored has to come again."""
    return isinstance(sampler, GridSampler | BruteForceSampler)


def end_trial(
    study: optuna.Study, trial: optuna.Trial | int, state: TrialState, values: Sequence[float] | None = None
) -> bool:
    """Tell a study how a trial has ended.

    A sampler that has nothing left calls ``study.stop()``, which Optuna refuses outside of ``Study.optimize``; the
    trial has ended nevertheless. The study's user attribute ``exhausted`` then holds the sampler's name.

    Returns:
        Whether this call has ended it; ``False`` if it had ended before.
    """
    try:
        study.tell(trial, values, state)
    except UpdateFinishedTrialError:
        return False
    except ValueError as error:
        if not str(error).startswith("Cannot tell a "):
            raise
        return False
    except RuntimeError as error:
        if "Study.stop" not in str(error):
            raise
        if _has_nothing_left(study, trial if isinstance(trial, int) else trial.number):
            study.set_user_attr("exhausted", type(study.sampler).__name__)
    except KeyError as error:
        # GridSampler 5.0 looks up the place in the grid of a trial that was enqueued and has none, once one is left.
        if error.args != ("grid_id",):
            raise
    return True


def _has_nothing_left(study: optuna.Study, number: int) -> bool:
    """Whether a sampler that calls ``study.stop()`` when this trial has ended is right about it.

    BruteForceSampler takes a value for visited, with all that is below it, when another process is just choosing there.
    Its strict form knows better, and begins running points twice.
    """
    if not isinstance(study.sampler, BruteForceSampler):
        return True
    trial = study.get_trials(deepcopy=False)[number]
    with allowing_experiments():
        strict = BruteForceSampler(avoid_premature_stop=True)
    try:
        strict.after_trial(study, trial, trial.state, trial.values)
    except RuntimeError:
        return True
    return False


def complete(study: optuna.Study, space: Space, trial: FrozenTrial) -> None:
    """Let the sampler choose the values that a running trial lacks, since its owner died while it was asking."""
    if not has_values(trial):
        with contextlib.suppress(UpdateFinishedTrialError):
            space.suggest(optuna.Trial(study, trial._trial_id))


def give_up(
    study: optuna.Study,
    trial: FrozenTrial | optuna.Trial,
    reason: str,
    worker: Mapping[str, Any],
    *,
    progress: Mapping[str, Any] | None = None,
    again: bool = True,
) -> bool:
    """End a running trial as lost.

    Args:
        study: Of the trial.
        trial: As it was last read.
        reason: One sentence.
        worker: Who does this.
        progress: Its ``epochs`` and ``seconds``; from what its beats and reports have left, when left out.
        again: Whether to enqueue it again. Its values must be complete then.

    Returns:
        Whether it was running until now.
    """
    if progress is None:
        progress = {"epochs": _epochs(trial), "seconds": trial.user_attrs.get("seconds", 0.0)}
    attributes: dict[str, Any] = {**progress, "reason": reason, "recovered_by": dict(worker), "lost": True}
    if not again:
        attributes["withdrawn"] = True
    try:
        for name, value in attributes.items():
            # By its id, since an `optuna.Trial` that is made for it would ask the sampler for values.
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
    except UpdateFinishedTrialError:
        return False
    if not end_trial(study, trial.number, TrialState.FAIL):
        return False
    if again:
        _enqueue_again(study, trial.number)
    return True


def recover(study: optuna.Study, space: Space, watch: Watch, worker: Mapping[str, Any]) -> list[int]:
    """End the running trials of dead workers as lost and enqueue them again.

    Args:
        study: Of this and other processes.
        space: Of the study.
        watch: Kept from call to call.
        worker: Who does this.

    Returns:
        Numbers of the trials that were given up here.
    """
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if watch.lives(trial) is not False:
            continue
        complete(study, space, trial)
        if give_up(study, trial, _epitaph(trial, watch.silence), worker):
            found.append(trial.number)
    trials = study.get_trials(deepcopy=False)
    continued = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in trials:
        left = is_lost(trial) and not trial.user_attrs.get("withdrawn") and trial.number not in continued
        if left and watch.recoverer_lives(trial) is False:
            _enqueue_again(study, trial.number)
    return found


def is_repeated(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether a trial continues one that was not lost, or that an earlier trial continues already."""
    number = trial.user_attrs.get("retry_of")
    if number is None:
        return False
    earlier = [each for each in trials if each.number < trial.number and each.user_attrs.get("retry_of") == number]
    return not is_lost(trials[number]) or any(not each.user_attrs.get("withdrawn") for each in earlier)


def _enqueue_again(study: optuna.Study, number: int) -> None:
    trial = next(each for each in study.get_trials(deepcopy=False) if each.number == number)
    inherited = {name: value for name, value in trial.user_attrs.items() if name not in _OF_ONE_TRIAL}
    grid = {name: trial.system_attrs[name] for name in _OF_THE_GRID if name in trial.system_attrs}
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            system_attrs={"fixed_params": trial.params, **grid},  # as `Study.enqueue_trial` does
            user_attrs={**inherited, "retry_of": number},
        )
    )


def _epochs(trial: FrozenTrial | optuna.Trial) -> int:
    """Epochs trained for a trial whose owner cannot be asked: noted by its beat or, newer, its own reports."""
    reports = trial.intermediate_values if isinstance(trial, FrozenTrial) else {}
    reported = len(reports) - int(trial.user_attrs.get("replayed", 0))
    return max(int(trial.user_attrs.get("epochs", 0)), reported)


def _epitaph(trial: FrozenTrial, silence: float) -> str:
    worker = trial.user_attrs.get("worker")
    if worker is None:
        return "lost: its worker died before it could claim it"
    if worker["host"] == _host():
        return f"lost: worker {worker['pid']} died"
    return f"lost: worker {worker['pid']} of another machine gave no sign of life for {silence:g} s"


def alike(reason: str) -> str:
    """A reason without its numbers, by which reasons are counted."""
    return re.sub(r"\d+", "#", reason)
