import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_automl.rundir import UnsupportedError
from lightning_automl.search import trials
from lightning_automl.search.server import last_words
from lightning_automl.search.trials import Ending, TrialServer

HERE = str(Path(__file__).parent)
VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    *("TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "COLOUR"),
)


class Trials:
    """Runs trials of `ranks.life` on a server: one life a rank."""

    def __init__(self, server, directory):
        self.server = server
        self.log = directory / "log.txt"
        self.messages = []

    def on_message(self, message):
        self.messages.append(message)
        return message.get("step")

    def __call__(self, *lives, **keys):
        keys = {"ranks": len(lives), "threads": 1, "log": self.log, "on_message": self.on_message, **keys}
        return self.server.run({"lives": lives}, **keys)

    def pids(self):
        return [pid for message in self.messages for pid in message.get("pids", ())]


@pytest.fixture(scope="module")
def shared_server():
    with TrialServer("ranks:life", {"PYTHONPATH": HERE}) as server:
        yield server


@pytest.fixture
def run(shared_server, tmp_path):
    return Trials(shared_server, tmp_path)


@pytest.fixture
def run_alone(tmp_path):
    """On a server that a test may kill."""
    with TrialServer("ranks:life", {"PYTHONPATH": HERE}) as server:
        yield Trials(server, tmp_path)


@pytest.fixture(scope="module")
def torch_server():
    with TrialServer("torch_ranks:convolve", {"PYTHONPATH": HERE}) as server:
        yield server


def state(pid):
    """The letter of a process, None when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def children(pid):
    """Process ids and states of what has this parent."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            letter, parent = file.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid:
                found[int(file.parent.name)] = letter
    return found


def wait_until_gone(*pids):
    """A zombie that the machine's init process has not looked at yet is gone as well."""
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if state(pid) not in (None, "Z")]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.02)


def test_what_the_function_returns_on_rank_0_is_the_result(run):
    assert run(["back", {"accuracy": 0.5}]) == Ending("done", {"accuracy": 0.5})
    assert run(["back", {"accuracy": 0.5}], ["back", None], ["back", {"other": 1}]) == Ending("done", {"accuracy": 0.5})


def test_rank_0_asks_and_gets_what_on_message_returns(run):
    assert run(["ask", 3], ["back", None]) == Ending("done", {"answers": [0, 1, 2]})
    assert run.messages == [{"begin": True}, *({"step": step, "value": step / 10} for step in range(3))]


def test_a_payload_and_a_result_of_a_megabyte_arrive(run):
    text = "größer" * 200_000
    assert run(["measure", text]).result == {"length": len(text), "end": "ßer", "text": text}


def test_values_that_only_python_writes_as_json_arrive(run):
    assert math.isnan(run(["back", {"loss": math.nan}]).result["loss"])


def test_each_rank_sees_what_torchrun_would_set(run, tmp_path):
    ending = run(
        *[["share_environment", str(tmp_path), *VARIABLES]] * 2, ranks=2, threads=3, environment={"COLOUR": "red"}
    )
    first, second = ending.result["seen"]
    port = first.pop("MASTER_PORT")
    assert second.pop("MASTER_PORT") == port
    assert 1024 <= int(port) < 65536
    common = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    common |= {"TORCHELASTIC_RUN_ID": "trial", "OMP_NUM_THREADS": "3", "COLOUR": "red"}
    assert first == {**common, "RANK": "0", "LOCAL_RANK": "0"}
    assert second == {**common, "RANK": "1", "LOCAL_RANK": "1"}


def test_a_single_rank_sees_nothing_of_torchrun_even_when_the_search_was_started_by_it(run):
    around = {"RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "outer", "COLOUR": "blue"}
    seen = run(["environment", *VARIABLES], environment=around).result
    assert {name for name, value in seen.items() if value is not None} == {"OMP_NUM_THREADS", "COLOUR"}
    assert run(["environment", "COLOUR"]).result == {"COLOUR": None}  # one trial's variables are not the next one's


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("OutOfMemoryError", "CUDA out of memory.\n  Tried to allocate", "CUDA out of memory. Tried to allocate"),
        ("KeyError", "width", "KeyError: 'width'"),
        ("AssertionError", "", "AssertionError"),
        ("SystemExit", "3", "SystemExit: 3"),
        ("KeyboardInterrupt", "", "KeyboardInterrupt"),
    ],
)
def test_what_is_raised_is_the_reason(run, name, text, reason):
    assert run(["fail", name, text]) == Ending("failed", None, reason, name)


