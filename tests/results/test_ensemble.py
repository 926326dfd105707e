import csv
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from models_of_auto import TWO, of_logits, write_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_automl.data import FolderDataModule
from lightning_automl.results import Predictor, classify, export
from lightning_automl.results.averaged import AveragedTask
from lightning_automl.results.ensemble import Ensemble, combine, is_of_auto
from lightning_automl.results.export import SUFFIXES
from lightning_automl.results.network import read_source, trained_task
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError, read_json, write_json

WHITE = torch.ones(1, 1, 2, 2)


def softmax(*logits):
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


#: Of two members with the logits (2, 0) and (0, 1), at temperature 2: the square roots of the mean softmax, made to
#: sum to one.
MEAN = [(a + b) / 2 for a, b in zip(softmax(2, 0), softmax(0, 1), strict=True)]
BY_HAND = [math.sqrt(p) / (math.sqrt(MEAN[0]) + math.sqrt(MEAN[1])) for p in MEAN]


@pytest.fixture
def two(tmp_path):
    """A model of two members that gives `BY_HAND` for a white image and about one half for a black one."""
    members = [of_logits(2, 0), of_logits(0, 1, black=(0, 0.1))]
    return write_model(tmp_path / "auto", members, TWO, temperature=2.0, threshold=0.4, unsure_below=0.53)


def images_of(folder, number=1):
    """White images, which are cats, and black ones, dogs, of which the model is unsure."""
    for label, level in (("white", 255), ("black", 0)):
        (folder / label).mkdir(parents=True)
        for index in range(number):
            Image.new("L", (2, 2), level).save(folder / label / f"{index}.png")
    return folder


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_probabilities_are_the_calibrated_mean_of_the_softmaxes(two):
    task = trained_task(read_source(two))
    with torch.no_grad():
        logits = task(WHITE)
        assert logits[0].tolist() == pytest.approx([math.log(p) / 2 for p in MEAN], abs=1e-6)
        assert task.probabilities(logits)[0].tolist() == pytest.approx(BY_HAND, abs=1e-6)
    white = np.full((3, 1, 2, 2), 255, np.uint8)
    assert Predictor(two).arrays(white) == pytest.approx(np.array([BY_HAND] * 3), abs=1e-6)


def test_numpy_and_torch_put_members_together_alike():
    members = torch.randn(3, 5, 4).mul(9).softmax(2)
    logits = members.log()

    class Fixed(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, images):
            return logits[self.number]

    task = AveragedTask([Fixed(number) for number in range(3)], 1.7)
    assert combine(members.numpy(), 1.7) == pytest.approx(task.probabilities(task(WHITE)).numpy(), abs=1e-6)
    assert combine([np.array([softmax(2, 0)]), np.array([softmax(0, 1)])], 2.0)[0].tolist() == pytest.approx(BY_HAND)


def test_a_single_member_at_temperature_one_says_what_it_says_alone(tmp_path):
    directory = write_model(tmp_path / "auto", [of_logits(2, 0)], TWO)
    alone = Predictor(directory / Ensemble.read(directory).members[0])
    white = np.full((1, 1, 2, 2), 255, np.uint8)
    assert Predictor(directory).arrays(white) == pytest.approx(alone.arrays(white), abs=1e-6)
    assert (alone.unsure_below, alone.threshold) == (None, None)


@pytest.mark.parametrize("format", SUFFIXES)
def test_averaged_weights_are_one_member(tmp_path, format):
    directory = write_model(tmp_path / "auto", [of_logits(2, 0)], TWO, average="weights", temperature=2.0)
    assert Predictor(directory).arrays(np.full((1, 1, 2, 2), 255, np.uint8))[0].tolist() == pytest.approx(
        softmax(1, 0), abs=1e-6
    )
    assert export(directory, format) == directory / f"model{SUFFIXES[format]}"


def test_a_member_that_is_very_sure_breaks_neither_numbers_nor_export(tmp_path):
    directory = write_model(tmp_path / "auto", [of_logits(900, 0), of_logits(700, 0)], TWO, temperature=2.0)
    with torch.no_grad():
        logits = trained_task(read_source(directory))(WHITE)
    assert logits[0].tolist() == pytest.approx([0, math.log(1e-12) / 2], abs=1e-5)
    for format in SUFFIXES:
        export(directory, format)


