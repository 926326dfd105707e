"""Storages: what each URL opens, what a wrong one says, and that several processes can share one."""

import errno
import importlib.util
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from lightning_automl.rundir import DiskFullError, UserError
from lightning_automl.search import storages
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import JournalLock, file_system, is_disk_full, open_storage, telling_full_disks
from lightning_automl.search.study import open_study, search
from lightning_automl.search.trials import free_port
from lightning_automl.search.workers import counts, end_trial

# A process that takes part in a study of several, and scores nothing before all do.
WORKER = """
import sys
import time
from pathlib import Path
from optuna.samplers import RandomSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import open_study, search

url, trials, processes, seed = sys.argv[1], *map(int, sys.argv[2:])
space = Space.parse({"x": {"float": [0, 1]}})
storage, _ = open_storage(url, Path("."))
study, _ = open_study("shared", storage, ["minimize"], RandomSampler(seed=seed), None, space=space)

def score(candidate):
    while len({trial.user_attrs.get("worker", {}).get("pid") for trial in study.get_trials()} - {None}) < processes:
        time.sleep(0.02)  # however long the others take to start
    candidate.report(1, candidate.values["x"])
    time.sleep(0.02)
    return candidate.values["x"]

search(study, space, score, trials=trials, beat=0.5)
"""


def share(url, trials=20, processes=2):
    """Let several processes work on one study; return it."""
    command = [sys.executable, "-c", WORKER, url, str(trials), str(processes)]
    started = [subprocess.Popen([*command, str(seed)], stderr=subprocess.PIPE, text=True) for seed in range(processes)]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    storage, _ = open_storage(url, Path("."))
    return optuna.load_study(study_name="shared", storage=storage, sampler=RandomSampler())


def check_shared(study, trials=20, processes=2):
    found = study.get_trials()
    assert [trial.number for trial in found] == list(range(len(found)))
    assert sum(map(counts, found)) == trials
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE]
    assert len(complete) == trials
    assert len({trial.params["x"] for trial in complete}) == trials
    assert len({trial.user_attrs["worker"]["pid"] for trial in complete}) == processes, "one process did all"
    assert all(trial.value == trial.params["x"] == trial.intermediate_values[1] for trial in complete)


# ---- servers


def wait_for(url):
    for _ in range(5):
        try:
            return open_storage(url, Path("."))[0]
        except UserError:
            time.sleep(1.0)
    return pytest.fail(f"{url} does not answer")


# ---- sharing


@pytest.mark.slow
def test_two_processes_share_an_sqlite_file(tmp_path):
    check_shared(share(f"sqlite:///{tmp_path}/study.db"))


@pytest.mark.slow
def test_two_processes_share_a_journal(tmp_path):
    check_shared(share(f"journal:{tmp_path}/study.journal"))


@pytest.mark.slow
def test_two_processes_share_a_grpc_proxy(proxy):
    wait_for(proxy).close()
    check_shared(share(proxy))


@pytest.mark.slow
def test_two_processes_share_a_postgresql_server(postgres):
    check_shared(share(postgres))


@pytest.fixture(params=["sqlite", "journal", "postgresql", "grpc"])
def opened_four_times(request, tmp_path):
    """One storage of each kind, as four processes have it."""
    if request.param in ("postgresql", "grpc"):
        url = request.getfixturevalue({"postgresql": "postgres", "grpc": "proxy"}[request.param])
        wait_for(url)
    else:
        url = f"journal:{tmp_path}/x" if request.param == "journal" else f"sqlite:///{tmp_path}/x"
    return [open_storage(url, Path("."))[0] for _ in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["end a running trial", "begin a waiting trial"])
