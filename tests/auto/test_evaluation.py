import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from safetensors.torch import save_file as save

from lightning_automl.__main__ import main
from lightning_automl.auto.evaluated import file_of, is_evaluated, read_evaluated
from lightning_automl.auto.evaluation import evaluate
from lightning_automl.auto.shown import choose_images
from lightning_automl.results.predictor import Predictor
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError


class Silence:
    """A channel that nobody listens to."""

    def beat(self):
        pass


def ask(split, *places, **others):
    return evaluate(
        {"do": "evaluate", "split": split, "directories": [str(each) for each in places], **others}, Silence()
    )


def test_what_is_found_is_what_the_predictor_says(digits):
    assert ask("test", digits) == {"failed": {}, "averaged": [], "maps": False}
    found, run = read_evaluated(digits, "test"), Run.read(digits)
    tested = run.predictions("test")
    assert np.array_equal(found.labels, tested.labels)
    assert np.array_equal(found.rows, tested.rows)
    assert found.groups is None
    assert {key: found.origin[key] for key in ("epoch", "step", "split")} == tested.origin
    np.testing.assert_allclose(found.probabilities, tested.probabilities, atol=0.02)  # those are of half precision

    from sklearn.datasets import load_digits

    images = (load_digits().images[found.rows] * 255 / 16).round().astype(np.uint8)[:, None]
    np.testing.assert_allclose(found.probabilities, Predictor(digits, "cpu").arrays(images), atol=1e-5)


def test_what_is_there_of_the_same_weights_stays(digits):
    ask("val", digits)
    written = file_of(digits, "val").stat().st_mtime_ns
    ask("val", digits)
    assert file_of(digits, "val").stat().st_mtime_ns == written
    checkpoint = torch.load(digits / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.linear.bias"] += 1
    (digits / "checkpoints" / "best.ckpt").unlink()  # a second name of last.ckpt
    torch.save(checkpoint, digits / "checkpoints" / "best.ckpt")
    assert not is_evaluated(digits, "val")
    ask("val", digits)
    assert file_of(digits, "val").stat().st_mtime_ns != written


def test_one_that_gives_no_numbers_is_told_and_the_others_are_evaluated(digits):
    broken = shutil.copytree(digits, digits.parent / "broken")
    checkpoint = torch.load(broken / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.linear.bias"][:] = torch.nan
    torch.save(checkpoint, broken / "checkpoints" / "best.ckpt")
    target = digits.parent / "averaged"
    answer = ask("val", broken, digits, averages=[[str(target), [str(digits), str(broken)]]])
    assert list(answer["failed"]) == [str(broken)]
    assert "diverged" in answer["failed"][str(broken)]
    assert is_evaluated(digits, "val")
    assert not answer["averaged"]
    assert not target.exists()


def test_averaged_weights_are_evaluated_too(digits):
    target = digits.parent / "averaged"
    answer = ask("val", digits, averages=[[str(target), [str(digits), str(digits)]]])
    assert answer["averaged"] == [str(target)]
    assert np.array_equal(read_evaluated(target, "val").probabilities, read_evaluated(digits, "val").probabilities)


def test_an_average_that_gives_no_numbers_is_none(digits, monkeypatch):
    def average(places, target):
        shutil.copytree(places[0], target)
        checkpoint = torch.load(target / "checkpoints" / "best.ckpt", weights_only=True)
        checkpoint["state_dict"]["model.linear.bias"][:] = torch.nan
        torch.save(checkpoint, target / "checkpoints" / "best.ckpt")
        return True

    monkeypatch.setattr("lightning_automl.auto.evaluation.average_weights", average)
    target = digits.parent / "averaged"
    answer = ask("val", digits, averages=[[str(target), [str(digits), str(digits)]]])
    assert (list(answer["failed"]), answer["averaged"]) == ([str(target)], [])


def test_other_data_are_refused(digits):
    record = json.loads((digits / "data.json").read_text())
    (digits / "data.json").write_text(json.dumps(record | {"index": "0" * 32}))
    with pytest.raises(UserError, match="the data are not those"):
        ask("val", digits)


def test_maps_are_of_the_class_that_the_whole_model_predicts(digits):
    ask("val", digits)
    other = shutil.copytree(digits, digits.parent / "other")  # is very sure that everything is a 3
    tensors = load_file(file_of(other, "val"))
    tensors["probabilities"] = torch.nn.functional.one_hot(torch.full((len(tensors["labels"]),), 3), 10).float()
    from safetensors import safe_open

    with safe_open(file_of(other, "val"), "pt") as file:
        save(tensors, file_of(other, "val"), file.metadata())
    file = digits.parent / "maps.safetensors"
    answer = ask("val", maps={"file": str(file), "members": [str(digits), str(other)], "most": 12})
    assert answer["maps"]
    found = load_file(file)
    assert found["maps"].shape == (12, 8, 8)
    assert found["maps"].amin() >= 0
    assert found["maps"].amax() == 1
    assert found["images"].shape == (12, 1, 8, 8)
    assert found["images"].dtype == torch.uint8
    assert set(found["predicted"].tolist()) <= {3, *found["labels"].tolist()}
    evaluated = read_evaluated(digits, "val")
    place = {row: index for index, row in enumerate(evaluated.rows.tolist())}
    assert [evaluated.labels[place[row]] for row in found["rows"].tolist()] == found["labels"].tolist()


def test_groups_come_along_and_a_policy_is_not_applied(make_npz, tmp_path):
    path = make_npz(tmp_path / "images.npz", classes=2)
    arrays = dict(np.load(path))
    patients = {"train": np.arange(30) // 2, "val": 100 + np.arange(12) // 3, "test": 200 + np.arange(12) // 4}
    np.savez(path, **arrays, **{f"{split}_groups": groups for split, groups in patients.items()})
    config = {
        "model": {
            "class_path": "ClassificationTask",
            "init_args": {"model": {"class_path": "TunableCNN", "init_args": {"filters": [4], "units": []}}},
        },
        "data": {
            "class_path": "ArraysDataModule",
            "init_args": {"path": str(path), "batch_size": 8, "base_augment": "crop", "train_policy": "TrivialAugment"},
        },
        "trainer": {"max_epochs": 1},
        "test_after_fit": False,
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "fit.yaml"), f"--dir={run}"]) == 0
    ask("val", run)
    ask("test", run)
    assert read_evaluated(run, "test").groups.tolist() == (np.arange(12) // 4).tolist()
    images = arrays["val_images"].transpose(0, 3, 1, 2)
    found = read_evaluated(run, "val")
    np.testing.assert_allclose(found.probabilities, Predictor(run, "cpu").arrays(images), atol=1e-5)


def test_of_each_class_the_most_certain_images_are_shown_recognised_ones_first():
    top = np.array([0.9, 0.8, 0.7, 0.95, 0.6, 0.85])
    said = np.array([0, 0, 1, 1, 1, 0])
    labels = np.array([0, 0, 1, 1, 0, 1])
    scores = np.where(np.eye(2)[said] == 1, top[:, None], 1 - top[:, None])
    assert choose_images(scores, labels, 4).tolist() == [0, 3, 4, 5]  # one of each class, and both mistakes
    assert choose_images(scores, labels, 5).tolist() == [0, 1, 3, 4, 5]
    assert choose_images(scores, labels, 12).tolist() == [0, 1, 3, 2, 4, 5]
    assert choose_images(scores[:4], labels[:4], 2).tolist() == [0, 3]  # nothing is mistaken
    assert choose_images(scores[4:], labels[4:], 4).tolist() == [0, 1]