def test_differences_are_judged_by_the_largest_number_of_a_member(tmp_path):
    task = trained_task(read_source(write_model(tmp_path / "auto", [of_logits(900, 0), of_logits(0, 1)], TWO)))
    with torch.no_grad():
        assert float(task.largest(WHITE)) == pytest.approx(900)


@pytest.mark.parametrize("source", ["directory", "onnx"])
def test_the_table_tells_of_which_images_the_model_is_unsure(two, tmp_path, source):
    images = images_of(tmp_path / "images", number=4)
    given = two if source == "directory" else export(two, "onnx")
    table = classify(given, [images], tmp_path / "labels.csv")
    rows = rows_of(table)
    assert list(rows[0]) == ["file", "label", "unsure", "probability_cat", "probability_dog"]
    assert [(row["file"], row["label"], row["unsure"]) for row in rows[::4]] == [
        ("black/0.png", "dog", "yes"),
        ("white/0.png", "cat", "no"),
    ]
    assert float(rows[4]["probability_cat"]) == pytest.approx(BY_HAND[0], abs=1e-5)
    assert FolderDataModule(str(images), labels=str(table), image_size=2, channels=1).class_names == ["cat", "dog"]


@pytest.mark.parametrize("source", ["directory", "onnx"])
def test_a_predictor_knows_both_thresholds(two, tmp_path, source):
    predictor = Predictor(two if source == "directory" else export(two, "onnx"))
    assert (predictor.unsure_below, predictor.threshold) == (0.53, 0.4)
    images = images_of(tmp_path / "images")
    found = predictor.files([images / "white/0.png", images / "black/0.png"])
    assert found.unsure.tolist() == [False, True]
    assert predictor.files([]).unsure.shape == (0,)


def test_without_a_bound_there_is_no_such_column(tmp_path):
    directory = write_model(tmp_path / "auto", [of_logits(2, 0)], TWO)
    images = images_of(tmp_path / "images")
    rows = rows_of(classify(directory, [images]))
    assert list(rows[0]) == ["file", "label", "probability_cat", "probability_dog"]
    assert Predictor(directory).files([images / "white/0.png"]).unsure is None


