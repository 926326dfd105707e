"""The loop of a search: ask a study's sampler for values, score them, tell the study; as often as the limits allow.

    storage, _ = open_storage(None, Path("."))
    space = Space.parse({"x": {"float": [-5, 5]}})
    study, _ = open_study("parabola", storage, ["minimize"], TPESampler(seed=0), None, space=space)
    search(study, space, lambda candidate: (candidate.values["x"] - 1) ** 2, trials=50)

Any sampler, pruner and storage of Optuna works. The same search in several processes, on one or more machines, shares
the work: the limits of trials and epochs are those of the study. A process may be killed at any moment; the same call
goes on, and what was running is tried again (see ``workers.py``).
"""

import hashlib
import json
import logging
import math
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, GridSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_automl.mistakes import one_sentence
from lightning_automl.rundir import ToldError, UserError
from lightning_automl.rundir import differences as config_differences
from lightning_automl.search.candidates import Candidate, Infeasible, Limits, Misconfigured, TrialFailed, Unfinished
from lightning_automl.search.spaces import Space, differences
from lightning_automl.search.storages import is_disk_full, telling_full_disks
from lightning_automl.search.workers import (
    BEAT,
    SILENCE,
    Pulse,
    Watch,
    alike,
    complete,
    counts,
    end_trial,
    give_up,
    goes_through,
    has_values,
    is_lost,
    is_repeated,
    recover,
    working,
)

__all__ = ["Candidate", "Infeasible", "Misconfigured", "StudyFailed", "TrialFailed", "Unfinished"]
__all__ += ["derived_seed", "identifier", "open_study", "search"]

log = logging.getLogger(__name__)

#: User attribute of a study of ours: its space and identity, in one piece, so that nobody sees a half of it.
_DESCRIPTION = "lightning_automl"

#: A search ends when of so many trials of its own all have failed, or of so many more than half.
_ALL_FAILED = 4
_MOST_FAILED = 10

#: Seconds to wait for another process to choose the values of a trial, which takes milliseconds.
_CHOOSING = 10.0

Score = Callable[[Candidate], float | Sequence[float]]


class StudyFailed(ToldError):
    """Too many trials failed, or none was scored; the text has the number and the commonest reason."""


@runtime_checkable
class _Paced(Protocol):
    """A sampler that knows whether it has a use for a trial now, as that of population based training."""

    def wanted(self, study: optuna.Study) -> bool: ...

    def finished(self, study: optuna.Study) -> bool: ...


def open_study(
    name: str,
    storage: BaseStorage,
    directions: Sequence[str],
    sampler: BaseSampler,
    pruner: BasePruner | None,
    *,
    space: Space,
    identity: Mapping[str, Any] | None = None,
    patience: float = 10.0,
) -> tuple[optuna.Study, bool]:
    """Make a study, or join the one of this name after a look at whether it is the same search.

    Args:
        name: Of the study. Hyperband derives from it in which bracket a trial is.
        storage: Of :func:`~lightning_automl.search.storages.open_storage`.
        directions: ``minimize`` or ``maximize``, one for each objective.
        sampler: Chooses the values.
        pruner: Stops trials early; ``None`` for none, unlike in Optuna, where it is the median pruner.
        space: Of the values.
        identity: What else must be the same for all who join, as JSON: a digest of the run's config, the monitors.
        patience: Seconds to wait for another process that has just made the study to describe it.

    Returns:
        The study, and whether it was made here.

    Raises:
        UserError: If there is a pruner and more than one objective, a study of this name is not ours, or its space,
            directions or identity differ; the sentence shows the difference.
    """
    if unknown := sorted(set(directions) - {"minimize", "maximize"}):
        raise UserError(f"unknown direction {unknown[0]!r}; known: minimize, maximize")
    if not directions:
        raise UserError("the study has no objective; give at least one direction, minimize or maximize")
    if len(directions) > 1 and pruner is not None and not isinstance(pruner, NopPruner):
        raise UserError(
            f"{type(pruner).__name__} compares one value and the study has {len(directions)} objectives; "
            "leave the pruner out, or give one monitor"
        )
    pruner = pruner or NopPruner()
    own = json.loads(json.dumps({"space": space.describe(), "identity": dict(identity or {}), "id": uuid.uuid4().hex}))
    with telling_full_disks():
        try:
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                directions=[StudyDirection[each.upper()] for each in directions],
                sampler=sampler,
                pruner=pruner,
            )
        except DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        else:
            study.set_user_attr(_DESCRIPTION, own)
            return study, True
        stored = _description(study, patience)
        if stored is None and study.get_trials(deepcopy=False):
            raise UserError(f"the study name {name!r} is in use by another study in this storage; give another name")
        if stored is None:  # whoever made it was killed before it could describe it
            study.set_user_attr(_DESCRIPTION, own)
            stored = study.user_attrs[_DESCRIPTION]
        _compare(name, [each.name.lower() for each in study.directions], stored, list(directions), own)
    return study, False


