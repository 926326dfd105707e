"""Two real processes that stand for two GPUs: a test file run twice, started from outside as torchrun starts ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed

TESTS = Path(__file__).parent


def run_twice(file, folder, *flags, timeout=300):
    """Run ``file`` as rank 0 and as rank 1 in ``folder``, where ``log0`` and ``log1`` get what they print.

    Args:
        file: The test file; in each process it is ``__main__``.
        folder: Working directory of both.
        flags: Of Python.
        timeout: Seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    processes = []
    for rank in range(2):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        command = [sys.executable, *flags, file]
        with (folder / f"log{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, stdout=log, stderr=log)
            )
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "".join((folder / f"log{rank}").read_text() for rank in range(2))


def part():
    """End a rank; with gloo's threads still at work it would sometimes be aborted ("terminate called without …")."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