def test_the_reason_is_the_root_of_what_is_raised(run):
    ending = run(["fail", "RuntimeError", "something went wrong", 0, "the images are missing"])
    assert ending == Ending("failed", None, "the images are missing", "ValueError")


def test_what_a_module_does_not_support_is_told_as_a_mistake_of_the_user():
    words = last_words(UnsupportedError("a norm has no adapter"))
    assert words == {"reason": "a norm has no adapter", "exception": "UserError"}


def test_a_result_that_is_no_json_is_a_failure(tmp_path):
    (tmp_path / "odd.py").write_text("def life(payload, channel):\n    return {'a': {1, 2}}\n")
    with TrialServer("odd:life", {"PYTHONPATH": str(tmp_path)}) as server:
        ending = Trials(server, tmp_path)(["back"])
    assert ending == Ending("failed", None, "Object of type set is not JSON serializable", "TypeError")


@pytest.mark.parametrize("late", [0, 1])
def test_a_connection_that_closed_is_not_the_reason_when_another_rank_has_one(run, late):
    """Whichever comes first."""
    lives = [
        ["fail", "RuntimeError", "[pair.cc:534] Connection closed by peer [127.0.0.1]:1", 0.3 * (late == 0)],
        ["fail", "ValueError", "rank 1 had enough", 0.3 * (late == 1)],
    ]
    assert run(*lives) == Ending("failed", None, "rank 1 had enough", "ValueError")


def test_a_death_without_a_word_is_the_reason_and_not_what_others_say_about_it(run):
    ending = run(["fail", "DistBackendError", "NCCL communicator was aborted"], ["kill_itself", 9, 0.3])
    assert ending.reason.startswith("rank 1 was killed by signal 9 (SIGKILL)")
    assert ending.exception == ""


def test_of_two_real_failures_the_first_in_time_is_the_reason(run):
    ending = run(["fail", "ValueError", "the second", 0.5], ["fail", "KeyError", "the first"])
    assert ending.reason == "KeyError: 'the first'"


def test_a_failing_rank_takes_one_that_hangs_with_it(run, monkeypatch):
    monkeypatch.setattr(trials, "GRACE", 0.3)
    assert run(["start_worker", "hang"], ["fail", "ValueError", "boom boom"]).reason == "boom boom"
    assert [state(pid) for pid in run.pids()] == [None, None]


@pytest.mark.parametrize(
    ("life", "reason"),
    [
        (["kill_itself", 9], "rank 0 was killed by signal 9 (SIGKILL), perhaps by the kernel for lack of memory"),
        (["kill_itself", 11], "rank 0 was killed by signal 11 (SIGSEGV)"),
        (["kill_itself", 15], "rank 0 was killed by signal 15 (SIGTERM)"),
        (["kill_itself", 40], "rank 0 was killed by signal 40 (real-time)"),
        (["leave", 0], "rank 0 ended without a result"),
        (["leave", 7], "rank 0 ended with status 7 and without a result"),
        (["end_badly", 7], "rank 0 ended with status 7 after its result"),
    ],
)
def test_a_process_that_ends_without_its_last_message_has_failed(run, life, reason):
    assert run(life) == Ending("failed", None, reason, "")


def test_another_rank_that_ends_without_its_last_message_has_failed(run):
    assert run(["back", {}], ["leave", 0]).reason == "rank 1 ended without a result"


def test_a_crash_in_native_code_leaves_its_place_in_the_log(run):
    run(["kill_itself", 11])
    assert "Segmentation fault" in run.log.read_text()
    assert "in kill_itself" in run.log.read_text()


def test_a_rank_that_hangs_is_killed_with_its_group(run):
    ending = run(["start_worker", "beat", 10_000, 0.1], ["start_worker", "hang"], silence=3.0)
    assert ending == Ending("failed", None, "rank 1 was silent for 3 s (killed)", "")
    assert [state(pid) for pid in run.pids()] == [None] * 4


def test_beats_break_the_silence_and_are_told_to_nobody(run):
    assert run(["beat", 12, 0.5], silence=4.0) == Ending("done", {"beats": 12})
    assert run.messages == []


def test_the_time_of_an_answer_is_nobodys_silence(run, tmp_path):
    """As rank 1 waits for what rank 0 asks."""

    def slowly(message):
        if "step" in message:
            time.sleep(5)
            (tmp_path / "answered").touch()

    ending = run(["ask", 1], ["wait_for", str(tmp_path / "answered"), 0.5], silence=4.0, on_message=slowly)
    assert ending == Ending("done", {"answers": [None]})