def identifier(study: optuna.Study) -> str:
    """What no other study has, of whatever name and storage."""
    return str(study.user_attrs[_DESCRIPTION]["id"])


def _description(study: optuna.Study, patience: float) -> dict[str, Any] | None:
    deadline = time.monotonic() + patience
    while True:
        found: dict[str, Any] | None = study.user_attrs.get(_DESCRIPTION)
        # Trials are asked for after the description only, so with trials and without it it is somebody else's.
        if found is not None or time.monotonic() >= deadline or study.get_trials(deepcopy=False):
            return found or study.user_attrs.get(_DESCRIPTION)
        time.sleep(0.05)


def _compare(
    name: str, stored_directions: list[str], stored: Mapping[str, Any], directions: list[str], own: Mapping[str, Any]
) -> None:
    if sentence := differences(stored["space"], own["space"]):
        raise UserError(sentence)
    before = {"directions": stored_directions, **stored["identity"]}
    for key, (old, new) in config_differences(before, {"directions": directions, **own["identity"]}).items():
        raise UserError(
            f"study {name!r} was started with {key}={old!r}, now it is {new!r}; "
            "give the former value to continue it, or another name or directory to start anew"
        )


def derived_seed(seed: int, existing_trials: int, process_token: str = "") -> int:
    """A sampler's seed for a process that joins or continues a study, which must not draw the same values again.

    Args:
        seed: Of the search.
        existing_trials: Number of trials that the study has already.
        process_token: Tells apart processes that start at once; "" for the one that made the study.

    Returns:
        In [0, 2**32). ``seed`` itself for the first process of a new study; else a mix, the same on every machine.
    """
    if existing_trials == 0 and not process_token:
        return seed
    digest = hashlib.blake2b(f"{seed} {existing_trials} {process_token}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def search(
    study: optuna.Study,
    space: Space,
    score: Score,
    *,
    trials: int | None = None,
    epochs: int | None = None,
    timeout: float | None = None,
    workers: int = 1,
    enqueue: Sequence[Mapping[str, Any]] = (),
    directory_of: Callable[[int], str] = "trials/{:04d}".format,
    on_change: Callable[[FrozenTrial], Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    beat: float = BEAT,
    silence: float = SILENCE,
    patience: float = 30.0,
) -> optuna.Study:
    """Score candidates until a limit is reached or the sampler has nothing left.

    The study is asked and told in the calling thread, one trial after the other, so that with one worker a seed gives
    one list of values; scores run in threads.

    A trial is COMPLETE with what the score returns; PRUNED when it raises :class:`optuna.TrialPruned`, with its last
    report as its value, or `Infeasible`; FAIL when it raises anything else or returns something that is not one finite
    number for each objective, and then the next one follows. A trial that is stopped by a limit before its first report
    is lost, and is tried again when the limit has grown.

    A trial of a worker that has died is lost, and tried again. At the end this waits for a sign of life of the workers
    whose trials are still running, ``silence`` seconds at most.

    Infeasible trials alone get a constraint. Optuna counts trials without any as feasible; a constraint for all would
    make the Gaussian process sampler model it, and CMA-ES warn, which ignores constraints.

    Args:
        study: Of `open_study`, or any other.
        space: Of the values.
        score: Called with each `Candidate`, in a thread; one number, or one for each objective.
        trials: Limit of trials in the study, over all processes and former calls: those that run or have ended, other
            than lost ones.
        epochs: Limit of epochs in the study, over all processes and former calls, lost trials included.
        timeout: Limit of seconds of this call.
        workers: Number of candidates that are scored at once.
        enqueue: Values to try first, by name, in part or all; those that the study has already are left out.
        directory_of: Where the files of a trial are, by its number; kept as its user attribute ``directory``.
        on_change: Called in the calling thread with each trial that has ended.
        clock: Seconds that only go forward, for ``timeout`` and ``silence``.
        beat: Seconds between two signs of life, and between two looks after those of others.
        silence: Seconds without a sign of life after which a worker of another machine is dead.
        patience: Seconds to wait for scores that are to end because this call is interrupted.

    Returns:
        ``study``.

    Raises:
        UserError: If a limit or ``workers`` is below 1.
        StudyFailed: If all of the first 4 trials of this call failed, or of 10 or more over a half, or if at the end
            the study has no trial that is COMPLETE or PRUNED.
        DiskFullError: If no space is left; the same call goes on later. Like a KeyboardInterrupt and what
            ``on_change`` raises, it ends the search: what is running is lost, and tried again by the next call.
    """
    for what, limit in (("trials", trials), ("epochs", epochs), ("workers", workers)):
        if limit is not None and limit < 1:
            raise UserError(f"{what} is {limit}; it must be 1 or more")
    with telling_full_disks(), working() as worker, Pulse(beat) as pulse:
        limits = Limits(epochs, timeout, clock)
        watch = Watch(silence, clock)
        _Search(
            study, space, score, trials, workers, directory_of, on_change, worker, pulse, limits, watch, beat, patience
        ).run(enqueue)
    return study


class _Search:
    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        score: Score,
        trials: int | None,
        workers: int,
        directory_of: Callable[[int], str],
        on_change: Callable[[FrozenTrial], Any] | None,
        worker: dict[str, Any],
        pulse: Pulse,
        limits: Limits,
        watch: Watch,
        beat: float,
        patience: float,
    ) -> None:
        self.study = study
        self.space = space
        self.score = score
        self.trials = trials
        self.workers = workers
        self.directory_of = directory_of
        self.on_change = on_change
        self.worker = worker
        self.pulse = pulse
        self.limits = limits
        self.watch = watch
        self.beat = beat
        self.patience = patience
        self.futures: dict[Future[Any], Candidate] = {}
        self.pruning = threading.Lock()
        self.own: list[tuple[TrialState, str]] = []  # how the trials of this call ended, less the lost ones
        self._settled = 0  # when the last trial was asked for
        self._crowded = -1
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="score")

    def run(self, enqueue: Sequence[Mapping[str, Any]]) -> None:
        try:
            for values in enqueue:
                self.study.enqueue_trial(dict(values), skip_if_exists=True)
            self._loop()
            self._judge_end()
        except BaseException as error:
            self._interrupt(error)
            raise
        finally:
            self._pool.shutdown(wait=False)

    def _loop(self) -> None:
        due = -math.inf
        while True:
            if not self.futures or time.monotonic() >= due:
                self._recover()
                due = time.monotonic() + self.beat
            while len(self.futures) < self.workers and self._may_ask():
                if (candidate := self._ask()) is not None:
                    self.futures[self._pool.submit(self.score, candidate)] = candidate
            if self.futures:
                done, _ = wait(self.futures, timeout=self.beat / 6, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda future: self.futures[future].number):
                    self._end(future)
            elif self._is_over():
                return
            else:
                time.sleep(min(1.0, self.beat / 30))

    # ---- asking

    def _read(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False)
        self.limits.recount(trials)
        return trials

    def _may_ask(self) -> bool:
        trials = self._read()
        if self.limits.reached() or self._is_full(trials):
            return False
        self._settled = _number_settled(trials)
        if not _any_waiting(trials) and (self._is_exhausted(trials) or self._crowded == self._settled):
            return False
        return not isinstance(self.study.sampler, _Paced) or self.study.sampler.wanted(self.study)

    def _ask(self) -> Candidate | None:
        """The next candidate, or ``None`` if the trial that was asked for has ended already."""
        trial = self.study.ask()
        try:
            trial.set_user_attr("worker", self.worker)
            trial.set_user_attr("beat", time.time())
            values = self.space.suggest(trial)
            trial.set_user_attr("directory", self.directory_of(trial.number))
        except UpdateFinishedTrialError:  # another process took it for one of the dead before it was claimed
            return None
        except UserError as error:
            give_up(self.study, trial, f"withdrawn: {error}", self.worker, again=False)
            raise
        except Exception as error:
            if is_disk_full(error):
                raise
            self._fail_unscored(trial, error)
            return None
        own = self._kept(trial)
        if own is None:
            return None
        taken = {candidate.slot for candidate in self.futures.values()}
        slot = next(slot for slot in range(self.workers) if slot not in taken)
        candidate = Candidate(trial, values, dict(own.user_attrs), slot, self.limits, self.pruning)
        self.limits.begin(candidate)
        self.pulse.add(trial, candidate.progress)
        return candidate

    def _is_full(self, trials: Sequence[FrozenTrial]) -> bool:
        return self.trials is not None and sum(map(counts, trials)) >= self.trials

    def _is_exhausted(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether the sampler has begun all that it has."""
        sampler = self.study.sampler
        if isinstance(sampler, _Paced):
            return sampler.finished(self.study)
        if self.study.user_attrs.get("exhausted") == type(sampler).__name__:
            return True
        if not isinstance(sampler, GridSampler):
            return False
        # Optuna goes on until all points are finished, and meanwhile begins the running ones once more.
        places = {trial.system_attrs["grid_id"] for trial in trials if "grid_id" in trial.system_attrs}
        spaces = (trial.system_attrs["search_space"] for trial in trials if "search_space" in trial.system_attrs)
        return any(len(places) >= math.prod(map(len, space.values())) for space in spaces)

    def _kept(self, trial: optuna.Trial) -> FrozenTrial | None:
        """The trial as it is stored, or ``None`` after giving back one that other processes have made superfluous.

        A new trial is superfluous when those with smaller numbers are enough, and one that was waiting when all others
        are. So of those that go beyond the limit the last one always notices it, whoever has begun when.
        """
        trials = self._read_after_choice(trial.number)
        own = trials[trial.number]
        was_waiting = "fixed_params" in own.system_attrs
        again = False
        others = [each for each in trials if counts(each) and each.number != own.number]
        if is_repeated(own, trials):
            reason = f"trial {own.user_attrs['retry_of']} is continued by another one"
        elif not was_waiting and (same := self._same_point(own, trials)) is not None:
            reason = f"trial {same.number} has the same values, and all are tried once"
            settled = _number_settled(trials)
            running = any(each.state == TrialState.RUNNING and each.number != own.number for each in trials)
            if isinstance(self.study.sampler, BruteForceSampler) and running and settled == self._settled + 1:
                # Nothing else came in between, so it has only what is running, or is under values being chosen.
                self._crowded = settled + 1  # this one ends too
        elif self.trials is not None and self.trials <= sum(was_waiting or each.number < own.number for each in others):
            reason = f"the limit of {self.trials} trials was reached by another process"
            again = was_waiting or goes_through(self.study.sampler)
            time.sleep(random.uniform(0.0, 0.1))  # so that two processes do not give way to each other for ever
        else:
            return own
        give_up(self.study, own, f"withdrawn: {reason}", self.worker, again=again)
        return None

    def _read_after_choice(self, number: int) -> list[FrozenTrial]:
        """All trials, once those with smaller numbers that may come to the same point have chosen their values."""
        deadline = time.monotonic() + _CHOOSING
        trials = self._read()
        while self._others_choose(trials[number], trials[:number]) and time.monotonic() < deadline:
            time.sleep(0.01)
            trials = self._read()
        return trials

    def _others_choose(self, own: FrozenTrial, earlier: Sequence[FrozenTrial]) -> bool:
        """Whether another process may be coming to the point of this trial, of a sampler that visits each once."""
        return goes_through(self.study.sampler) and any(
            each.state == TrialState.RUNNING
            and not has_values(each)
            and each.params.items() <= own.params.items()
            and self.watch.lives(each) is not False
            for each in earlier
        )

    def _same_point(self, own: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """An earlier trial at the same point, for samplers that go through all points."""
        if not goes_through(self.study.sampler):
            return None
        grid = isinstance(self.study.sampler, GridSampler)
        for trial in trials[: own.number]:
            same = trial.params == own.params
            if grid:
                same = trial.system_attrs.get("grid_id") == own.system_attrs.get("grid_id")
            if same and not trial.user_attrs.get("withdrawn"):
                return trial
        return None

    def _fail_unscored(self, trial: optuna.Trial, error: Exception) -> None:
        reason = f"its values could not be chosen: {one_sentence(error)}"
        log.warning("trial %d failed", trial.number, exc_info=error)
        trial.set_user_attr("reason", reason)
        if end_trial(self.study, trial, TrialState.FAIL):
            self._ended(trial.number, TrialState.FAIL, reason)

    def _is_over(self) -> bool:
        """Whether nothing is left to do, now or when a worker has died whose trial is running."""
        trials = self._read()
        if self.limits.reached():
            return True
        if not self._is_full(trials) and (_any_waiting(trials) or not self._is_exhausted(trials)):
            return False
        return all(self.watch.lives(trial) for trial in trials if trial.state == TrialState.RUNNING)

    # ---- telling

    def _end(self, future: Future[Any]) -> None:
        candidate = self.futures[future]
        error = future.exception()
        ends_all = isinstance(error, Misconfigured) or not isinstance(error, Exception)
        if error is not None and (ends_all or is_disk_full(error)):
            raise error  # it stays among the running ones, which are lost
        state, values, reason = self._outcome(candidate, future)
        if state is None:
            told = give_up(self.study, candidate.trial, reason, self.worker, progress=candidate.progress())
        else:
            told = self._tell(candidate, state, values, reason, isinstance(error, Infeasible))
        del self.futures[future]
        self.limits.end(candidate)
        self.pulse.remove(candidate.number)
        if not told:
            log.warning(
                "trial %d was taken for lost by another process, and is tried again; its result is dropped",
                candidate.number,
            )
            return
        if state == TrialState.FAIL and error is not None and not isinstance(error, TrialFailed | FloatingPointError):
            log.warning("trial %d failed", candidate.number, exc_info=error)
        self._ended(candidate.number, state, reason)

    def _outcome(self, candidate: Candidate, future: Future[Any]) -> tuple[TrialState | None, list[float] | None, str]:
        """State, values and reason of a trial whose score has ended; the state is ``None`` if it is lost."""
        error = future.exception()
        if isinstance(error, optuna.TrialPruned):
            if candidate.stopped and candidate.pruned_at is None:
                return (TrialState.PRUNED if candidate.reports else None), None, candidate.stopped
            if candidate.stopping and not candidate.reports:
                return None, None, candidate.stopping
            where = f"pruned at step {candidate.pruned_at}" if candidate.pruned_at is not None else "pruned"
            return TrialState.PRUNED, None, str(error) or where
        if isinstance(error, Unfinished):
            return None, None, candidate.stopping or str(error)
        if isinstance(error, Infeasible):
            return TrialState.PRUNED, None, f"infeasible: {one_sentence(error)}"
        if error is not None:
            kind = "" if isinstance(error, TrialFailed | FloatingPointError) else f"{type(error).__name__}: "
            return TrialState.FAIL, None, kind + one_sentence(error)
        return self._scored(future.result())

    def _scored(self, result: Any) -> tuple[TrialState, list[float] | None, str]:
        objectives = len(self.study.directions)
        try:
            values = [float(each) for each in _each(result)]
        except (TypeError, ValueError):
            return TrialState.FAIL, None, f"the score returned {str(result)[:100]!r}, which is no number"
        if len(values) != objectives:
            return TrialState.FAIL, None, f"the score returned {len(values)} values for {objectives} objectives"
        for value in values:
            if not math.isfinite(value):
                return TrialState.FAIL, None, f"the value is {value}"
        return TrialState.COMPLETE, values, ""

    def _tell(
        self, candidate: Candidate, state: TrialState, values: list[float] | None, reason: str, infeasible: bool
    ) -> bool:
        trial = candidate.trial
        try:
            for name, value in {**candidate.progress(), "reason": reason}.items():
                trial.set_user_attr(name, value)
            if candidate.metrics:
                trial.set_user_attr("metrics", candidate.metrics)
            if infeasible:
                trial.set_user_attr("infeasible", True)
                if not isinstance(self.study.sampler, CmaEsSampler):  # it warns that it does not look at them
                    trial.set_constraint("feasible", 1.0)
        except UpdateFinishedTrialError:
            return False
        return end_trial(self.study, trial, state, values)

    def _ended(self, number: int, state: TrialState | None, reason: str) -> None:
        if state is not None:
            self.own.append((state, reason))
        self._changed(number)
        refused = [reason for _, reason in self.own if reason.startswith("infeasible: ")]
        if len(refused) == len(self.own) == _MOST_FAILED:
            raise StudyFailed(f"all of {len(refused)} trials are {_commonest(refused)}")
        failures = [reason for state, reason in self.own if state == TrialState.FAIL]
        number_of_own = len(self.own)
        if (number_of_own >= _ALL_FAILED and len(failures) == number_of_own) or (
            number_of_own >= _MOST_FAILED and len(failures) > number_of_own / 2
        ):
            raise StudyFailed(f"{len(failures)} of {number_of_own} trials failed, most often: {_commonest(failures)}")

    def _changed(self, number: int) -> None:
        if self.on_change is not None:
            self.on_change(self.study.get_trials(deepcopy=False)[number])

    def _judge_end(self) -> None:
        trials = self.study.get_trials(deepcopy=False)
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        if any(trial.state in states and not trial.user_attrs.get("infeasible") for trial in trials):
            return
        failures = [
            str(trial.user_attrs.get("reason", "unknown"))
            for trial in trials
            if trial.state.is_finished() and not is_lost(trial)
        ]
        if failures:
            several = f"all {len(failures)} trials" if len(failures) > 1 else "the only trial"
            raise StudyFailed(f"{several} failed, most often: {_commonest(failures)}")
        raise StudyFailed(f"no trial was scored; {self.limits.reached() or 'there was none to score'}")

    # ---- lost trials

    def _recover(self) -> None:
        for number in recover(self.study, self.space, self.watch, self.worker):
            log.warning("trial %d is tried again: the worker that had it is dead", number)
            self._changed(number)

    def _interrupt(self, error: BaseException) -> None:
        """Let the running scores end, and give their trials up, as far as the storage still takes it."""
        try:
            for candidate in list(self.limits.running.values()):  # it may not be among the futures yet
                candidate.interrupted.set()
            try:
                wait(self.futures, timeout=self.patience)
            except KeyboardInterrupt:
                log.warning("interrupted again; not waiting for what is running")
            told = "" if isinstance(error, KeyboardInterrupt | SystemExit) else f": {one_sentence(error)}"
            for future in list(self.futures):
                if future.done() and future.exception() is None:
                    self._end_quietly(future)
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("worker") == self.worker:
                    complete(self.study, self.space, trial)
                    running = self.limits.running.get(trial.number)
                    progress = None if running is None else running.progress()
                    give_up(self.study, trial, f"interrupted{told}", self.worker, progress=progress)
        except Exception as other:  # the first one is told; the next search finds the trials without an owner
            log.debug("running trials were not given up: %s", other)

    def _end_quietly(self, future: Future[Any]) -> None:
        """Tell a score that came in time; nobody else is to be told any more."""
        self.on_change = None
        try:
            self._end(future)
        except StudyFailed:
            pass


def _each(result: Any) -> Sequence[Any]:
    """The values of a score that returned one number, of whatever kind, or several."""
    if isinstance(result, str | bytes | bool):
        raise TypeError("neither number nor numbers")
    try:
        return [float(result)]
    except TypeError:
        return list(result)


def _any_waiting(trials: Sequence[FrozenTrial]) -> bool:
    return any(trial.state == TrialState.WAITING for trial in trials)


def _number_settled(trials: Sequence[FrozenTrial]) -> int:
    """Grows whenever the values of a trial have been chosen, and when a trial has ended."""
    return sum(trial.state.is_finished() + has_values(trial) for trial in trials)


def _commonest(reasons: Sequence[str]) -> str:
    kind, _ = Counter(map(alike, reasons)).most_common(1)[0]
    return next(reason for reason in reasons if alike(reason) == kind)
