"""Trials as groups of processes: ask the trial server for them, listen to them, and say how they ended.

The process that runs the search owns the study; a trial's ranks speak only with it. ``TrialServer.run`` returns when
no process of the trial is left. Linux only.
"""

import contextlib
import json
import math
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, Self

from lightning_automl.rundir import UserError

#: Seconds between two looks at ``stop`` and at the clocks.
LOOK = 0.2

#: Seconds after the first failure in which the other ranks may end, and say what happened to them.
GRACE = 2.0

#: Seconds after the end of rank 0 in which the others must end.
LEAVING = 60.0

#: Seconds after which a process that was killed and does not die (it waits for a dead disk, say) is left alone.
DYING = 30.0

#: How many ports are tried when they turn out to be taken.
PORTS = 4


#: How the libraries are told how many threads to use; read when they are loaded.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

DIED = "the trial server died"
INTERRUPTED = "interrupted"

#: What a rank says when another one has gone: never the reason when there is a better one.
CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|gloo|nccl|process ?group|tcpstore"
    r"|socket (closed|timeout)|timed out|wait timeout|Dist(Backend|Network|Store)Error",
    re.IGNORECASE,
)
TAKEN = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)


class Stop(Protocol):
    """A ``threading.Event``, or anything else that can be asked."""

    def is_set(self) -> bool:
        """Whether the trial is to be given up."""


@dataclass(frozen=True)
class Ending:
    """How a trial ended.

    Args:
        kind: ``done`` only by the last message of rank 0 and a clean end of all ranks.
        result: What the function returned on rank 0, None when it failed.
        reason: One sentence, "" when done.
        exception: Class name of what was raised, "" when a process ended without a word or was killed by us.
    """

    kind: Literal["done", "failed"]
    result: dict[str, Any] | None = None
    reason: str = ""
    exception: str = ""