def test_a_trial_that_takes_too_long_is_killed(run):
    ending = run(["start_worker", "beat", 10_000, 0.1], timeout=3.0)
    assert ending == Ending("failed", None, "the trial took longer than 3 s (killed)", "")
    assert [state(pid) for pid in run.pids()] == [None, None]


def test_a_rank_that_does_not_end_after_rank_0_is_killed(run, monkeypatch):
    monkeypatch.setattr(trials, "LEAVING", 2.0)
    ending = run(["back", {}], ["start_worker", "hang"])
    assert ending == Ending("failed", None, "rank 1 had not ended 2 s after rank 0 (killed)", "")
    assert [state(pid) for pid in run.pids()] == [None, None]


def test_a_stopped_trial_is_killed(run):
    stop = threading.Event()

    def on_message(message):
        run.messages.append(message)
        stop.set()

    assert run(["start_worker", "hang"], stop=stop, on_message=on_message) == Ending("failed", None, "interrupted", "")
    assert [state(pid) for pid in run.pids()] == [None, None]
    assert run(["back", {}], stop=stop).reason == "interrupted"


def test_what_on_message_raises_ends_the_trial_and_is_raised(run):
    def on_message(message):
        run.messages.append(message)
        raise LookupError("the study is gone")

    with pytest.raises(LookupError, match="the study is gone"):
        run(["start_worker", "hang"], ["hang"], on_message=on_message)
    assert [state(pid) for pid in run.pids()] == [None, None]


def test_an_answer_that_is_no_json_is_raised(run):
    with pytest.raises(TypeError, match="not JSON serializable"):
        run(["ask", 1], on_message=lambda message: {1, 2})


def test_workers_that_a_finished_trial_leaves_are_killed(run):
    ending = run(["fork_orphan"])
    assert ending.kind == "done"
    assert state(ending.result["pid"]) is None


def test_the_log_has_what_is_printed_and_the_traceback_and_is_appended_to(run):
    run.log.write_text("before\n")
    run(["talk"])
    run(["talk"])
    text = run.log.read_text()
    assert text.startswith("before\n")
    for line in ("to stdout 0\n", "to stderr\n", "to the descriptor\n", "ZeroDivisionError: what went wrong\n"):
        assert text.count(line) == 2


def test_a_log_that_cannot_be_opened_is_an_error_before_anything_starts(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        run(["back", {}], log=tmp_path / "nowhere" / "log.txt")


def test_a_payload_that_is_no_json_is_an_error_before_anything_starts(run):
    with pytest.raises(TypeError, match="not JSON serializable"):
        run(["back", {1, 2}])


def test_a_rank_has_nothing_open_but_the_log_and_its_channel(run, tmp_path):
    """Also not what belongs to a trial that runs beside it."""
    (tmp_path / "party").mkdir()
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(run, ["meet", str(tmp_path / "party"), 0, 2], ["back", {}], log=tmp_path / "other.txt")
        while not (tmp_path / "party" / "0").exists():
            time.sleep(0.01)
        found = run(["descriptors"])
        (tmp_path / "party" / "1").touch()
        assert beside.result().kind == "done"
    assert found.result == {"open": sorted(["/dev/null", str(run.log), str(run.log), "socket"])}


def test_a_port_that_is_taken_is_replaced_by_another(run, tmp_path):
    ending = run(*[["take_port", str(tmp_path / "tries")]] * 2)
    assert ending.result["tries"] == 3
    used = re.findall(r"^RuntimeError: port: (\d+)", run.log.read_text(), re.MULTILINE)
    assert len(used) == 2
    assert len({ending.result["port"], *used}) == 3


def test_a_port_that_stays_taken_is_the_reason(run, monkeypatch, tmp_path):
    monkeypatch.setattr(trials, "PORTS", 2)
    assert run(*[["take_port", str(tmp_path / "tries")]] * 2).reason.endswith("address already in use")
    assert (tmp_path / "tries").read_text() == "2"


def test_an_address_in_use_after_training_has_begun_is_not_tried_again(run):
    ending = run(["start_worker", "fail", "OSError", "Address already in use"], ["back", None])
    assert ending.reason == "Address already in use"
    assert len(run.messages) == 1


def test_trials_of_several_threads_run_at_once(run, tmp_path):
    (tmp_path / "party").mkdir()
    with ThreadPoolExecutor(4) as pool:
        endings = pool.map(lambda number: run(["meet", str(tmp_path / "party"), number, 4]), range(4))
        assert [ending.result for ending in endings] == [{"number": number} for number in range(4)]


def test_a_server_that_was_killed_ends_its_trials_and_a_new_one_is_started(run_alone):
    run = run_alone

    def kill_server(message):
        run.messages.append(message)
        os.kill(message["server"], signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:  # the thread that notices ends before the new server works
        ending = pool.submit(run, ["start_worker", "hang"], ["hang"], on_message=kill_server).result()
        assert ending == Ending("failed", None, "the trial server died", "")
        wait_until_gone(*run.pids())
        assert pool.submit(run, ["back", {"new": True}]).result() == Ending("done", {"new": True})
    run.messages.clear()
    for _ in range(2):
        assert run(["start_worker", "back", {}]).kind == "done"
    assert run.messages[0]["server"] == run.messages[1]["server"]


def test_closing_kills_what_runs_in_other_threads(tmp_path):
    started = threading.Event()

    def on_message(message):
        run.messages.append(message)
        started.set()

    with ThreadPoolExecutor(1) as pool, TrialServer("ranks:life", {"PYTHONPATH": HERE}) as server:
        run = Trials(server, tmp_path)
        running = pool.submit(run, ["start_worker", "hang"], on_message=on_message)
        assert started.wait(60)
        server.close()
        assert [state(pid) for pid in run.pids()] == [None, None]
        assert running.result() == Ending("failed", None, "interrupted", "")
        assert state(run.messages[0]["server"]) is None
        assert run(["back", {}]).reason == "interrupted"


def test_thirty_trials_leave_no_process_and_no_descriptor(run):
    run(["start_worker", "back", {}])
    server = run.messages[0]["server"]

    def held():
        """Open descriptors here and in the server; what belonged to the last trial may still be among them."""
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), server)]

    before = held()
    for number in range(30):
        lives = (["back", {}], ["leave", 3], ["fail", "ValueError", "boom boom"])[number % 3]
        run(lives, ["fork_orphan"])
    here, there = held()
    assert here == before[0]
    assert there <= before[1] + 5
    assert children(server) == {}
    assert "Z" not in children(os.getpid()).values()


