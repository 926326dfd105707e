"""Runs and other jobs of a search that are known beforehand, several at once, each on its part of the machine."""

import contextlib
import copy
import errno
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import yaml

from lightning_automl.rundir import DiskFullError, UserError, read_json, write_text
from lightning_automl.search.devices import Slice
from lightning_automl.search.study import StudyFailed
from lightning_automl.search.trials import Ending, TrialServer

Item = TypeVar("Item")
Result = TypeVar("Result")


def answer_of(server: TrialServer, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What a process of the trial server answers at once; its mistakes are the user's.

    Raises:
        UserError: If it refuses what it got.
        RuntimeError: If it failed, with the end of what it has printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log_file = Path(scratch) / "server.txt"
        found = server.run(payload, ranks=1, threads=1, log=log_file, on_message=lambda message: None)
        tail = log_file.read_text(errors="replace")[-2000:] if log_file.exists() else ""
    if found.kind == "done":
        assert found.result is not None
        return found.result
    if found.exception in ("UserError", "MisconfigurationException"):
        raise UserError(found.reason)
    raise RuntimeError(f"{found.reason}\n{tail}")


class Workers:
    """Does jobs in processes of the trial server; each waits until a part of the machine is free.

    Args:
        server: Makes the processes.
        slices: Devices and threads of each worker; so many jobs are done at once.
        ranks: Processes of a run.
        silence: Seconds without a sign of life after which a job is killed.
        limit: Seconds that a job may take.
        timeout: Seconds from now after which all is stopped.
    """

    def __init__(
        self,
        server: TrialServer,
        slices: Sequence[Slice],
        ranks: int,
        *,
        silence: float | None = 600.0,
        limit: float | None = None,
        timeout: float | None = None,
    ) -> None:
        self.server = server
        self.ranks = ranks
        self.silence = silence
        self.limit = limit
        self.timeout = timeout
        self.number = len(slices)
        self.slices = tuple(slices)
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._stopped = threading.Event()
        self._free: SimpleQueue[Slice] = SimpleQueue()
        for each in slices:
            self._free.put(each)

    def within(self, seconds: float) -> "Workers":
        """The same parts of the machine with an end of their own: what runs then is stopped by StudyFailed.

        Args:
            seconds: From now; the end of these workers stays an end.
        """
        own = copy.copy(self)  # the parts that are free are shared
        own.timeout = seconds
        own._deadline = min(self._deadline, time.monotonic() + seconds)
        own._stopped = threading.Event()
        return own

    @property
    def out_of_time(self) -> bool:
        """Whether the end has come."""
        return time.monotonic() >= self._deadline

    def is_set(self) -> bool:
        """Whether all is to be stopped, as the trial server asks for it."""
        return self._stopped.is_set() or self.out_of_time

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Call ``work`` with every item, in as many threads as there are workers; the results in the items' order.

        The first error ends what is running and is raised.
        """
        with ThreadPoolExecutor(self.number, thread_name_prefix="job") as pool:
            try:
                futures = [pool.submit(work, item) for item in items]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:  # the executor waits for all threads, so let them end
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def fit(self, what: str, config: Mapping[str, Any], place: Path) -> dict[str, Any]:
        """Train a config in its directory, unless that is finished; one that was killed goes on from its checkpoint.

        Args:
            what: To call it in messages.
            config: A resolved fit config.
            place: Its directory.

        Returns:
            Its summary.

        Raises:
            UserError: If the run refuses the config.
            StudyFailed: If it failed, or the time is over.
            DiskFullError: If it found no space left.
        """
        if (read_json(place / "summary.json") or {}).get("status") != "finished":
            write_text(place / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
            payload: dict[str, Any] = {"do": "fit", "directory": str(place.resolve()), "watch": None, "costs": []}
            self.do(what, payload, place / "output.txt", ranks=self.ranks)
        summary: dict[str, Any] = read_json(place / "summary.json")
        return summary

    def do(
        self,
        what: str,
        payload: Mapping[str, Any],
        output: Path,
        *,
        ranks: int = 1,
        on_message: Callable[[dict[str, Any]], Any] = lambda message: None,
    ) -> dict[str, Any]:
        """Let a process of the trial server, or several, do a job on a free part of the machine.

        Args:
            what: To call it in messages.
            payload: For the process.
            output: What it prints is appended to this file.
            ranks: Number of processes.
            on_message: As in ``TrialServer.run``.

        Returns:
            What the job returned.

        Raises:
            UserError: If it refuses what it got.
            StudyFailed: If it failed, or the time is over.
            DiskFullError: If it found no space left.
        """
        with self._slice() as own:
            ending = self.server.run(
                payload,
                ranks=ranks,
                threads=own.threads,
                log=output,
                environment=own.environment,
                on_message=on_message,
                silence=self.silence,
                timeout=self.limit,
                stop=self,
            )
        if ending.kind != "done":
            raise self._failure(what, ending, output)
        assert ending.result is not None
        return ending.result

    @contextlib.contextmanager
    def _slice(self) -> Iterator[Slice]:
        own = self._free.get()
        try:
            yield own
        finally:
            self._free.put(own)

    def _failure(self, what: str, ending: Ending, output: Path) -> Exception:
        if self.is_set() and not self._stopped.is_set():
            return StudyFailed(
                f"stopped at the limit of {self.timeout:g} s, during {what}; the same command goes on with a new limit"
            )
        if ending.exception == "DiskFullError":
            return DiskFullError(errno.ENOSPC, ending.reason)
        if os.strerror(errno.ENOSPC) in ending.reason:  # as the system says it, from a writer that is not ours
            message = f"no space left for {output.parent}; free some and give the same command again, it goes on"
            return DiskFullError(errno.ENOSPC, message)
        refused = ending.exception in ("UserError", "MisconfigurationException", "UnknownMetricError")
        error = UserError if refused else StudyFailed
        return error(f"{what} failed: {ending.reason} (see {output})")