class TrialServer:
    """Starts trials in warm processes. A context manager; its end kills everything and waits.

    Args:
        call: ``module:function``. The module is imported once, in the server, and what it imports is then there for
            every trial; it must start no threads. Each rank calls ``function(payload, channel)``, whose return value
            (JSON) on rank 0 is the trial's result.
        environment: Variables of the server, besides those of this process.

    Raises:
        UserError: Where there is no Linux.
    """

    def __init__(self, call: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        if not sys.platform.startswith("linux"):
            raise UserError(f"a search runs its trials in forked processes, on Linux only; this is {sys.platform}")
        self.call = call
        self.environment = dict(environment)
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._server: Future[_Server] | None = None
        # The kernel ends the server when the thread dies that started it: nothing survives a kill of this process.
        # Threads that run trials come and go; this one stays.
        self._owner = ThreadPoolExecutor(1, "trial-server")

    def __enter__(self) -> Self:
        """Start the server; what it imports is waited for by the first trial."""
        self._living()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill all trials and the server."""
        self.close()

    def close(self) -> None:
        """Kill all trials and the server, and wait until they are gone. What runs in other threads is interrupted."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.terminate()
        self._owner.shutdown()
        if self._process is not None:
            try:
                self._process.wait(DYING)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._server is not None and self._server.exception() is None:
            self._server.result().link.close()

    def run(
        self,
        payload: Mapping[str, Any],
        *,
        ranks: int,
        threads: int,
        log: Path,
        on_message: Callable[[dict[str, Any]], Any],
        environment: Mapping[str, str] = MappingProxyType({}),
        silence: float | None = None,
        timeout: float | None = None,
        stop: Stop | None = None,
    ) -> Ending:
        """Run a trial. May be called from several threads at once.

        Args:
            payload: JSON values, the same for every rank.
            ranks: How many processes, at least 1. With more than one they find torchrun's variables in their
                environment and a port of their own for the rendezvous; with one there are none.
            threads: Of torch, for each rank.
            log: What the ranks print and the tracebacks of what they raise are appended to this file.
            on_message: Gets each message of a rank except beats, in this thread; what it returns (JSON) is the answer
                to an ``ask``. The time that it takes counts for no rank's silence. What it raises ends the trial and
                is raised again.
            environment: Variables of the ranks, besides the server's.
            silence: Seconds without a message after which a rank that has not ended is taken to hang.
            timeout: Seconds that the trial may take.
            stop: When set, the trial is killed.

        Returns:
            How it ended. The first failure in time is the reason, unless it sounds like the consequence of another.

        Raises:
            RuntimeError: If the server cannot import what it is to call.
            OSError: If the log cannot be opened.
        """
        request = {
            "payload": dict(payload),
            "threads": threads,
            "environment": {**dict.fromkeys(THREADS, str(threads)), **environment},
        }
        tries = PORTS
        while (server := self._wait_for_server(stop)) is not None:
            with _Group(ranks, on_message) as group:
                if not group.begin(server.link, request, log):  # it died before the trial began
                    server.process.kill()
                    server.process.wait()
                    continue
                ending = group.follow(silence, timeout, stop)
            tries -= 1
            if ending.reason == DIED and self._closed:
                break
            if not (tries and group.found_port_taken()):
                return ending
        return Ending("failed", reason=INTERRUPTED)

    def _living(self) -> "Future[_Server] | None":
        """The server, started again when it has died; None when this was closed."""
        with self._lock:
            if self._closed:
                return None
            known = self._server
            if known is not None and known.done() and known.exception() is None:
                if known.result().process.poll() is None:
                    return known
                known.result().link.close()
                known = None
            if known is None:
                known = self._server = self._owner.submit(self._start)
            return known

    def _wait_for_server(self, stop: Stop | None) -> "_Server | None":
        """A server that has imported all it needs; None when stopped before."""
        while not (stop is not None and stop.is_set()):
            server = self._living()
            if server is None:
                return None
            with contextlib.suppress(TimeoutError):
                return server.result(LOOK)
        return None

    def _start(self) -> "_Server":
        module = self.call.partition(":")[0]
        link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            command = [sys.executable, "-P", "-m", "lightning_automl.search.server", self.call]
            process = subprocess.Popen(
                [*command, str(os.getpid()), str(far.fileno())],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,  # Ctrl-C is for this process alone
                env=self._variables(),
            )
        with self._lock:
            self._process = process
            if self._closed:
                process.terminate()
        try:
            link.send(json.dumps(sys.path).encode())  # classes that lie beside somebody's configs
            answer = link.recv(1 << 16)
        except ConnectionError:
            answer = b""
        if answer == b"{}":
            return _Server(process, link)
        link.close()
        status = process.wait()
        if answer:
            raise RuntimeError(f"the trial server cannot import {self.call}: {json.loads(answer)['reason']}")
        raise RuntimeError(f"the trial server ended with status {status} while it imported {module}")

    def _variables(self) -> dict[str, str]:
        variables = {**os.environ, **self.environment}
        # Before torch is loaded: with a pool of OpenMP threads in the server, children would wait for it for ever.
        variables |= dict.fromkeys(THREADS, "1")
        variables["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() does not start CUDA, which forbids to fork
        root = str(Path(__file__).parents[2])
        if root not in sysconfig.get_paths().values():  # a source tree that is not installed
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), root]))
        return variables


@dataclass(frozen=True)
class _Server:
    process: subprocess.Popen[bytes]
    link: socket.socket


@dataclass(frozen=True)
class _Failure:
    """Of a rank, at a time of the monotonic clock, which all processes share."""

    at: float
    reason: str
    exception: str = ""

    def is_consequence(self) -> bool:
        """Whether it may have come from the end of another rank."""
        return bool(self.exception and CONSEQUENCE.search(f"{self.exception}: {self.reason}"))


@dataclass
class _Rank:
    """What is known about a rank.

    Args:
        number: Its rank.
        connection: To it.
        far: Its end, until it has it.
        heard: When it last said something.
        unread: The beginning of a line.
        last: Its last message.
        has_exited: Whether the process has.
    """

    number: int
    connection: socket.socket
    far: socket.socket
    heard: float = 0.0
    unread: bytes = b""
    last: dict[str, Any] | None = None
    has_exited: bool = False