PARENT = """
import json, os, sys, threading, time
from pathlib import Path
from lightning_automl.search.trials import TrialServer

def run(server):
    lives = [["start_worker", "hang"], ["start_worker", "hang"]]
    ending = server.run({"lives": lives}, ranks=2, threads=1, log=Path(sys.argv[1]), on_message=tell)
    tell({"reason": ending.reason})

def tell(message):
    print(json.dumps(message), flush=True)

with TrialServer("ranks:life") as server:
    server._wait_for_server(None)
    if sys.argv[2] == "fork":  # a child of the search that has its sockets, so that the server sees no end of them
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        tell({"child": pid})
    if sys.argv[2] == "threads":
        threads = [threading.Thread(target=run, args=[server], daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        run(server)
"""


@pytest.fixture
def search(tmp_path):
    """Start a process that runs trials of two ranks that hang, each with a worker."""
    started = []

    def start(how):
        path = os.pathsep.join([HERE, str(Path(HERE).parent.parent)])
        command = [sys.executable, "-c", PARENT, str(tmp_path / "log.txt"), how]
        environment = {**os.environ, "PYTHONPATH": path}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=environment, **streams))
        return started[0]

    yield start
    with started[0]:
        started[0].kill()


def hear(parent):
    return json.loads(parent.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("how", ["main", "threads"])
def test_nothing_outlives_a_search_that_was_killed(search, number, how):
    parent = search(how)
    messages = [hear(parent) for _ in range(2 if how == "main" else 4)]
    pids = {pid for message in messages for pid in (*message["pids"], message["server"])}
    assert len(pids) == (5 if how == "main" else 9)
    assert all(state(pid) not in (None, "Z") for pid in pids)
    parent.send_signal(number)
    wait_until_gone(*pids)


def test_nothing_outlives_a_search_whose_sockets_a_child_has(search):
    parent = search("fork")
    child = hear(parent)["child"]
    pids = {pid for message in (hear(parent), hear(parent)) for pid in (*message["pids"], message["server"])}
    parent.kill()
    try:
        wait_until_gone(*pids)
    finally:
        os.kill(child, signal.SIGKILL)


def test_ranks_die_with_their_server_even_when_the_search_does_nothing(search):
    parent = search("main")
    messages = [hear(parent), hear(parent)]
    ranks, workers = zip(*(message["pids"] for message in messages), strict=True)
    parent.send_signal(signal.SIGSTOP)
    os.kill(messages[0]["server"], signal.SIGKILL)
    wait_until_gone(*ranks)
    parent.send_signal(signal.SIGCONT)
    assert hear(parent) == {"reason": "the trial server died"}
    wait_until_gone(*workers)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("ranks:nothing", "the trial server cannot import ranks:nothing: module 'ranks' has no attribute 'nothing'"),
        ("nowhere:life", "the trial server cannot import nowhere:life: No module named 'nowhere'"),
        ("ends:life", "the trial server ended with status 7 while it imported ends"),
    ],
)
def test_a_server_that_cannot_import_is_an_error(call, reason, tmp_path, capfd):
    (tmp_path / "ends.py").write_text("import os\nos._exit(7)\n")
    with TrialServer(call, {"PYTHONPATH": os.pathsep.join([HERE, str(tmp_path)])}) as server:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=reason):
                Trials(server, tmp_path)(["back", {}])
    capfd.readouterr()