def test_an_onnx_file_of_an_average_needs_neither_torch_nor_lightning(two, tmp_path):
    images_of(tmp_path / "images")
    export(two, "onnx", tmp_path / "two.onnx")
    code = (
        "import sys; from lightning_automl.__main__ import main; "
        "status = main(['classify', 'two.onnx', 'images', '--out=out.csv']); "
        "print(status, sorted({'torch', 'lightning', 'torchvision', 'torchmetrics'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == "0 []\n", ran.stderr
    assert [row["unsure"] for row in rows_of(tmp_path / "out.csv")] == ["yes", "no"]


def test_safetensors_hold_every_member_and_how_to_put_them_together(two):
    path = export(two, "safetensors")
    names = ["mean", "model.linear.bias", "model.linear.weight", "std"]
    tensors = load_file(path)
    assert sorted(tensors) == [f"members.{number}.{name}" for number in (0, 1) for name in names]
    assert tensors["members.1.model.linear.weight"].sum(1).tolist() == pytest.approx([0, 0.9])
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    numbers = {name: json.loads(facts[name]) for name in ("members", "temperature", "unsure_below", "threshold")}
    assert numbers == {"members": 2, "temperature": 2.0, "unsure_below": 0.53, "threshold": 0.4}
    assert facts["probabilities"] == "softmax"
    assert facts["averaging"].startswith("logits = log(max(mean over members of probabilities, 1e-12)) / temperature")


def test_onnx_gives_calibrated_logits_and_probabilities_for_any_batch(two):
    session = onnxruntime.InferenceSession(export(two, "onnx"))
    for batch in (1, 4):
        logits, probabilities = session.run(None, {"images": WHITE.repeat(batch, 1, 1, 1).numpy()})
        assert logits == pytest.approx(np.array([[math.log(p) / 2 for p in MEAN]] * batch), abs=1e-5)
        assert probabilities == pytest.approx(np.array([BY_HAND] * batch), abs=1e-5)


def test_torch_export_gives_calibrated_logits(two):
    module = torch.export.load(export(two, "torch")).module()
    torch.testing.assert_close(module(WHITE.repeat(3, 1, 1, 1)).softmax(1), torch.tensor([BY_HAND] * 3))


def test_binary_cross_entropy_of_a_member_means_its_own_probabilities(tmp_path):
    model, change = of_logits(2, -1)
    model["init_args"]["loss"] = {"class_path": "lightning_automl.losses.BinaryCrossEntropy"}
    directory = write_model(tmp_path / "auto", [(model, change)], TWO)
    sigmoids = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    expected = [sigmoid / sum(sigmoids) for sigmoid in sigmoids]
    assert Predictor(directory).arrays(np.full((1, 1, 2, 2), 255, np.uint8))[0].tolist() == pytest.approx(
        expected, abs=1e-6
    )
    with safe_open(export(directory, "safetensors"), "pt") as file:
        assert "probabilities of a member are BinaryCrossEntropy.probabilities" in file.metadata()["averaging"]


def test_a_member_can_be_used_alone(two, tmp_path):
    member = two / Ensemble.read(two).members[1]
    export(member, "torch")
    rows = rows_of(classify(member, [images_of(tmp_path / "images")]))
    assert list(rows[1]) == ["file", "label", "probability_cat", "probability_dog"]
    assert rows[1]["label"] == "dog"


def test_what_is_written_is_what_is_read(two):
    ensemble = Ensemble.read(two)
    record = read_json(two / "model.json")
    assert list(record)[:6] == ["version", "members", "average", "temperature", "threshold", "unsure_below"]
    ensemble.write()
    assert (Ensemble.read(two), read_json(two / "model.json")) == (ensemble, record)
    assert is_of_auto(two)
    assert not is_of_auto(ensemble.places[0])


@pytest.mark.parametrize("arguments", [("export",), ("export", "--format=safetensors"), ("classify", "images")])
def test_without_a_model_one_sentence_says_what_to_do(command, two, tmp_path, arguments):
    images_of(tmp_path / "images")
    (two / "model.json").unlink()
    name, *others = arguments
    answer = command(name, two, *others)
    assert answer.status == 2
    assert answer.err == (
        f"lightning-automl: {two} has no model yet: auto has not come to its end there; give the same "
        "`lightning-automl auto` command again, it goes on where it stopped\n"
    )


def test_an_average_is_not_compressed_but_its_member_is_named(command, two):
    answer = command("export", two, "--compress=energy=0.9")
    assert answer.status == 2
    assert "only the network of a run can be compressed; give" in answer.err
    assert answer.err.endswith("final-seed-0\n")


@pytest.mark.parametrize("name", ["fit", "test"])
@pytest.mark.parametrize("further", ["openings.json", "study.json"])  # the arms compete in a study
def test_commands_on_runs_say_where_runs_are(command, two, name, further):
    write_json(two / further, [])
    answer = command(name, f"--dir={two}")
    assert answer.status == 2
    assert answer.err == (
        f"lightning-automl: {two} is the directory of auto, which holds many runs; give {name} the --dir of one of "
        f"those below {two}/runs\n"
    )
    with pytest.raises(UserError, match="is the directory of auto, which holds many runs; give one of those below"):
        Run.read(two)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "is not of version 1"),
        ({"members": []}, "is damaged"),
        ({"temperature": 0}, "is damaged"),
        ({"temperature": "hot"}, "is damaged"),
        ({"average": "median"}, "is damaged"),
        ({"image_size": None}, "is damaged"),
        ({"channels": 3}, "is of other images than the model"),
        ({"class_names": ["dog", "cat"]}, "is of other images than the model"),
    ],
)
def test_a_damaged_model_is_told(two, change, sentence):
    write_json(two / "model.json", read_json(two / "model.json") | change)
    with pytest.raises(UserError, match=sentence):
        Predictor(two)


def test_a_member_that_is_gone_is_told(two):
    shutil.rmtree(Ensemble.read(two).places[1])
    with pytest.raises(UserError, match=r"final-seed-1, a part of the model of .*, is gone; restore it"):
        export(two, "torch")


def test_a_diverged_member_labels_nothing(two):
    path = Ensemble.read(two).places[0] / "checkpoints/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.linear.bias"][:] = float("nan")
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="gives no numbers"):
        Predictor(two).arrays(np.zeros((1, 1, 2, 2), np.uint8))
    with pytest.raises(UserError, match="gives no numbers"):
        export(two, "torch")
