import csv

import pytest

from lightning_automl.data import FolderDataModule
from lightning_automl.results import classify
from lightning_automl.rundir import UserError


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def images(finished_folder):
    return finished_folder.parent / "images"


def test_a_folder_of_any_sizes_and_modes_is_labelled(finished_folder, images, tmp_path):
    rows = rows_of(classify(finished_folder, [images], tmp_path / "labels.csv"))
    assert len(rows) == 24
    assert list(rows[0]) == ["file", "label", "probability_dark", "probability_light"]
    for row in rows:
        assert (images / row["file"]).exists()
        scores = {name: float(row[f"probability_{name}"]) for name in ("dark", "light")}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
        assert row["label"] == max(scores, key=scores.get)
    assert sum(row["file"].startswith(row["label"]) for row in rows) > 20


def test_broken_files_are_listed_at_the_end_and_are_not_fatal(command, finished_folder, images):
    answer = command("classify", finished_folder, images, "--out=labels.csv")
    assert answer.status == 0
    first, last = answer.err.splitlines()
    assert first == "24 images are labelled in labels.csv"
    assert last.startswith("3 of 27 files cannot be read and are not in it: ")
    for name in ("light/cut.png", "light/empty.jpg (the file is empty)", "light/text.png (not an image"):
        assert name in last


def test_a_data_module_reads_the_table(finished_folder, images, tmp_path):
    table = classify(finished_folder, [images], tmp_path / "labels.csv")
    data = FolderDataModule(str(images), labels=str(table), image_size=8, channels=3)
    assert data.class_names == ["dark", "light"]
    assert len(data.contents.labels) == 24


def test_files_and_lists_of_files_are_labelled(finished_folder, images, tmp_path):
    (tmp_path / "list.txt").write_text(f"{images}/dark/1.jpg\n\n{images}/dark/3.gif\n")
    (images / "beside.csv").write_text("file,note\nlight/2.png,x\nlight/nothing.png,y\n")
    given = [tmp_path / "list.txt", images / "beside.csv", images / "light" / "4.bmp"]
    rows = rows_of(classify(finished_folder, given, tmp_path / "labels.csv"))
    (images / "beside.csv").unlink()
    assert [row["file"] for row in rows] == [
        f"{images}/dark/1.jpg",
        f"{images}/dark/3.gif",
        "light/2.png",
        f"{images}/light/4.bmp",
    ]


def test_the_table_goes_into_the_run_directory_by_default(folder_run, images):
    assert classify(folder_run, [images / "dark"]) == folder_run / "classified.csv"


def test_an_image_without_any_readable_file_is_refused_and_the_old_table_stays(command, finished_folder, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.png").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("kept")
    answer = command("classify", finished_folder, "new", "--out=labels.csv")
    assert answer.status == 2
    assert answer.err == (
        "lightning-automl: none of the 1 image files can be read: a.png (not an image of a known type)\n"
    )
    assert (tmp_path / "labels.csv").read_text() == "kept"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("empty", "there is no image in empty; known: .png"),
        ("nothing", "there is no file or folder nothing"),
        ("notes.pdf", "notes.pdf is neither a folder, an image"),
        ("table.csv", "table.csv has no column 'file'; it has path"),
    ],
)
def test_what_holds_no_images_is_refused(command, finished_folder, tmp_path, given, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pdf").write_text("")
    (tmp_path / "table.csv").write_text("path\na.png\n")
    answer = command("classify", finished_folder, given)
    assert answer.status == 2
    assert answer.err.startswith(f"lightning-automl: {sentence}")
    assert answer.err.count("\n") == 1


def test_an_onnx_file_needs_a_place_for_the_table(tmp_path):
    with pytest.raises(UserError, match="--out"):
        classify(tmp_path / "a.onnx", [tmp_path])
