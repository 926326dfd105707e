"""What a process of a command sets up for itself: rank, messages, memory."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from types import FrameType
from typing import TextIO

from lightning_automl.mistakes import ending


def rank() -> int:
    """Global rank of this process, 0 when it is the only one."""
    # Lightning knows it, once it is imported; what does without Lightning is one process.
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    return int(getattr(getattr(lightning, "rank_zero_only", None), "rank", 0))


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to stderr, or on a terminal above the progress bar that rich keeps there."""

    def emit(self, record: logging.LogRecord) -> None:
        if not sys.stderr.isatty():
            super().emit(record)
            return
        from rich import get_console  # the one that Lightning's progress bar uses

        get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def exit_status(act: Callable[[], object]) -> int:
    """Do what a command does and return its exit status: 0 done, 1 it failed, 2 a mistake in what was given.

    A ``SIGTERM`` ends it as Ctrl-C does, so that nothing that it has started outlives it.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        act()
    except SystemExit as error:  # --help
        return int(error.code or 0)
    except BaseException as error:
        status, sentence = ending(error)
        print(sentence, file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _File(logging.FileHandler):
    """Says nothing of a message that cannot be written: on a full disk, what is being done will meet and tell that."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Pass over it."""

    def close(self) -> None:
        """Close the file, whatever of it could not be written."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def messages() -> Iterator[Callable[[Path], None]]:
    """Show the messages of this package on the terminal and keep them, Lightning's and ``warnings`` for a file.

    On rank 0 alone; other ranks are silent.

    Yields:
        To be called with the path of the file as soon as it is known; what came before is then written to it as well.
    """
    if rank() != 0:
        warnings.simplefilter("ignore")
        yield lambda path: None
        return
    to_terminal = _Terminal()
    to_terminal.setLevel(logging.INFO)
    to_file = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    logging.captureWarnings(True)
    # Lightning 2.6.6 calls what torch 2.14 deprecates, at every batch structure that it looks at.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
    own = logging.getLogger("lightning_automl")
    own.setLevel(logging.DEBUG)
    sinks: dict[logging.Logger, tuple[logging.Handler, ...]] = {own: (to_file, to_terminal)}
    sinks |= {logging.getLogger(name): (to_file,) for name in ("lightning.pytorch", "py.warnings")}

    def write_to(path: Path) -> None:
        file = _File(path, encoding="utf-8", errors="backslashreplace")  # file names may be any bytes
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        to_file.setTarget(file)
        to_file.flush()
        to_file.capacity = 1  # from now on each message is written at once

    for logger, handlers in sinks.items():
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield write_to
    finally:
        logging.captureWarnings(False)
        for logger, handlers in sinks.items():
            for handler in handlers:
                logger.removeHandler(handler)
        if to_file.target is not None:
            to_file.target.close()
        to_file.close()


def see_working_directory() -> None:
    """Let classes that lie beside somebody's configs be imported."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of giving them back to the kernel after every step.

    Each step would otherwise pay the page faults of all its activations again. How much that is depends on network and
    machine: nothing measurable for a ResNet-20 in ``benchmarks/training_overhead``, about a quarter of a step for
    networks of many small operations on processors with AMX. Does nothing on other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        for parameter in (threshold, trim):
            library.mallopt(parameter, 1 << 30)
