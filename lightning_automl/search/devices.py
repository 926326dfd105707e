"""Which GPUs and how many threads each worker of a search has."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_automl.rundir import UserError

#: Where there is none of these, there is no GPU, and torch need not be asked: NVIDIA, in WSL, AMD.
DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")


class Slice(NamedTuple):
    """What one worker's trials may use.

    Args:
        gpus: For ``CUDA_VISIBLE_DEVICES``: indices or UUIDs.
        threads: Of each rank.
    """

    gpus: tuple[str, ...]
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the trial's processes."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}


def slices(workers: int, ranks: int, gpus: Sequence[str], cores: int) -> list[Slice]:
    """Divide the machine among workers that each run one trial at a time.

    Every worker gets as much as every other, so that trials can be compared; a remainder stays unused. With more ranks
    than cores each still gets a thread: the processes then share the cores, which is slow but right.

    Args:
        workers: How many trials run at once, at least 1.
        ranks: Processes of a trial, at least 1; each needs a GPU of its own where there are GPUs.
        gpus: What :func:`visible_gpus` found; empty for trials on CPUs.
        cores: Of the machine, or as many of them as may be used.

    Returns:
        A slice for each worker.

    Raises:
        UserError: If there are GPUs, but too few for so many workers, or nothing is asked for.
    """
    if workers < 1 or ranks < 1:
        raise UserError(f"{workers} workers with trials of {ranks} ranks do nothing; both are at least 1")
    each = len(gpus) // workers
    if gpus and each < ranks:
        possible = len(gpus) // ranks
        todo = f"at most {possible} workers" if possible else f"at most {len(gpus)} ranks, by fewer trainer.devices"
        raise UserError(
            f"workers: {workers} with trials of {ranks} ranks would need {workers * ranks} GPUs, "
            f"and there are {len(gpus)} ({', '.join(gpus)}); possible: {todo}"
        )
    threads = max(1, cores // (workers * ranks))
    return [Slice(tuple(gpus[worker * each : (worker + 1) * each]), threads) for worker in range(workers)]


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them: indices or UUIDs.

    Where there is no driver the answer is immediate. Else torch counts, in a process of its own: this one neither
    imports it nor starts CUDA.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None and (not given.strip() or given.strip().startswith("-")):
        return ()
    if not any(Path(driver).exists() for driver in DRIVERS):
        return ()
    count = _count()
    names = [str(index) for index in range(count)] if given is None else [name.strip() for name in given.split(",")]
    return tuple(names[:count])


def _count() -> int:
    code = "import torch; print(torch.cuda.device_count())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = ran.stdout.split()
    return int(lines[-1]) if ran.returncode == 0 and lines else 0
