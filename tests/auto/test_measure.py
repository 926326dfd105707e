"""Measuring: an epoch by a few of its batches, within its share of the budget, and nothing twice."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import yaml
from seen import BREAST, DIGITS, PNEUMONIA, seen

from lightning_automl.auto import measure as measuring
from lightning_automl.auto.arms import ARMS, available, batch_size_of
from lightning_automl.auto.measure import NO_TIME, SEARCH, measure, part_of
from lightning_automl.rundir import UserError
from lightning_automl.search.devices import Slice
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.workers import Workers

GIVEN = {"metric": "val_auroc", "seed": 0}


class Stub:
    """Stands in for workers and for the clock: each run takes the seconds that are given for its arm.

    A run's second epoch has ``epoch`` seconds of which ``row`` are in the row of the table.
    """

    slices = (Slice((), 1),)

    def __init__(self, seconds, number=1, epoch=0.5, row=0.44, failing=None, counts=None):
        self.seconds = seconds
        self.number = number
        self.epoch, self.row = epoch, row
        self.failing = failing or {}
        self.counts = counts or {"train": [100, 100], "val": [30, 30], "test": [20, 20]}
        self.time = 0.0
        self.done = []

    def monotonic(self):
        return self.time

    out_of_time = False

    def is_set(self):
        return False

    def within(self, seconds):
        return self

    def each(self, work, items):
        return [work(item) for item in items]

    def do(self, what, payload, output, *, on_message=None):
        if payload["do"] == "check":
            return {"resolved": payload["configs"]}
        name = what.removeprefix("measuring ")
        if name in self.failing:
            raise self.failing[name]
        self.done.append(name)
        place = output.parent
        self.config = yaml.safe_load((place / "config.yaml").read_text())
        self.time += self.seconds.get(name, 2.0) - self.epoch
        on_message({"report": 0.7, "step": 1})
        self.time += self.epoch
        on_message({"report": 0.6, "step": 2})
        (place / "data.json").write_text(json.dumps({"counts": self.counts}))
        (place / "metrics.csv").write_text(f"epoch,val_loss,seconds\n0,0.7,9.0\n1,0.6,{self.row}\n")
        return {"metrics": {"parameters": 123}}


@pytest.fixture
def stub(monkeypatch):
    def make(*arguments, **named):
        made = Stub(*arguments, **named)
        monkeypatch.setattr(measuring, "time", made)
        return made

    return make


def arms(*names):
    return [ARMS[name] for name in names]


def test_an_epoch_is_scaled_from_the_part_that_was_measured(stub, tmp_path):
    # 300 images a class: batches of 32, of which a ResNet is measured on 9 and validated on 2.
    facts = seen((300, 300), (60, 60), (60, 60), size=28)
    part = part_of(facts, ARMS["resnet"])
    assert part == (32, 9, 2)
    workers = stub({"resnet": 4.0}, counts=facts.counts)
    found = measure(workers, tmp_path, facts, arms("resnet"), {}, budget=600, **GIVEN)
    # 0.44 - 0.04 s of work for 9 * 32 + 2 * 32 / 3 images; between two epochs lie 0.1 s more.
    image = 0.4 / (288 + 64 / 3)
    known = found["arms"]["resnet"]
    assert known["test_image_seconds"] == pytest.approx(image / 3, abs=1e-6)
    assert known["fixed_seconds"] == pytest.approx(0.1)
    assert known["epoch_seconds"] == pytest.approx(0.1 + image * (600 + 120 / 3), abs=1e-5)
    assert known["overhead_seconds"] == pytest.approx(4.0 - 2 * 0.5)
    assert known["parameters"] == 123


def test_a_whole_epoch_that_was_measured_is_what_it_takes(stub, tmp_path):
    facts = seen((20, 20), (6, 6), (6, 6), size=8)
    part = part_of(facts, ARMS["cnn"])
    assert part.train * part.batch >= 40
    workers = stub({}, counts=facts.counts)
    part_val = min(part.val * part.batch, 12)
    found = measure(workers, tmp_path, facts, arms("cnn"), {}, budget=600, **GIVEN)
    assert found["arms"]["cnn"]["epoch_seconds"] == pytest.approx(
        0.1 + 0.4 * (40 + 12 / 3) / (40 + part_val / 3), abs=1e-5
    )


def test_an_epoch_that_is_quicker_than_its_loop_is_still_the_images_work(stub, tmp_path):
    workers = stub({"cnn": 1.0}, epoch=0.05, row=0.03)
    known = measure(workers, tmp_path, BREAST, arms("cnn"), {}, budget=600, **GIVEN)["arms"]["cnn"]
    assert known["test_image_seconds"] > 0
    assert known["fixed_seconds"] == pytest.approx(0.05 - 0.015)


def test_runs_are_short_and_by_a_metric_that_few_images_have(stub, tmp_path):
    workers = stub({})
    measure(workers, tmp_path, BREAST, arms("resnet"), {}, budget=600, **GIVEN)
    trainer = workers.config["trainer"]
    assert (trainer["max_epochs"], workers.config["monitor"]) == (2, "val_loss")
    assert trainer["limit_train_batches"] * workers.config["data"]["init_args"]["batch_size"] < BREAST.number("train")
    assert workers.config["test_after_fit"] is False
    kept = yaml.safe_load((tmp_path / "arms" / "resnet.yaml").read_text())
    assert "limit_train_batches" not in kept["trainer"]
    assert (kept["monitor"], kept["data"]["init_args"]["batch_size"]) == ("val_auroc", 32)
    assert not (tmp_path / "measure").exists()


@pytest.mark.parametrize("name", ARMS)
def test_parts_are_whole_batches_and_never_more_than_there_is(name):
    for facts in (DIGITS, BREAST, PNEUMONIA, seen((5, 5), (2, 2), (2, 2), size=224)):
        for gpu in (False, True):
            part = part_of(facts, ARMS[name], gpu=gpu)
            assert 4 <= part.batch <= batch_size_of(facts)
            assert 1 <= part.train <= -(-facts.number("train") // part.batch)
            assert 1 <= part.val <= -(-facts.number("val") // part.batch)
        cpu, gpu = (part_of(facts, ARMS[name], gpu=gpu) for gpu in (False, True))
        assert gpu.train * gpu.batch >= cpu.train * cpu.batch or gpu.train == -(-facts.number("train") // gpu.batch)


def test_large_images_are_measured_in_smaller_batches():
    large = seen((500, 500), (50, 50), (50, 50), size=224, channels=3)
    assert part_of(large, ARMS["resnet"]).batch < batch_size_of(large)


def test_measuring_stops_at_its_share_of_the_budget(stub, tmp_path):
    workers = stub({"cnn": 2.0, "finetune": 3.0, "resnet": 3.0})
    found = measure(workers, tmp_path, BREAST, arms("finetune", "resnet", "cnn", "head"), {}, budget=100, **GIVEN)
    assert workers.done[0] == "cnn"  # something has to fit into any budget
    assert workers.time <= 8 + 0.1
    left_out = {name for name, why in found["not_run"].items() if why == NO_TIME}
    assert left_out | found["arms"].keys() == {"cnn", "finetune", "resnet", "head"}
    assert left_out
    assert json.loads((tmp_path / "measured.json").read_text()) == found


def test_what_would_take_too_long_is_measured_last(stub, tmp_path):
    workers = stub({})
    measure(workers, tmp_path, PNEUMONIA, arms("finetune", "resnet", "cnn", "head"), {}, budget=600, **GIVEN)
    assert workers.done == ["cnn", "resnet", "head", "finetune"]
    workers = stub({})
    measure(workers, tmp_path / "long", PNEUMONIA, arms("finetune", "resnet", "cnn", "head"), {}, budget=7200, **GIVEN)
    assert workers.done == ["cnn", "finetune", "resnet", "head"]


def test_nothing_is_measured_twice(stub, tmp_path):
    first = measure(stub({}), tmp_path, BREAST, arms("resnet", "cnn"), {}, budget=600, **GIVEN)
    workers = stub({})
    assert measure(workers, tmp_path, BREAST, arms("resnet", "cnn"), {}, budget=600, **GIVEN) == first
    assert workers.done == []


def test_a_longer_budget_measures_what_there_was_no_time_for(stub, tmp_path):
    every = arms("finetune", "resnet", "cnn", "head")
    short = measure(stub({"cnn": 5.0}), tmp_path, BREAST, every, {}, budget=60, **GIVEN)
    workers = stub({})
    long = measure(workers, tmp_path, BREAST, every, {}, budget=3600, **GIVEN)
    assert set(workers.done) == {name for name, why in short["not_run"].items() if why == NO_TIME}
    assert long["not_run"] == {}
    assert long["arms"]["cnn"] == short["arms"]["cnn"]


def test_what_is_found_has_one_order_whichever_was_measured_sooner(stub, tmp_path):
    every = arms("finetune", "resnet", "cnn", "densenet", "head", "pcdarts")
    workers = stub({"cnn": 5.0}, failing={"densenet": StudyFailed("no")})
    workers.each = lambda work, items: [work(item) for item in reversed(items)]
    found = measure(workers, tmp_path, BREAST, every, {"lora": "not there"}, budget=7200, **GIVEN)
    assert workers.done == [SEARCH, "pcdarts", "head", "resnet", "finetune", "cnn"]
    assert list(found["arms"]) == ["finetune", "resnet", "cnn", "head", "pcdarts"]
    assert list(found["not_run"]) == ["lora", "densenet"]


def test_other_workers_are_measured_anew(stub, tmp_path):
    measure(stub({}), tmp_path, BREAST, arms("cnn"), {}, budget=600, **GIVEN)
    workers = stub({}, number=2)
    assert measure(workers, tmp_path, BREAST, arms("cnn"), {}, budget=600, **GIVEN)["workers"] == 2
    assert workers.done == ["cnn"]


def test_an_arm_that_fails_is_not_run_for_its_reason(stub, tmp_path):
    workers = stub({}, failing={"resnet": StudyFailed("measuring resnet failed: out of memory")})
    found = measure(workers, tmp_path, BREAST, arms("resnet", "cnn"), {"lora": "no"}, budget=600, **GIVEN)
    assert found["not_run"] == {"lora": "no", "resnet": "measuring resnet failed: out of memory"}
    assert list(found["arms"]) == ["cnn"]


def test_what_all_arms_refuse_is_the_users_mistake(stub, tmp_path):
    refused = UserError("the data are broken")
    workers = stub({}, failing={"resnet": refused, "cnn": refused})
    with pytest.raises(UserError, match="the data are broken"):
        measure(workers, tmp_path, BREAST, arms("resnet", "cnn"), {}, budget=600, **GIVEN)


def test_the_architecture_search_is_measured_beside_the_arms(stub, tmp_path):
    workers = stub({})
    found = measure(workers, tmp_path, DIGITS, arms("cnn", "pcdarts"), {}, budget=7200, **GIVEN)
    assert workers.done == ["cnn", "pcdarts", SEARCH]
    assert found[SEARCH].keys() == {"epoch_seconds", "fixed_seconds", "overhead_seconds"}
    assert not (tmp_path / "arms" / f"{SEARCH}.yaml").exists()
    assert measure(stub({}), tmp_path / "b", BREAST, arms("cnn"), {}, budget=7200, **GIVEN)[SEARCH] is None


@pytest.mark.slow
def test_arms_are_measured_by_processes_of_the_trial_server(request, tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    counts = {"train": (60, 20), "val": (15, 5), "test": (15, 5)}
    arrays = {}
    for split, each in counts.items():
        arrays[f"{split}_images"] = np.random.default_rng(0).integers(0, 256, (sum(each), 12, 12), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.repeat([0, 1], each)  # in the order of the classes, as files in folders are
    np.savez(path, **arrays)
    data = {"class_path": "ArraysDataModule", "init_args": {"path": str(path)}}
    facts = seen(*counts.values(), data=data, size=12)
    broken = dataclasses.replace(
        ARMS["densenet"],
        make=lambda facts, source: {
            **(made := ARMS["resnet"].make(facts, source)),
            "init_args": {**made["init_args"], "model": {"class_path": "ResNet", "init_args": {"depth": 21}}},
        },
    )
    monkeypatch.setitem(ARMS, "densenet", broken)
    workers = Workers(request.getfixturevalue("_server"), [Slice((), 1)] * 2, 1)
    tried, not_run = available(facts, "none", None)
    found = measure(workers, tmp_path / "auto", facts, tried, not_run, budget=3600, **GIVEN)
    assert set(found["arms"]) == {"cnn", "resnet"}
    assert "6n + 2 layers" in found["not_run"]["densenet"]
    for known in found["arms"].values():
        # what is left of a run without its epochs may be nothing, if the second one happened to take very long
        assert all(value > 0 or name in ("fixed_seconds", "overhead_seconds") for name, value in known.items())
        assert all(value >= 0 for value in known.values())
    assert any(known["overhead_seconds"] > 0 for known in found["arms"].values())
    kept = yaml.safe_load((tmp_path / "auto" / "arms" / "cnn.yaml").read_text())
    assert kept["model"]["class_path"].endswith(".ClassificationTask")
    assert kept["data"]["init_args"]["fold"] is None


class Late(Stub):
    """All arms but the first are stopped by their time."""

    def within(self, seconds):
        other = copy.copy(self)
        other.out_of_time = True
        other.failing = {"resnet": StudyFailed("stopped at the limit")}
        return other


def test_an_arm_that_takes_far_too_long_is_stopped_and_has_no_time(tmp_path, monkeypatch):
    workers = Late({"cnn": 1.0, "resnet": 9.0})
    monkeypatch.setattr(measuring, "time", workers)
    found = measure(workers, tmp_path, BREAST, arms("cnn", "resnet"), {}, budget=600, **GIVEN)
    assert found["not_run"]["resnet"] == NO_TIME
    assert list(found["arms"]) == ["cnn"]
