import subprocess
import sys

import pytest

from lightning_automl.rundir import UserError
from lightning_automl.search import devices
from lightning_automl.search.devices import Slice, slices, visible_gpus


def test_without_gpus_the_cores_are_divided_among_all_ranks():
    assert slices(workers=3, ranks=2, gpus=(), cores=13) == [Slice((), 2)] * 3


def test_a_rank_has_a_thread_even_when_there_are_more_ranks_than_cores():
    assert slices(workers=4, ranks=2, gpus=(), cores=2) == [Slice((), 1)] * 4


def test_each_worker_has_gpus_of_its_own_and_as_many_as_the_others():
    assert slices(workers=2, ranks=2, gpus=("0", "1", "GPU-a", "GPU-b", "7"), cores=16) == [
        Slice(("0", "1"), 4),
        Slice(("GPU-a", "GPU-b"), 4),
    ]
    assert slices(workers=1, ranks=1, gpus=("0", "1"), cores=3) == [Slice(("0", "1"), 3)]


def test_too_few_gpus_are_refused_with_how_many_workers_are_possible():
    with pytest.raises(
        UserError, match=r"3 with trials of 2 ranks would need 6 GPUs, and there are 5 .*: at most 2 workers"
    ):
        slices(workers=3, ranks=2, gpus=tuple("01234"), cores=8)
    with pytest.raises(UserError, match=r"would need 4 GPUs, and there are 1 \(0\); possible: at most 1 ranks"):
        slices(workers=1, ranks=4, gpus=("0",), cores=8)


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (1, 0), (-1, 2)])
def test_nothing_cannot_be_divided(workers, ranks):
    with pytest.raises(UserError, match="at least 1"):
        slices(workers, ranks, gpus=(), cores=2)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a driver whose torch counts so many GPUs; what was asked of torch is noted."""

    def pretend(count, visible, driver=True):
        asked = []
        monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path if driver else tmp_path / "nothing"),))
        monkeypatch.setattr(devices, "_count", lambda: asked.append(count) or count)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return asked

    return pretend


@pytest.mark.parametrize(
    ("count", "visible", "names"),
    [
        (3, None, ("0", "1", "2")),
        (0, None, ()),  # a driver, and a torch without CUDA
        (2, "3,5", ("3", "5")),
        (2, "GPU-8932f937, MIG-7", ("GPU-8932f937", "MIG-7")),
        (1, "1,-1,0", ("1",)),  # CUDA stops at the first that does not exist
        (0, "9", ()),
    ],
)
def test_the_visible_gpus_have_the_names_that_the_environment_gives(machine, count, visible, names):
    machine(count, visible)
    assert visible_gpus() == names


@pytest.mark.parametrize(("visible", "driver"), [("", True), ("-1", True), (None, False), ("0", False)])
def test_torch_is_not_asked_when_the_answer_is_clear(machine, visible, driver):
    asked = machine(8, visible, driver)
    assert visible_gpus() == ()
    assert asked == []


def test_torch_counts_in_a_process_of_its_own(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="a warning\n4\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert devices._count() == 4
    assert commands[0][0] == sys.executable
    assert "torch.cuda.device_count()" in commands[0][-1]
