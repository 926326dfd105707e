import json
import shutil

import pytest

from lightning_automl.results import Run
from lightning_automl.rundir import UserError


def test_a_run_is_read_back(finished_digits):
    run = Run.read(finished_digits)
    assert run.finished
    assert [row["epoch"] for row in run.epochs] == [0, 1, 2]
    assert run.data["class_names"] == [str(digit) for digit in range(10)]
    assert (run.data["channels"], run.data["image_size"]) == (1, [8, 8])
    assert {split: sum(counts) for split, counts in run.data["counts"].items()} == {
        "train": 1222,
        "val": 216,
        "test": 359,
    }
    assert run.config["model"]["class_path"].endswith("ClassificationTask")


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_kept_predictions_are_those_of_the_summary(finished_digits, split):
    run = Run.read(finished_digits)
    predictions = run.predictions(split)
    accuracy = (predictions.predicted == predictions.labels).mean()
    assert accuracy == pytest.approx(run.summary["metrics"][f"{split}_accuracy"], abs=1e-6)
    assert predictions.probabilities.sum(1) == pytest.approx(1, abs=1e-5)


def test_a_run_without_an_epoch_has_no_predictions(finished_digits, tmp_path):
    shutil.copy(finished_digits / "config.yaml", tmp_path)
    run = Run.read(tmp_path)
    assert not run.finished
    assert (run.summary, run.epochs, run.data, run.predictions("val")) == (None, [], {}, None)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "it is empty and no config.yaml"),
        ({"photo.jpg": ""}, "it holds photo.jpg and no config.yaml"),
        ({"config.yaml": "a: [1"}, "config.yaml is not YAML"),
        ({"config.yaml": json.dumps({"name": "another program"})}, "not the config of a run"),
    ],
)
def test_other_directories_are_refused(files, sentence, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="give the --dir of a fit") as caught:
        Run.read(tmp_path)
    assert sentence in str(caught.value)


def test_a_directory_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        Run.read(tmp_path / "nothing")
