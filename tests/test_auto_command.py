"""The command `auto` as a whole; what its stages do is tested beside them."""

import contextlib
import csv
import json
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from conftest import draw_images
from PIL import Image
from searches import processes_of, wait_until
from sklearn.datasets import load_digits

from lightning_automl.auto import auto
from lightning_automl.results import Predictor, Run
from lightning_automl.results.run import read_predictions
from lightning_automl.rundir import read_json


@pytest.fixture(autouse=True)
def one_server(_server, monkeypatch):
    monkeypatch.setattr("lightning_automl.auto.strategy.TrialServer", lambda call: contextlib.nullcontext(_server))


def small(plan):
    """A plan that is done in seconds: one or two arms, few epochs."""
    arms = [each for each in plan["arms"] if each["name"] in ("cnn", "resnet")][:1] or plan["arms"][:1]
    for each in arms:
        each |= {"epochs": 2, "policies": ["none"]}
    return plan | {
        "arms": arms,
        "generations": [1],
        **dict.fromkeys(("policy_search", "architecture_search", "comparison")),
        "final": {"seeds": 2},
    }


@pytest.fixture
def quickly(monkeypatch):
    """Plan as ever, and do little of it."""
    from lightning_automl.auto import plan

    whole = plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda *args, **kwargs: small(whole(*args, **kwargs)))


def rows_of(table):
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_digits_come_to_a_model_a_report_and_labels_within_the_budget(command, tmp_path):
    answer = command("auto", "digits", "--budget", "80s", "--dir", "digits")
    assert answer.status == 0, answer.err
    summary = read_json(tmp_path / "digits/summary.json")
    assert (summary["command"], summary["status"], summary["test_opened"]) == ("auto", "finished", 1)
    assert summary["metrics"]["test_accuracy"] > 0.9
    page = (tmp_path / "digits/report.html").read_text()
    assert "not a medical device" in page
    for arm in read_json(tmp_path / "digits/plan.json")["not_run"]:
        assert arm["title"] in page

    pixels, labels = load_digits().images[:20], load_digits().target[:20]
    (tmp_path / "new").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(tmp_path / f"new/{number:02d}.png")
    assert command("classify", "digits", "new", "--out", "labels.csv").status == 0
    rows = rows_of(tmp_path / "labels.csv")
    assert sum(int(row["label"]) == label for row, label in zip(rows, labels, strict=True)) >= 17
    assert {row["unsure"] for row in rows} <= {"yes", "no"}
    assert command("export", "digits", "--format", "onnx").status == 0
    assert command("classify", "digits/model.onnx", "new", "--out", "same.csv").status == 0
    same = rows_of(tmp_path / "same.csv")
    assert [row["label"] for row in same] == [row["label"] for row in rows]

    again = command("auto", "digits", "--budget", "80s", "--dir", "digits")
    assert again.status == 0
    assert "is finished" in again.err
    assert read_json(tmp_path / "digits/summary.json") == summary


@pytest.mark.slow
def test_a_folder_of_mixed_sizes_and_modes_with_broken_files_goes_through(command, tmp_path, quickly):
    draw_images(tmp_path / "images", 24)
    answer = command("auto", "images", "--budget", "5m", "--dir", "out")
    assert answer.status == 0, answer.err
    look = read_json(tmp_path / "out/look.json")
    assert len(look["broken"]) == 3
    assert "text.png" in (tmp_path / "out/report.html").read_text()
    result = Predictor(tmp_path / "out").files(sorted((tmp_path / "images/light").iterdir()))
    assert len(result.broken) == 3


@pytest.mark.slow
def test_shuffled_labels_are_at_chance(tmp_path, quickly):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 120), ("val", 40), ("test", 400)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = generator.permutation(np.arange(count) % 2)
    np.savez(tmp_path / "noise.npz", **arrays)
    result = auto(tmp_path / "noise.npz", budget=200, directory=tmp_path / "out")
    assert 0.4 <= result.metrics["test_balanced_accuracy"] <= 0.6


