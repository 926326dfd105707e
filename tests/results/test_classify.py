import csv
import os
import shutil
import sys

import numpy as np
import pytest
import tifffile

from lightning_automl.data import FolderDataModule
from lightning_automl.results import classify
from lightning_automl.rundir import UserError


def rows_of(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
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
        f"{images}/light/2.png",
        f"{images}/light/4.bmp",
    ]


@pytest.fixture
def few(images, tmp_path):
    """A folder with two of the images."""
    (tmp_path / "few").mkdir()
    for name in ("0.png", "1.jpg"):
        shutil.copy(images / "dark" / name, tmp_path / "few" / name)
    return tmp_path / "few"


def test_files_of_several_folders_keep_what_tells_them_apart(command, finished_folder, few):
    shutil.copytree(few, few.parent / "more")
    answer = command("classify", finished_folder, "few", "more/", "--out=labels.csv")
    assert answer.status == 0, answer.err
    rows = rows_of("labels.csv")
    assert [row["file"] for row in rows] == ["few/0.png", "few/1.jpg", "more/0.png", "more/1.jpg"]


def test_a_file_with_other_channels_is_listed_and_is_not_fatal(command, finished_folder, few):
    tifffile.imwrite(few / "odd.tif", np.zeros((5, 6, 8), np.uint8), photometric="minisblack")
    answer = command("classify", finished_folder, "few", "--out=labels.csv")
    assert answer.status == 0, answer.err
    assert "1 of 3 files cannot be read and are not in it: odd.tif (it has 5 channels and 3 were asked" in answer.err
    assert [row["file"] for row in rows_of("labels.csv")] == ["0.png", "1.jpg"]


def test_many_channels_without_tifffile_name_the_command(finished_folder, few, monkeypatch):
    tifffile.imwrite(few / "odd.tif", np.zeros((5, 6, 8), np.uint8), photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match="needs tifffile; pip install tifffile"):
        classify(finished_folder, [few], few / "labels.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_list_is_separated_by_commas_semicolons_or_tabs(finished_folder, few, delimiter):
    (few / "list.csv").write_text(f"note{delimiter} file\nx{delimiter}1.jpg\n")
    rows = rows_of(classify(finished_folder, [few / "list.csv"], few / "labels.csv"))
    assert [row["file"] for row in rows] == ["1.jpg"]


@pytest.mark.parametrize("listed", ["", "list.txt", "list.csv"])
def test_names_that_are_not_utf_8_are_labelled_and_listed(command, finished_folder, few, listed):
    names = [os.fsdecode(b"\xe9t\xe9.png"), os.fsdecode(b"\xe9t\xe9.gif")]
    (few / "0.png").rename(few / names[0])
    (few / names[1]).write_bytes(b"")
    if listed:
        (few / listed).write_bytes(b"file\n" * (listed == "list.csv") + b"\xe9t\xe9.png\n\xe9t\xe9.gif\n1.jpg\n")
    answer = command("classify", finished_folder, few / listed, "--out=labels.csv")
    assert answer.status == 0, answer.err
    assert {row["file"] for row in rows_of("labels.csv")} == {names[0], "1.jpg"}
    assert "1 of 3 files cannot be read" in answer.err
    assert ".gif (the file is empty)" in answer.err


def test_a_name_that_no_file_can_have_is_listed(finished_folder, few, caplog):
    (few / "list.txt").write_text(f"{'x' * 300}.png\n1.jpg\n")
    assert len(rows_of(classify(finished_folder, [few / "list.txt"], few / "labels.csv"))) == 1
    assert "xxx.png (there is no such file)" in caplog.text


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
