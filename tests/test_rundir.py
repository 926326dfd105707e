import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from lightning_automl import rundir
from lightning_automl.rundir import DiskFullError, UserError


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "a.txt"
    rundir.write_text(path, "old")
    with pytest.raises(TypeError), rundir.replacing(path) as partial:
        partial.write_text(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    path = tmp_path / "a.txt"
    with rundir.replacing(path) as partial:
        partial.write_text("of this thread")
        other = threading.Thread(target=rundir.write_text, args=(path, "of the other"))
        other.start()
        other.join()
        assert path.read_text() == "of the other"
    assert path.read_text() == "of this thread"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    path = tmp_path / "a.txt"

    def save():  # as torch.save does
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc]")  # noqa: B904

    with pytest.raises(DiskFullError, match=r"no space left for .*a\.txt"), rundir.replacing(path):
        save()
    assert os.listdir(tmp_path) == []


def test_json_has_null_for_what_json_does_not_know(tmp_path):
    rundir.write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5]}


def test_new_directories_are_numbered(tmp_path):
    made = [rundir.new_directory("x", tmp_path).name for _ in range(3)]
    assert made == ["x-1", "x-2", "x-3"]


def test_partial_files_of_dead_processes_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, living = tmp_path / f".a.txt.{process.pid}.tmp", tmp_path / f".a.txt.{os.getpid()}.tmp"
    dead.touch()
    living.touch()
    rundir.remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == [living.name]


def test_a_directory_has_one_owner_until_it_dies(tmp_path):
    code = "import sys, time; from pathlib import Path; from lightning_automl.rundir import lock\n"
    code += "keep = lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"in use by process {owner.pid}; wait until it ends"):
        rundir.lock(tmp_path)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    rundir.lock(tmp_path).close()


def test_differences_name_dotted_keys():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    new = {"a": {"b": 2, "c": [1, 2]}, "d": None, "e": {}}
    assert rundir.differences(old, new) == {"a.b": (1, 2), "e": (None, {})}


def test_a_summary_adds_up_seconds_and_openings(tmp_path):
    rundir.summarise(tmp_path, "fit", "finished", metrics={"val_accuracy": 0.5}, seconds=2, opened=1)
    rundir.summarise(tmp_path, "test", "finished", metrics={"test_accuracy": 0.25}, seconds=1, opened=1)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "command": "fit",
        "status": "finished",
        "metrics": {"val_accuracy": 0.5, "test_accuracy": 0.25},
        "seconds": 3,
        "artefacts": {},
        "test_opened": 2,
    }


def test_a_failed_run_stays_failed_when_it_is_tested(tmp_path):
    rundir.summarise(tmp_path, "fit", "failed", reason="interrupted")
    assert rundir.summarise(tmp_path, "test", "finished", opened=1)["status"] == "failed"


def test_the_environment_names_versions_hardware_and_seed():
    found = rundir.environment(seed=7)
    assert found["seed"] == 7
    assert found["versions"]["torch"]
    assert found["hardware"]["cores"] == os.cpu_count()
    json.dumps(found)
