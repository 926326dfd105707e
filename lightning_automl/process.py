"""What a process of a command sets up for itself: rank, messages, memory."""

import contextlib
import ctypes
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only


def rank() -> int:
    """Global rank of this process, 0 when it is the only one."""
    return int(getattr(rank_zero_only, "rank", 0))


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the messages of this package, of Lightning and of ``warnings`` to ``path`` and the terminal, on rank 0."""
    if rank() != 0:
        warnings.simplefilter("ignore")
        yield
        return
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    to_terminal = logging.StreamHandler()
    to_terminal.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # Lightning 2.6.6 calls what torch 2.14 deprecates, at every batch structure that it looks at.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
    own = logging.getLogger("lightning_automl")
    own.setLevel(logging.DEBUG)
    sinks: dict[logging.Logger, tuple[logging.Handler, ...]] = {own: (to_file, to_terminal)}
    sinks |= {logging.getLogger(name): (to_file,) for name in ("lightning.pytorch", "py.warnings")}
    for logger, handlers in sinks.items():
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers in sinks.items():
            for handler in handlers:
                logger.removeHandler(handler)
        to_file.close()


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