class _Group:
    """One try of a trial, from the request until its processes are gone."""

    def __init__(self, ranks: int, on_message: Callable[[dict[str, Any]], Any]) -> None:
        assert ranks >= 1, f"a trial of {ranks} processes"
        self.on_message = on_message
        self.control, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ranks = [_Rank(number, *socket.socketpair()) for number in range(ranks)]
        self.selector = selectors.DefaultSelector()
        self.leader = 0
        self.failures: list[_Failure] = []
        self.verdict = ""
        self.killed_at = math.inf
        self.left_at = math.inf
        self.failed_at = math.inf
        self.has_begun = False
        self.has_spoken = False
        self.is_gone = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, also when something was raised."""
        try:
            if self.has_begun and not self.is_gone and self.killed_at == math.inf:
                self.kill("")
            while self.has_begun and not self.is_gone and time.monotonic() < self.killed_at + DYING:
                self.step()
        finally:
            self.selector.close()
            for end in (self.control, self.far, *(end for rank in self.ranks for end in (rank.connection, rank.far))):
                end.close()

    def begin(self, link: socket.socket, request: dict[str, Any], log: Path) -> bool:
        """Ask the server for the ranks. Whether it could be asked."""
        request = {**request, "port": free_port()}
        with contextlib.ExitStack() as stack:
            # A file in memory: whatever its size, the request is there as a whole and nobody waits for its reader.
            memory = stack.enter_context(os.fdopen(os.memfd_create("trial"), "w+b"))
            memory.write(json.dumps(request).encode())
            memory.seek(0)
            output = stack.enter_context(log.open("ab"))
            files: list[Any] = [memory, output, self.far, *(rank.far for rank in self.ranks)]
            try:
                socket.send_fds(link, [b"run"], [file.fileno() for file in files])
            except OSError:
                return False
        self.has_begun = True
        for rank in self.ranks:
            rank.far.close()
        self.far.close()
        return True

    def follow(self, silence: float | None, timeout: float | None, stop: Stop | None) -> Ending:
        """Listen until the processes are gone, and kill them when there is a reason to."""
        began = time.monotonic()
        self.selector.register(self.control, selectors.EVENT_READ, self.hear_server)
        for rank in self.ranks:
            rank.heard = began
            self.selector.register(rank.connection, selectors.EVENT_READ, partial(self.hear, rank))
        while not self.is_gone and time.monotonic() < self.killed_at + DYING:
            # What arrived meanwhile is heard before a rank is called silent: the time is that before the messages.
            now = self.step()
            if self.killed_at == math.inf:
                self.judge(now, began, silence, timeout, stop)
        return self.ending()

    def step(self) -> float:
        """Hear what there is to hear. The time at which it was there."""
        events = self.selector.select(LOOK)
        now = time.monotonic()
        for key, _ in events:
            key.data()
        return now

    def judge(self, now: float, began: float, silence: float | None, timeout: float | None, stop: Stop | None) -> None:
        """Kill the group if it has to be."""
        waiting = [rank for rank in self.ranks if not rank.has_exited]
        silent = min((rank for rank in waiting if rank.last is None), key=lambda rank: rank.heard, default=None)
        if self.failures:
            if now > self.failed_at + GRACE or (stop is not None and stop.is_set()):
                self.kill("")
        elif stop is not None and stop.is_set():
            self.kill(INTERRUPTED)
        elif timeout is not None and now > began + timeout:
            self.kill(f"the trial took longer than {timeout:g} s (killed)")
        elif waiting and now > self.left_at + LEAVING:
            self.kill(f"rank {waiting[0].number} had not ended {LEAVING:g} s after rank 0 (killed)")
        elif silence is not None and silent is not None and now > silent.heard + silence:
            self.kill(f"rank {silent.number} was silent for {silence:g} s (killed)")

    def kill(self, reason: str) -> None:
        """Have the group killed. What its ranks say from now on is not heard."""
        self.verdict = self.verdict or reason
        self.killed_at = time.monotonic()
        for rank in self.ranks:
            self.close_ears(rank)
        with contextlib.suppress(OSError):
            self.control.send(b"kill")

    def hear_server(self) -> None:
        """A message of the server, or its end."""
        try:
            data = self.control.recv(1 << 16)
        except ConnectionError:
            data = b""
        message = json.loads(data or "{}")
        if "group" in message:
            self.leader = message["group"]
        elif "rank" in message:
            self.hear_exit(self.ranks[message["rank"]], message)
        elif "error" in message:
            self.fail(time.monotonic(), message["error"], message["exception"])
        else:
            self.is_gone = True
        if not data:
            self.verdict = self.verdict or DIED
            if self.leader:
                # The ranks have died with the server; what they had started has not. As long as something of the group
                # lives its id is taken, and it cannot have been given away in this moment.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.leader, signal.SIGKILL)

    def hear(self, rank: _Rank) -> bool:
        """A part of what a rank has said. Whether there was one."""
        try:
            data = rank.connection.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self.close_ears(rank)
            return False
        *lines, rank.unread = (rank.unread + data).split(b"\n")
        for line in lines:
            self.take(rank, *json.loads(line))
        return True

    def close_ears(self, rank: _Rank) -> None:
        """Do not wait for messages of a rank any more."""
        with contextlib.suppress(KeyError):
            self.selector.unregister(rank.connection)

    def take(self, rank: _Rank, kind: str, message: dict[str, Any]) -> None:
        """A message of a rank: ``say``, ``ask`` or ``end``."""
        rank.heard = time.monotonic()
        if kind == "end":
            rank.last = message
            if "result" not in message:
                self.fail(message["at"], message["reason"], message["exception"])
            elif rank.number == 0:
                self.left_at = rank.heard
        elif "beat" not in message:
            self.has_spoken = True
            answer = self.on_message(message)
            if kind == "ask":
                self.answer(rank, answer)
            spent = time.monotonic() - rank.heard
            for each in self.ranks:  # others may have waited for this answer as well
                each.heard += spent

    def answer(self, rank: _Rank, answer: Any) -> None:
        """Send what was asked for. The rank waits for it, so that it has room for it, unless it is dead or stopped."""
        rank.connection.settimeout(DYING)
        with contextlib.suppress(OSError):
            rank.connection.sendall(json.dumps(answer).encode() + b"\n")

    def hear_exit(self, rank: _Rank, message: dict[str, Any]) -> None:
        """The end of a process, which is a failure unless it has said that it ends."""
        rank.has_exited = True
        if self.killed_at < math.inf:
            return  # our own doing
        while self.hear(rank):
            pass  # what it said before
        number, status = message.get("signal"), message.get("status")
        name = f"rank {rank.number}"
        if number is not None:
            why = ", perhaps by the kernel for lack of memory" if number == signal.SIGKILL else ""
            self.fail(message["at"], f"{name} was killed by signal {number} ({signal_name(number)}){why}")
        elif rank.last is None:
            with_status = f"with status {status} and " if status else ""
            self.fail(message["at"], f"{name} ended {with_status}without a result")
        elif status and "result" in rank.last:
            self.fail(message["at"], f"{name} ended with status {status} after its result")

    def fail(self, at: float, reason: str, exception: str = "") -> None:
        """Note a failure; what comes in the next seconds may say more about it."""
        self.failures.append(_Failure(at, reason, exception))
        self.failed_at = min(self.failed_at, time.monotonic())

    def ending(self) -> Ending:
        """What became of the trial."""
        if self.verdict:
            return Ending("failed", reason=self.verdict)
        if self.failures:
            failures = sorted(self.failures, key=lambda failure: failure.at)
            cause = next((failure for failure in failures if not failure.is_consequence()), failures[0])
            return Ending("failed", reason=cause.reason, exception=cause.exception)
        assert self.ranks[0].last is not None
        return Ending("done", self.ranks[0].last["result"])

    def found_port_taken(self) -> bool:
        """Whether the group failed before its first message, and by nothing but a port that another process has."""
        return (
            not (self.verdict or self.has_spoken)
            and any(TAKEN.search(failure.reason) for failure in self.failures)
            and all(TAKEN.search(failure.reason) or failure.is_consequence() for failure in self.failures)
        )


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def signal_name(number: int) -> str:
    """``SIGSEGV`` for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "real-time"
