"""What the trial server of the tests calls: light, so that a server starts at once. torch is in `torch_ranks`."""

import builtins
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

WORKER = "import sys, time; time.sleep(600)"


def life(payload, channel):
    """Call the function that the payload names, with this rank's arguments: one life for all, or one a rank."""
    lives = payload["lives"]
    name, *arguments = lives[channel.rank] if len(lives) > 1 else lives[0]
    return LIVES[name](channel, *arguments)


def back(channel, value):
    return value


def environment(channel, *names):
    return {name: os.environ.get(name) for name in names}


def share_environment(channel, directory, *names):
    """Each rank writes what it sees; rank 0 answers when all have."""
    Path(directory, f"{channel.rank}.tmp").write_text(json.dumps(environment(channel, *names)))
    Path(directory, f"{channel.rank}.tmp").rename(Path(directory, f"{channel.rank}.json"))
    files = [Path(directory, f"{rank}.json") for rank in range(int(os.environ["WORLD_SIZE"]))]
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    return {"seen": [json.loads(file.read_text()) for file in files]}


def ask(channel, questions):
    channel.send({"begin": True})
    return {"answers": [channel.ask({"step": step, "value": step / 10}) for step in range(questions)]}


def beat(channel, times, pause):
    for _ in range(times):
        channel.beat()
        time.sleep(pause)
    return {"beats": times}


def fail(channel, name, text, pause=0.0, cause=None):
    time.sleep(pause)
    kind = getattr(builtins, name, None) or type(name, (RuntimeError,), {})
    raise kind(text) from (None if cause is None else ValueError(cause))


def hang(channel):
    print("hangs", flush=True)
    time.sleep(600)


def kill_itself(channel, number, pause=0.0):
    time.sleep(pause)
    os.kill(os.getpid(), number)
    time.sleep(600)


def leave(channel, status):
    os._exit(status)


def end_badly(channel, status):
    """The last message, and then another status than that of a good end."""
    channel.end({"result": None})
    os._exit(status)


def talk(channel):
    print("to stdout", channel.rank)
    print("to stderr", file=sys.stderr)
    os.write(1, b"to the descriptor\n")
    raise ZeroDivisionError("what went wrong")


def start_worker(channel, then, *arguments):
    """A process that outlives its rank when nobody ends it, as a data loader's worker does."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER])
    channel.send({"pids": [os.getpid(), worker.pid], "server": os.getppid()})
    return LIVES[then](channel, *arguments)


def fork_orphan(channel):
    """A forked worker whose parent ends without waiting for it."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    return {"pid": pid}


def descriptors(channel):
    """What this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return {"open": sorted(re.sub(r":\[\d+\]", "", each) for each in found)}


def meet(channel, directory, number, guests):
    """Wait until so many trials are here."""
    Path(directory, str(number)).touch()
    while len(list(Path(directory).iterdir())) < guests:
        time.sleep(0.01)
    return {"number": number}


def wait_for(channel, path, pause):
    while not Path(path).exists():
        time.sleep(0.01)
    time.sleep(pause)


def take_port(channel, taken):
    """As torch does when the port of the rendezvous is taken: so often, counted in a file."""
    if channel.rank > 0:
        return None
    file = Path(taken)
    tries = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(tries))
    if tries < 3:
        raise RuntimeError(f"port: {os.environ['MASTER_PORT']}, name: EADDRINUSE, message: address already in use")
    return {"tries": tries, "port": os.environ["MASTER_PORT"]}


def measure(channel, text):
    return {"length": len(text), "end": text[-3:], "text": text}


LIVES = {
    function.__name__: function
    for function in (
        *(back, environment, share_environment, ask, beat, fail, hang, kill_itself, leave, end_badly, talk, meet),
        *(wait_for, start_worker, fork_orphan, descriptors, take_port, measure),
    )
}
