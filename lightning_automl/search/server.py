"""The trial server: a warm process that forks the ranks of trials. Started by ``TrialServer``, not by hand.

``python -m lightning_automl.search.server MODULE:FUNCTION PARENT DESCRIPTOR`` imports the module once. From then on a
trial costs a fork and not the seconds that torch and Lightning take to be imported.

What makes forking safe: this process has one thread (checked before each fork), it was started with
``OMP_NUM_THREADS=1``, so that no pool of OpenMP threads exists that a child would wait for in vain, and nothing here
touches CUDA, which does not survive a fork.

What keeps processes from outliving their trial: the ranks of a trial and what they start are one process group. The
server kills it when it is told to, when the parent's end of the trial's control socket is closed, when the parent dies,
and when all ranks have ended but something that they started has not. Ranks die with the server. What leaves the group
on purpose (``setsid``) is not followed.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.rundir import UnsupportedError, UserError
from lightning_automl.search.channel import Channel

#: What torchrun and its agent set. None of it may reach a trial from outside.
TORCHRUN = (
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
    *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
)

#: Seconds that the server waits at its end for the processes that it killed.
DYING = 10.0

#: The signals that the server handles; a child must not run its handlers.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)

Function = Callable[[dict[str, Any], Channel], Any]


@dataclass
class Group:
    """The ranks of one trial.

    Args:
        control: To the thread of the parent that waits for this trial.
        leader: Process and group id of rank 0, 0 before it exists. Its zombie is kept until every process of the group
            is gone, so that the id cannot come to belong to others while it is used.
        running: Rank by process id.
    """

    control: socket.socket
    leader: int = 0
    running: dict[int, int] = field(default_factory=dict)

    def tell(self, **message: Any) -> None:
        """Send a message to the parent, unless it has given the trial up."""
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(message).encode())

    def kill(self) -> None:
        """End all processes of the group."""
        if self.leader:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.leader, signal.SIGKILL)

    def is_gone(self) -> bool:
        """Tell what ranks have ended; when all have, kill and reap what is left. Whether nothing is left."""
        for pid, rank in list(self.running.items()):
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                del self.running[pid]
                killed = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                self.tell(rank=rank, **{"signal" if killed else "status": ended.si_status}, at=time.monotonic())
        if self.running:
            return False
        self.kill()
        try:
            # Orphans of the group are children of this process, which is their subreaper.
            while self.leader and os.waitid(os.P_PGID, self.leader, os.WEXITED | os.WNOHANG):
                pass
        except ChildProcessError:
            self.leader = 0  # belongs to nobody now
        return not self.leader


class Server:
    """Fork ranks as the parent asks for them, and look after them.

    Args:
        function: What each rank calls, with the payload of the request and its :class:`Channel`.
        link: Requests arrive here: a packet with the descriptors of the request in memory, the log, the control
            socket and a socket for each rank.
    """

    def __init__(self, function: Function, link: socket.socket) -> None:
        self.function = function
        self.link = link
        self.pid = os.getpid()
        self.groups: list[Group] = []
        self.ending = False
        self.selector = selectors.DefaultSelector()
        self.woken, self.waker = socket.socketpair()
        for side in (self.woken, self.waker):
            side.setblocking(False)
        self.selector.register(link, selectors.EVENT_READ, self.begin)
        self.selector.register(self.woken, selectors.EVENT_READ, partial(self.woken.recv, 4096))

    def serve(self) -> None:
        """Work until the parent closes its end, dies or sends SIGTERM; then kill all ranks."""
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)  # a signal ends the select below
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        while not self.ending:
            self.step(None)
        self.selector.unregister(self.link)
        for group in self.groups:
            self._forget(group)  # first, so that the parent does not take our kill for the kernel's
            group.kill()
        deadline = time.monotonic() + DYING
        while self.groups and time.monotonic() < deadline:
            self.step(0.1)

    def step(self, patience: float | None) -> None:
        """Wait for requests, orders and ended processes for at most so many seconds, and do what they ask for."""
        for key, _ in self.selector.select(patience):
            key.data()
        for group in [group for group in self.groups if group.is_gone()]:
            group.tell(gone=True)
            self._forget(group)
            self.groups.remove(group)
        if not self.groups:
            with contextlib.suppress(ChildProcessError):  # orphans that had left their group
                while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
                    pass

    def begin(self) -> None:
        """Take a request and fork its ranks."""
        data, descriptors, _, _ = socket.recv_fds(self.link, 16, 256, socket.MSG_CMSG_CLOEXEC)
        if not data:
            self.ending = True
        if not data or self.ending:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        memory, log, control, *connections = descriptors
        with open(memory, "rb") as file:
            request = json.load(file)
        group = Group(socket.socket(fileno=control))
        self.groups.append(group)
        self.selector.register(group.control, selectors.EVENT_READ, partial(self._ordered, group))
        ranks = [socket.socket(fileno=connection) for connection in connections]
        try:
            for rank in range(len(ranks)):
                self._check_threads()
                self._fork(group, rank, ranks, log, request)
        except (OSError, RuntimeError) as error:
            group.tell(error=one_sentence(error), exception=type(error).__name__)
            group.kill()
        finally:
            for connection in ranks:
                connection.close()
            os.close(log)
        group.tell(group=group.leader)

    def _ordered(self, group: Group) -> None:
        """The parent has only one order; closing its end says the same."""
        closed = not group.control.recv(16)
        group.kill()
        if closed:
            self._forget(group)

    def _forget(self, group: Group) -> None:
        """Close the control socket."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(group.control)
        group.control.close()

    def _end(self, *_: Any) -> None:
        self.ending = True

    def _check_threads(self) -> None:
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise RuntimeError(
                f"the trial server has {threads} threads and cannot fork safely; "
                f"{self.function.__module__} or what it imports starts them: start them in the trial"
            )

    def _fork(self, group: Group, rank: int, ranks: list[socket.socket], log: int, request: dict[str, Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    self._detach(group, ranks[rank], ranks, log)
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                    live(self.function, rank, len(ranks), ranks[rank], request)
                finally:
                    os._exit(1)
            group.leader = group.leader or pid
            group.running[pid] = rank
            with contextlib.suppress(OSError):  # the child does it too; who comes first does not matter
                os.setpgid(pid, group.leader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _detach(self, group: Group, own: socket.socket, ranks: list[socket.socket], log: int) -> None:
        """In the child: keep nothing of the server's but the modules."""
        die_with_parent(self.pid, signal.SIGKILL)
        os.setpgid(0, group.leader)
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.selector.close()
        foreign = [self.link, self.woken, self.waker, *(other.control for other in self.groups), *ranks]
        for connection in foreign:
            if connection is not own:
                connection.close()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


def live(function: Function, rank: int, ranks: int, connection: socket.socket, request: dict[str, Any]) -> NoReturn:
    """The life of a rank, from the fork to its last message.

    Args:
        function: Called with the payload and the channel; what it returns is JSON and the trial's result.
        rank: Of this process.
        ranks: How many there are.
        connection: To the parent.
        request: ``payload``, ``environment``, ``threads`` and ``port`` of the rendezvous.
    """
    status = 1
    channel = Channel(rank, connection)
    try:
        try:
            _settle(rank, ranks, request)
            channel.end({"result": function(request["payload"], channel)})
            status = 0
        except BaseException as error:
            at = time.monotonic()  # before the traceback is written: which rank was the first is decided by it
            last = {**last_words(error), "at": at}
            with contextlib.suppress(Exception):
                traceback.print_exception(error, file=sys.stderr)
            channel.end(last)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    finally:
        # Without the exit handlers: those that were registered before the fork belong to the server.
        os._exit(status)


def _settle(rank: int, ranks: int, request: dict[str, Any]) -> None:
    """Streams, environment and threads of a rank."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # some libraries put their own in its place
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    faulthandler.enable(2)  # a crash in native code leaves a traceback in the log
    with contextlib.suppress(OSError):
        # When memory is short the kernel is to end a trial and not the search.
        Path("/proc/self/oom_score_adj").write_text("500")
    os.environ.update(request["environment"])
    for name in TORCHRUN:
        os.environ.pop(name, None)
    if ranks > 1:
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])})
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"})
        os.environ.update({"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "trial"})
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(request["threads"])
    if "lightning_utilities.core.rank_zero" in sys.modules:
        # Lightning asked the environment for it when it was imported, and that was before the fork.
        sys.modules["lightning_utilities.core.rank_zero"].rank_zero_only.rank = rank


def last_words(error: BaseException) -> dict[str, str]:
    """The sentence and the class name of what was at the bottom of an exception."""
    cause = root_cause(error)
    name = type(cause).__name__
    reason = " ".join(str(cause).split()) or name
    if not isinstance(cause, ImportError | AttributeError):  # they would be taken for the mistake of a class_path
        with contextlib.suppress(Exception):  # the sentence is made from patterns of other libraries' texts
            reason = one_sentence(cause)
    if isinstance(cause, KeyError) or (" " not in reason and reason != name and not isinstance(cause, UserError)):
        reason = f"{name}: {reason}"  # the text of a KeyError is the key alone
    return {"reason": reason, "exception": "UserError" if isinstance(cause, UnsupportedError) else name}


def die_with_parent(parent: int, number: int) -> None:
    """Get a signal when the parent dies, and end at once if it already has.

    Args:
        parent: Its process id.
        number: The signal. It is sent when the *thread* ends that started this process.
    """
    _libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(call: str, parent: int, descriptor: int) -> None:
    """Become the server.

    Args:
        call: ``module:function``.
        parent: Process id of who started this.
        descriptor: Of the socket to it.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what the parent blocks or ignores is no matter of ours
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Not SIGKILL: of what the ranks have started only the server can know. While it imports there is none, and the
    # signal ends it at once.
    die_with_parent(parent, signal.SIGTERM)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    link = socket.socket(fileno=descriptor)
    link.set_inheritable(False)
    sys.path += [entry for entry in json.loads(link.recv(1 << 20)) if entry not in sys.path]
    module, name = call.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except BaseException as error:
        traceback.print_exc()
        link.send(json.dumps(last_words(error)).encode())
        raise SystemExit(1) from None
    gc.collect()
    gc.freeze()  # children do not touch, and so do not copy, what was imported
    server = Server(function, link)
    link.send(b"{}")
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