def test_a_server_with_threads_does_not_fork(tmp_path):
    text = (
        "import threading\nfrom ranks import life\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    (tmp_path / "threaded.py").write_text(text)
    with TrialServer("threaded:life", {"PYTHONPATH": os.pathsep.join([HERE, str(tmp_path)])}) as server:
        ending = Trials(server, tmp_path)(["back", {}])
    assert ending.reason.startswith("the trial server has 2 threads and cannot fork safely; ")


def test_a_server_that_is_closed_while_it_imports_ends(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)")
    with TrialServer("slow:life", {"PYTHONPATH": str(tmp_path)}) as server:
        stop = threading.Event()
        threading.Timer(0.5, stop.set).start()
        assert Trials(server, tmp_path)(["back", {}], stop=stop).reason == "interrupted"


def test_a_class_beside_the_caller_is_found_by_the_server(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def life(payload, channel):\n    return payload\n")
    monkeypatch.syspath_prepend(tmp_path)
    with TrialServer("mine:life") as server:
        assert Trials(server, tmp_path)(["back"]).result == {"lives": [["back"]]}


def test_lightning_knows_the_rank_although_it_was_imported_before_there_were_ranks(tmp_path):
    (tmp_path / "lit.py").write_text("""
from lightning_utilities.core.rank_zero import rank_zero_only

rank_zero_only.rank = 0  # as Lightning does when it is imported

def life(payload, channel):
    channel.send({"rank": channel.rank, "known": rank_zero_only.rank})
""")
    with TrialServer("lit:life", {"PYTHONPATH": str(tmp_path)}) as server:
        run = Trials(server, tmp_path)
        assert run([], []).kind == "done"
    assert sorted(each["known"] for each in run.messages) == [0, 1]
    assert all(each["known"] == each["rank"] for each in run.messages)


def test_a_convolution_with_two_threads_works_after_the_fork(torch_server, tmp_path):
    keys = {"ranks": 1, "log": tmp_path / "log.txt", "on_message": print, "timeout": 120}
    for threads in (1, 2):
        ending = torch_server.run({}, threads=threads, **keys)
        assert ending.kind == "done", ending.reason
        assert ending.result["value"] == 8 * 9 + 1
        assert ending.result["threads"] == threads
        assert ending.result["tasks"] >= threads


def test_two_ranks_reduce_and_the_raising_one_is_the_reason(tmp_path, monkeypatch):
    keys = {"ranks": 2, "threads": 1, "log": tmp_path / "log.txt", "timeout": 120}
    sums = []
    both = [{"rank": 0, "sum": 3.0}, {"rank": 1, "sum": 3.0}]
    with TrialServer("torch_ranks:reduce", {"PYTHONPATH": HERE}) as server:
        ending = server.run({}, on_message=sums.append, **keys)
        assert ending == Ending("done", {"sum": 3.0})
        assert sorted(sums, key=lambda each: each["rank"]) == both

        ending = server.run({"fails": 1}, on_message=sums.append, **keys)
        assert ending == Ending("failed", None, "rank 1 had enough", "ValueError")
        assert trials.CONSEQUENCE.search((tmp_path / "log.txt").read_text())  # what rank 0 said about it

        sums.clear()
        with socket.create_server(("", 0)) as taken:
            free = trials.free_port()
            ports = iter([taken.getsockname()[1], free])
            monkeypatch.setattr(trials, "free_port", lambda: next(ports))
            assert server.run({}, on_message=sums.append, **keys) == Ending("done", {"sum": 3.0})
        assert "EADDRINUSE" in (tmp_path / "log.txt").read_text()
        assert sorted(sums, key=lambda each: each["rank"]) == both