@pytest.mark.slow
def test_a_longer_budget_continues_a_finished_one(tmp_path, make_npz, quickly):
    data, out = make_npz(tmp_path / "data.npz"), tmp_path / "out"
    auto(data, budget=200, directory=out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/summary.json")}
    files = {name: (out / name).read_text() for name in ("plan.json", "summary.json", "config.yaml")}
    assert auto(data, budget=300, directory=out, dry_run=True).plan["budget"] == 300
    assert all((out / name).read_text() == text for name, text in files.items())
    result = auto(data, budget=300, directory=out)
    assert result.plan["budget"] == 300
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert read_json(out / "plan.json")["budget"] == 300
    with pytest.raises(ValueError, match="can only grow"):
        auto(data, budget=200, directory=out)
    with pytest.raises(ValueError, match="modality=natural, now it is histology"):
        auto(data, budget=300, directory=out, modality="histology")


def test_before_the_look_another_mind_may_be_made_up(command, tmp_path, make_npz):
    make_npz(tmp_path / "data.npz")
    assert command("auto", "data.npz", "--dir", "out", "--modality", "xray", "--budget", "2m").status == 2
    answer = command("auto", "data.npz", "--dir", "out", "--budget", "5s")
    assert "a budget of 5 s is too small" in answer.err
    answer = command("auto", "data.npz", "--dir", "out", "--budget", "5s", "--modality", "radiograph")
    assert "modality=natural, now it is radiograph" in answer.err
    answer = command("auto", "nowhere", "--dir", "out2", "--budget", "5s")
    assert (answer.status, (tmp_path / "out2").exists()) == (2, False)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(tmp_path, make_npz, quickly):
    data = make_npz(tmp_path / "data.npz")
    for name in ("one", "two"):
        auto(data, budget=200, directory=tmp_path / name, seed=3)
    models = [read_json(tmp_path / name / "model.json") for name in ("one", "two")]
    assert models[0] == models[1]
    first, second = (read_predictions(tmp_path / name / "predictions_test.safetensors") for name in ("one", "two"))
    assert (first.probabilities == second.probabilities).all()


@pytest.mark.slow
def test_ten_kills_end_in_the_same_model(tmp_path, make_npz, monkeypatch):
    """With all stages but the searches for policy and architecture, whose own tests kill them."""
    from lightning_automl.auto import plan

    whole = plan.make_plan

    def with_a_comparison(*arguments, **keys):
        short = small(whole(*arguments, **keys))
        arms = [each | {"policies": ["none", "trivial_augment"]} for each in short["arms"]]
        return short | {"arms": arms, "generations": [2, 2], "comparison": {"seeds": 1}, "search_folds": [0, 1]}

    monkeypatch.setattr(plan, "make_plan", with_a_comparison)
    data = make_npz(tmp_path / "data.npz", classes=2, counts=(60, 20, 20))
    # The budget is large, so that the time of ten starts cuts nothing.
    given = {"budget": 3600, "seed": 1, "workers": 2}
    killed = tmp_path / "killed"
    auto(data, directory=killed, dry_run=True, **given)
    shutil.copytree(killed, tmp_path / "whole")
    auto(data, directory=tmp_path / "whole", **given)

    command = [sys.executable, "-m", "lightning_automl", "auto", str(data), "--dir", str(killed)]
    command += ["--budget", "3600", "--seed", "1", "--workers", "2"]
    generator = random.Random(0)
    for _ in range(10):
        before = len(list(killed.glob("runs/*/*")))
        with (tmp_path / "errors").open("a") as errors:
            process = subprocess.Popen(command, stdout=errors, stderr=errors)
        wait_until(lambda: process.poll() is not None or len(list(killed.glob("runs/*/*"))) > before)  # noqa: B023
        time.sleep(generator.uniform(0.0, 2.0))
        process.kill()
        process.wait()
        wait_until(lambda: not processes_of(killed))
    with (tmp_path / "errors").open("a") as errors:
        assert subprocess.run(command, stdout=errors, stderr=errors).returncode == 0, (tmp_path / "errors").read_text()

    assert read_json(killed / "model.json") == read_json(tmp_path / "whole/model.json")
    for name in ("predictions_val.safetensors", "predictions_test.safetensors"):
        first, second = (read_predictions(tmp_path / place / name) for place in ("killed", "whole"))
        assert (first.probabilities == second.probabilities).all()
    scores = [read_json(tmp_path / place / "selection.json")["candidates"] for place in ("killed", "whole")]
    assert [(each["key"], each["folds"]) for each in scores[0]] == [(each["key"], each["folds"]) for each in scores[1]]
    assert read_json(killed / "summary.json")["test_opened"] == 1
    tables = list(killed.glob("runs/*/*/metrics.csv"))
    assert tables
    assert all(len(table.read_text().splitlines()) == 3 for table in tables), "epochs were trained twice"


def test_a_dry_run_prints_the_plan_and_trains_no_arm(command, tmp_path, make_npz):
    make_npz(tmp_path / "data.npz")
    answer = command("auto", "data.npz", "--budget", "60s", "--dir", "out", "--dry-run")
    assert answer.status == 0, answer.err
    for sentence in read_json(tmp_path / "out/plan.json")["sentences"]:
        assert sentence in answer.err
    assert not (tmp_path / "out/runs").exists()
    assert "plan" in (command("report", "out").err)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "there is no nowhere"),
        (["digits", "--budget", "soon"], "budget is 'soon'; give a time above zero as 90s, 30m or 2h"),
        (["digits", "--metric", "val_luck"], "metric is 'val_luck'; known: val_auroc"),
        (["digits", "--modality", "xray"], "known: .*radiograph"),
        (["digits", "--workers", "0"], "workers is 0; give 1 or more"),
        (["digits", "--image-size", "0"], "image_size is 0; give 1 or more pixels"),
        (["digits", "--seed", "-1"], "seed is -1; give 0 to 4294967295"),
        (["digits", "--foldss", "3"], "unrecognized arguments: --foldss 3; see lightning-automl auto --help"),
        ([], "the following arguments are required: data; see lightning-automl auto --help"),
        (["digits", "--folds", "1000"], "139 is the largest number that is possible"),
        (["digits", "--budget", "5s"], "a budget of 5 s is too small"),
    ],
)
def test_mistakes_get_one_sentence(command, tmp_path, arguments, sentence):
    answer = command("auto", *arguments, *(["--dir", "out"] if arguments else []))
    assert answer.status == 2
    lines = answer.err.strip().splitlines()
    assert "Traceback" not in answer.err
    assert re.search(sentence, lines[-1]), answer.err


def test_a_directory_among_the_images_is_refused_and_nothing_is_left_in_it(command, tmp_path):
    draw_images(tmp_path / "photos")
    answer = command("auto", "photos", "--dir", "photos/run")
    assert (answer.status, "lies among the images of" in answer.err) == (2, True)
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["dark", "light"]


def test_a_directory_of_another_command_is_refused(command, digits, tmp_path):
    answer = command("auto", "digits", "--dir", digits)
    assert (answer.status, "is the directory of another command" in answer.err) == (2, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    answer = command("auto", "digits", "--dir", "full")
    assert "not empty (it holds notes.txt)" in answer.err
    assert Run.read(digits).finished
    assert yaml.safe_load((digits / "config.yaml").read_text())["model"]
    assert json.loads((digits / "summary.json").read_text())["command"] == "fit"
