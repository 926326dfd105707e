import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_automl.results import Predictor, export
from lightning_automl.results.network import trained_task
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError, write_json

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def sources(finished_digits, tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "digits.onnx"
    return {"run": finished_digits, "onnx": export(finished_digits, "onnx", file)}


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_arrays_get_the_probabilities_of_the_task(sources, kind):
    task = trained_task(Run.read(sources["run"]))
    with torch.no_grad():
        expected = task.probabilities(task(torch.from_numpy(IMAGES))).numpy()
    predictor = Predictor(sources[kind])
    assert predictor.arrays(IMAGES) == pytest.approx(expected, abs=1e-5)
    assert (predictor.channels, predictor.image_size, predictor.class_names[9]) == (1, (8, 8), "9")


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_files_of_the_networks_size_are_given_as_they_are(sources, kind, tmp_path):
    paths = []
    for index, image in enumerate(IMAGES):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image[0]).save(paths[-1])
    predictor = Predictor(sources[kind])
    result = predictor.files(paths)
    assert (result.files, result.broken) == (paths, {})
    assert result.probabilities == pytest.approx(predictor.arrays(IMAGES), abs=1e-6)


def test_many_batches_keep_the_order_and_tell_the_broken(sources, tmp_path):
    paths = []
    for index in range(11):
        paths.append(tmp_path / f"{index}.png")
        Image.new("L", (8, 8), 20 * index).save(paths[-1])
    paths[4].write_bytes(b"no image")
    paths.insert(7, tmp_path / "missing.png")
    predictor = Predictor(sources["run"])
    parts = list(predictor.stream(paths, batch_size=3))
    assert [file for part in parts for file in part.files] == [
        path for path in paths if path.name not in ("4.png", "missing.png")
    ]
    assert {file.name: reason for part in parts for file, reason in part.broken.items()} == {
        "4.png": "not an image of a known type",
        "missing.png": "there is no such file",
    }
    one = predictor.files([paths[-1]]).probabilities
    assert parts[-1].probabilities[-1] == pytest.approx(one[0], abs=1e-6)


def test_an_onnx_file_needs_neither_torch_nor_lightning(sources, tmp_path):
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "a.png")
    code = (
        "import sys; from lightning_automl.__main__ import main; "
        f"status = main(['classify', {str(sources['onnx'])!r}, 'a.png', '--out=out.csv']); "
        "print(status, sorted({'torch', 'lightning', 'torchvision', 'torchmetrics'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == "0 []\n", ran.stderr
    assert (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "images", [IMAGES[0], IMAGES.astype(np.float32), IMAGES[:, :, :4], np.repeat(IMAGES, 3, axis=1)]
)
def test_arrays_of_another_kind_are_refused(sources, images):
    with pytest.raises(UserError, match=r"takes uint8 .* \(1, 8, 8\)"):
        Predictor(sources["run"]).arrays(images)


def test_files_with_16_bits_are_brought_to_8_by_their_whole_range(sources, tmp_path):
    Image.fromarray(IMAGES[0, 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    predictor = Predictor(sources["run"])
    result = predictor.files([tmp_path / "deep.png"])
    assert result.probabilities == pytest.approx(predictor.arrays(IMAGES[:1]), abs=1e-6)


def test_a_network_of_deep_images_uses_the_window_of_its_training(digits, tmp_path):
    run = Run.read(digits)
    write_json(digits / "data.json", run.data | {"window": [[1000, 2000]]})
    Image.fromarray(np.full((8, 8), 1500, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "flat.png")
    predictor = Predictor(digits)
    result = predictor.files([tmp_path / "deep.png", tmp_path / "flat.png"])
    assert result.probabilities == pytest.approx(predictor.arrays(np.full((1, 1, 8, 8), 128, np.uint8)), abs=1e-6)
    assert list(result.broken) == [tmp_path / "flat.png"]
    file = export(digits, "onnx")
    again = Predictor(file).files([tmp_path / "deep.png"])
    assert again.probabilities == pytest.approx(result.probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.pt2", b"", "neither a run directory nor an .onnx file"),
        ("a.onnx", b"no onnx", "cannot be read as ONNX"),
        ("nothing", None, "there is no directory"),
    ],
)
def test_other_sources_are_refused(name, content, sentence, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        Predictor(tmp_path / name)


def test_somebody_elses_onnx_file_is_refused(tmp_path):
    import onnx

    tensor = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["images"], ["probabilities"])
    output = onnx.helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [tensor], [output])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "a.onnx",
    )
    with pytest.raises(UserError, match="does not say its classes"):
        Predictor(tmp_path / "a.onnx")


def test_without_onnxruntime_the_extra_is_named(sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install "lightning-automl\[onnx\]"'):
        Predictor(sources["onnx"])


def test_a_diverged_network_labels_nothing(command, digits):
    checkpoint = torch.load(digits / "checkpoints/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.linear.bias"][:] = float("nan")
    torch.save(checkpoint, digits / "checkpoints/best.ckpt")
    Image.fromarray(IMAGES[0, 0]).save(digits / "a.png")
    for arguments in (["classify", digits, digits / "a.png", "--out=out.csv"], ["export", digits]):
        answer = command(*arguments)
        assert answer.status == 2
        assert "gives no numbers (NaN): its training has diverged" in answer.err
    assert not (digits / "model.onnx").exists()


def test_a_damaged_checkpoint_is_told(digits):
    path = digits / "checkpoints/best.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"best.ckpt cannot be read \(.*\); it is damaged"):
        Predictor(digits)
