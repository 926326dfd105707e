"""The clock of a directory: what was spent is known, whatever ended the commands."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_automl.auto.clock import Clock
from lightning_automl.rundir import DiskFullError


class Hands:
    """A clock that is moved by hand."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def hands():
    return Hands()


def kept(directory):
    return json.loads((directory / "progress.json").read_text())


def test_the_seconds_of_several_commands_add_up(tmp_path, hands):
    for seconds, together in ((5, 5), (7, 12)):
        with Clock(tmp_path, 60, now=hands, every=1e6) as clock:
            hands.time += seconds
            assert clock.spent() == together
            assert clock.left() == 60 - together
        assert kept(tmp_path)["seconds"] == together
        hands.time += 1000  # between two commands
        assert clock.spent() == together
    assert Clock(tmp_path, 60).spent() == 12


def test_a_command_that_began_before_its_clock_counts_from_its_beginning(tmp_path, hands):
    with Clock(tmp_path, 60, since=hands.time - 3, now=hands, every=1e6) as clock:
        assert clock.spent() == 3


def test_a_budget_may_be_overdrawn(tmp_path, hands):
    with Clock(tmp_path, 60, now=hands, every=1e6) as clock:
        hands.time += 70
        assert clock.left() == -10


def test_a_stage_that_goes_on_adds_up_and_keeps_its_place(tmp_path, hands):
    with Clock(tmp_path, 60, now=hands, every=1e6) as clock:
        with clock.stage("look"):
            hands.time += 2
        hands.time += 1
        with clock.stage("final"):
            hands.time += 4
            assert clock.stages == {"look": 2, "final": 4}
    with Clock(tmp_path, 60, now=hands, every=1e6) as clock, clock.stage("look"):
        hands.time += 3
    assert kept(tmp_path) == {"seconds": 10, "stages": {"look": 5, "final": 4}, "cuts": {}}


def test_a_stage_that_fails_has_taken_its_time_all_the_same(tmp_path, hands):
    def fail():
        with Clock(tmp_path, 60, now=hands, every=1e6) as clock, clock.stage("look"):
            hands.time += 2
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # raised here
        fail()
    assert kept(tmp_path)["stages"] == {"look": 2}


def test_what_was_cut_stays_cut_until_it_is_forgotten(tmp_path, hands):
    with Clock(tmp_path, 60, now=hands, every=1e6) as clock:
        clock.cut("selection", "two candidates were not tried")
        assert kept(tmp_path)["cuts"] == {"selection": "two candidates were not tried"}
    with Clock(tmp_path, 90, now=hands, every=1e6) as clock:
        assert clock.cuts == {"selection": "two candidates were not tried"}
        clock.forget_cuts()
    assert Clock(tmp_path, 90).cuts == {}


def test_a_killed_command_loses_a_moment_at_most(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from lightning_automl.auto.clock import Clock
with Clock(Path({str(tmp_path)!r}), 60, every=0.05) as clock:
    with clock.stage("look"):
        while True:
            print(clock.spent(), flush=True)
            time.sleep(0.01)
"""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    assert 0 <= float(first) <= time.monotonic() - started  # it counts from its own start
    while not (tmp_path / "progress.json").exists() or kept(tmp_path)["seconds"] < 0.3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert kept(tmp_path)["seconds"] >= 0.3
    assert kept(tmp_path)["stages"]["look"] >= 0.2
    assert Clock(tmp_path, 60).spent() == kept(tmp_path)["seconds"]
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["progress.json"]


def test_a_full_disk_is_no_reason_for_the_thread_to_end(tmp_path, monkeypatch):
    with Clock(tmp_path, 60, every=0.01) as clock:
        with monkeypatch.context() as full:

            def refuse(path, value):
                raise DiskFullError

            full.setattr("lightning_automl.auto.clock.write_json", refuse)
            time.sleep(0.05)
        (tmp_path / "progress.json").unlink(missing_ok=True)
        while not (tmp_path / "progress.json").exists():
            time.sleep(0.01)
        assert clock.spent() > 0


def test_a_full_disk_does_not_hide_what_went_wrong_before(tmp_path, monkeypatch):
    def fail():
        with Clock(tmp_path, 60, every=1e6):
            raise KeyError

    def refuse(path, value):
        raise DiskFullError

    monkeypatch.setattr("lightning_automl.auto.clock.write_json", refuse)
    with pytest.raises(KeyError):
        fail()
    with pytest.raises(DiskFullError), Clock(tmp_path, 60, every=1e6):
        pass