def test_of_several_processes_one_does_it(what, opened_four_times):
    # Optuna reads the state and then writes it; where nothing locks in between, several get through.
    name = f"study {what}"
    study = optuna.create_study(study_name=name, storage=opened_four_times[0], sampler=RandomSampler())
    studies = [optuna.load_study(study_name=name, storage=each, sampler=RandomSampler()) for each in opened_four_times]
    for _ in range(10):
        gate = threading.Barrier(4)
        done = []
        if what.startswith("end"):
            number = study.ask().number
        else:
            study.enqueue_trial({})
            number = len(study.get_trials(deepcopy=False)) - 1

        def take(study, gate=gate, done=done, number=number):
            study.get_trials(deepcopy=False)
            gate.wait()
            if what.startswith("end"):
                done.append(end_trial(study, number, TrialState.FAIL))
            else:
                done.append(study.ask().number == number)

        threads = [threading.Thread(target=take, args=(each,)) for each in studies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(done) == [False, False, False, True]


def test_processes_that_make_the_same_file_at_once_all_succeed(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lightning_automl.search.storages import open_storage\n"
        "open_storage(None, Path(sys.argv[1]))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


# ---- opening


def test_by_default_the_study_is_a_file_in_its_directory(tmp_path):
    storage, shown = open_storage(None, tmp_path / "run")
    optuna.create_study(study_name="x", storage=storage, sampler=RandomSampler())
    assert (tmp_path / "run" / "study.db").exists()
    assert shown == f"sqlite:///{tmp_path}/run/study.db"


@pytest.mark.parametrize("name", ["run", "new {0} run", "100% ä"])
def test_the_url_that_is_shown_opens_the_study_with_optuna_alone(name, tmp_path):
    storage, shown = open_storage(None, tmp_path / name)
    optuna.create_study(study_name="x", storage=storage, sampler=RandomSampler()).set_user_attr("a", 1)
    assert optuna.load_study(study_name="x", storage=shown).user_attrs == {"a": 1}


@pytest.mark.parametrize("form", ["journal:{}/a.x", "journal://{}/a.x", "{}/a.journal", "{}/a.log", "journal:a.x"])
def test_forms_of_a_journal(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage, shown = open_storage(form.format(tmp_path), Path("elsewhere"))
    assert isinstance(storage, optuna.storages.JournalStorage)
    optuna.create_study(study_name="x", storage=storage, sampler=RandomSampler())
    again, _ = open_storage(shown, Path("elsewhere"))
    assert optuna.get_all_study_names(again) == ["x"]
    assert shown.startswith(f"journal://{tmp_path}/a.")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("study.db", "unknown storage 'study.db'; for an SQLite file give sqlite:///study.db"),
        ("nonsense", "unknown storage 'nonsense'; known: sqlite:///FILE, journal:FILE, "),
        ("posgresql://me:hidden@h/d", "unknown kind of storage 'posgresql' in posgresql://me:***@h/d; did you mean "),
        ("sqlit:///x", "did you mean sqlite://"),
        ("redis://localhost", "unknown kind of storage 'redis'"),
        ("sqlite://", "an SQLite storage in memory is seen by nobody else"),
        ("sqlite:///:memory:", "an SQLite storage in memory is seen by nobody else"),
        ("journal:", "the storage journal: has no path"),
        ("grpc://", "the storage grpc:// names no host; give it as grpc://HOST:PORT"),
        ("grpc://me:hidden@h:port", "the storage grpc://me:***@h:port is no address"),
        ("mysql://me:hidden@h/d", "mysql:// needs a driver that is not installed"),
        ("postgresql://me:hidden@h:port/d", "the storage postgresql://me:***@h:port/d is not a URL"),
    ],
)
def test_a_wrong_url_is_told_in_one_sentence(url, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        open_storage(url, tmp_path)
    assert "\n" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path):
    (tmp_path / "x.db").write_text("some text, which is long enough to be seen as no database " * 20)
    before = (tmp_path / "x.db").read_bytes()
    with pytest.raises(UserError, match=r"x\.db cannot be used: file is not a database"):
        open_storage(f"sqlite:///{tmp_path}/x.db", tmp_path)
    assert (tmp_path / "x.db").read_bytes() == before


def test_a_database_of_another_optuna_is_told(tmp_path):
    open_storage(None, tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.9.9'")
    connection.close()
    with pytest.raises(
        UserError, match=r"study\.db cannot be used: The runtime optuna version .* no longer compatible"
    ):
        open_storage(None, tmp_path)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for url in (f"sqlite:///{tmp_path}/file/x.db", f"journal:{tmp_path}/file/x", f"sqlite:///{tmp_path}"):
        with pytest.raises(UserError, match="no file can be written at"):
            open_storage(url, tmp_path)


def test_a_server_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(storages, "CONNECT_SECONDS", 1)
    pytest.importorskip("psycopg")
    port = free_port()
    with pytest.raises(UserError, match=r"the storage postgresql.*://me:\*\*\*@.* cannot be used: .*refused") as caught:
        open_storage(f"postgresql://me:hidden@127.0.0.1:{port}/d", Path("."))
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_told(monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr(storages, "CONNECT_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"the storage grpc://localhost:\d+ does not answer; start optuna"):
        open_storage(f"grpc://localhost:{free_port()}", Path("."))


@pytest.mark.parametrize(
    ("url", "extra", "gone"),
    [
        ("grpc://localhost:1", r"lightning-automl\[grpc\]", {"grpc"}),
        ("postgresql://me:hidden@127.0.0.1:1/d", r"lightning-automl\[postgres\]", {"psycopg", "psycopg2"}),
        ("postgresql+psycopg://me:hidden@127.0.0.1:1/d", r"lightning-automl\[postgres\]", {"psycopg", "psycopg2"}),
    ],
)
def test_a_missing_driver_names_the_extra(url, extra, gone, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else found(name))
    for name in gone:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f'pip install "{extra}"'):
        open_storage(url, Path("."))


@pytest.mark.parametrize(
    ("installed", "driver"),
    [({"psycopg"}, "postgresql+psycopg"), ({"psycopg", "psycopg2"}, "postgresql"), ({"psycopg2"}, "postgresql")],
)
def test_postgresql_takes_the_driver_that_is_there(installed, driver, monkeypatch):
    monkeypatch.setattr(storages, "_is_installed", lambda name: name in installed)
    assert storages._with_driver(sqlalchemy.engine.make_url("postgresql://h/d")).drivername == driver
    asked_for = sqlalchemy.engine.make_url("postgresql+pg8000://h/d")
    assert storages._with_driver(asked_for) == asked_for


def test_a_wrong_password_and_an_unknown_database_are_told(postgres):
    wrong = postgres.replace("s3cr%3At%40", "wr%40ng")
    with pytest.raises(UserError, match=r"://me:\*\*\*@.*password authentication failed") as caught:
        open_storage(wrong, Path("."))
    assert "wr@ng" not in str(caught.value)
    assert "wr%40ng" not in str(caught.value)
    with pytest.raises(UserError, match=r'database "nowhere" does not exist'):
        open_storage(postgres.replace("/postgres", "/nowhere"), Path("."))


def test_the_password_of_a_server_is_not_shown(postgres):
    for url in (postgres, postgres.replace("postgresql:", "postgres:")):
        _, shown = open_storage(url, Path("."))
        assert shown.startswith("postgresql+psycopg://me:***@127.0.0.1:")
    user, _, rest = postgres.partition(":s3cr%3At%40")
    _, shown = open_storage(f"{user}{rest}?password=s3cr%3At%40", Path("."))
    assert shown.endswith("/postgres?password=***")


# ---- full disks, journals, file systems


def test_a_full_disk_under_an_sqlite_file_is_told(tmp_path):
    storage, _ = open_storage(None, tmp_path)
    study = optuna.create_study(storage=storage, sampler=RandomSampler())

    @sqlalchemy.event.listens_for(storage._backend.engine, "begin")
    def keep_small(connection):
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill():
        for number in range(1000):
            study.set_user_attr(f"key {number}", "long text " * 200)

    with pytest.raises(DiskFullError, match="no space left for the study; free some"), telling_full_disks():
        fill()


def test_a_full_disk_under_a_journal_is_told_and_leaves_it_whole(tmp_path, monkeypatch):
    storage, url = open_storage(f"journal:{tmp_path}/x", tmp_path)
    study = optuna.create_study(study_name="x", storage=storage, sampler=RandomSampler())
    with monkeypatch.context() as patch:

        def fill(file):
            os.truncate(tmp_path / "x", os.path.getsize(tmp_path / "x") - 7)  # the part for which there was no space
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", fill)
        with pytest.raises(DiskFullError, match="no space left for the study"), telling_full_disks():
            study.set_user_attr("lost", 1)
    assert not (tmp_path / "x").read_bytes().endswith(b"\n")
    study.set_user_attr("kept", 2)
    again, _ = open_storage(url, tmp_path)
    assert optuna.load_study(study_name="x", storage=again).user_attrs == {"kept": 2}


def test_what_is_no_full_disk_is_raised_as_it_is():
    assert not is_disk_full(OSError(errno.EACCES, "x"))
    assert not is_disk_full(ValueError("No space left on device"))
    with pytest.raises(KeyError), telling_full_disks():
        raise KeyError("x")
    with pytest.raises(DiskFullError, match="mine"), telling_full_disks():
        raise DiskFullError(errno.ENOSPC, "mine")


@pytest.mark.parametrize("torn", [b'{"op_code":5,"tri', b"\0\0\0", b"x" * 200_000])
def test_a_torn_last_line_of_a_journal_is_cut_off(torn, tmp_path, caplog):
    path = tmp_path / "x"
    storage, url = open_storage(f"journal:{path}", tmp_path)
    study = optuna.create_study(study_name="x", storage=storage, sampler=RandomSampler())
    study.set_user_attr("a", 1)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn)
    with caplog.at_level(logging.WARNING):
        again, _ = open_storage(url, tmp_path)
    assert path.read_bytes() == whole
    assert f"cut {len(torn)} bytes" in caplog.text
    assert optuna.load_study(study_name="x", storage=again).user_attrs == {"a": 1}


def test_a_journal_that_is_torn_in_its_first_line_is_empty(tmp_path):
    (tmp_path / "x").write_bytes(b'{"op_')
    storage, _ = open_storage(f"journal:{tmp_path}/x", tmp_path)
    assert optuna.get_all_study_names(storage) == []


@pytest.mark.parametrize("content", [b"2026-01-01 INFO epoch 1\n2026-01-01 INFO epo", b"x", b"[1]\n"])
def test_a_file_that_is_no_journal_is_left_as_it_is(content, tmp_path):
    (tmp_path / "log.log").write_bytes(content)
    with pytest.raises(UserError, match="is not a journal of Optuna, and was left as it is"):
        open_storage(f"{tmp_path}/log.log", tmp_path)
    assert (tmp_path / "log.log").read_bytes() == content


def test_a_journal_that_is_damaged_within_is_told(tmp_path):
    (tmp_path / "x").write_bytes(b'{"op_code":0,\n{"op_code":0}\n')
    with pytest.raises(UserError, match="is damaged"):
        open_storage(f"journal:{tmp_path}/x", tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lightning_automl.search.storages import JournalLock\n"
        "JournalLock(Path(sys.argv[1])).acquire()\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        waiting = threading.Thread(target=JournalLock(tmp_path / "x").acquire, daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive(), "two hold the lock"
        process.kill()
        waiting.join(60)
        assert not waiting.is_alive()


def test_the_file_system_is_that_of_the_longest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/x /data\\040all nfs4 rw 0 0\n/dev/b /data ext4 rw 0 0\n")
    assert file_system(Path("/data all/run"), mounts) == "nfs4"
    assert file_system(Path("/data/run"), mounts) == "ext4"
    assert file_system(Path("/"), mounts) == "ext4"
    assert file_system(Path("/"), tmp_path / "none") == ""


@pytest.mark.parametrize("url", [None, "journal:x"])
@pytest.mark.parametrize(("kind", "warned"), [("nfs4", True), ("cifs", True), ("ext4", False), ("tmpfs", False)])
def test_a_file_on_a_network_is_warned_of(url, kind, warned, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storages, "file_system", lambda path: kind)
    with caplog.at_level(logging.WARNING):
        open_storage(url, tmp_path)
    assert (f"network file system ({kind})" in caplog.text) == warned


def test_a_study_in_memory_needs_no_storage_of_ours():
    space = Space.parse({"x": {"float": [0, 1]}})
    study, _ = open_study("x", InMemoryStorage(), ["minimize"], RandomSampler(seed=0), None, space=space)
    assert len(search(study, space, lambda candidate: candidate.values["x"], trials=3).trials) == 3
