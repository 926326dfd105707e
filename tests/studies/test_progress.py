import pytest

from lightning_automl.studies import progress
from lightning_automl.studies.progress import Pace, spoken


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_told_by_what_was_done_since_the_first_step(clock):
    pace = Pace(10, done=3)
    assert pace.left() == ""
    clock[0] = 900.0  # a network was trained first
    pace.step()
    assert pace.left() == ""
    clock[0] += 5
    pace.step()
    assert (pace.done, pace.left()) == (5, ", about 25 s left")
    for _ in range(5):
        pace.step()
    assert pace.left() == ""


@pytest.mark.parametrize(("seconds", "words"), [(40.4, "40 s"), (180, "3 min"), (9000, "2.5 h")])
def test_times_are_spoken(seconds, words):
    assert spoken(seconds) == words
