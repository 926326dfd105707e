import io
import zipfile

import numpy as np
import pytest
import torch

from lightning_automl.data import ArraysDataModule
from lightning_automl.rundir import UserError


def images(number, *shape, dtype=np.uint8):
    return np.random.default_rng(number).integers(0, 200, (number, *shape)).astype(dtype)


def labels(number, classes=3):
    return (np.arange(number) % classes)[:, None].astype(np.uint8)


def arrays(**others):
    """A file's content in the layout of MedMNIST, with some entries replaced, added or (None) left out."""
    content = {
        "train_images": images(30, 9, 7),
        "train_labels": labels(30),
        "val_images": images(12, 9, 7),
        "val_labels": labels(12),
        "test_images": images(15, 9, 7),
        "test_labels": labels(15),
    }
    return {key: value for key, value in {**content, **others}.items() if value is not None}


def write(tmp_path, content):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, **content)
    return str(path)


def load(tmp_path, **others):
    data = ArraysDataModule(path=write(tmp_path, arrays(**others)))
    data.setup("fit")
    return data


def test_the_official_splits_are_read(tmp_path):
    content = arrays()
    data = load(tmp_path)
    assert (data.num_classes, data.channels, data.image_size) == (3, 1, (9, 7))
    assert data.class_names == ["0", "1", "2"]
    for split in ("train", "val", "test"):
        pixels, targets = data.datasets[split][torch.arange(len(content[f"{split}_images"]))]
        assert torch.equal(pixels[:, 0], torch.from_numpy(content[f"{split}_images"]))
        assert torch.equal(targets, torch.from_numpy(content[f"{split}_labels"][:, 0]).long())
    assert data.contents.names[data.split_rows["val"][2]] == "val[2]"


def test_colours_are_the_last_axis(tmp_path):
    sets = {f"{split}_images": images(n, 9, 7, 3) for split, n in (("train", 30), ("val", 12), ("test", 15))}
    data = load(tmp_path, **sets)
    assert data.channels == 3
    expected = torch.from_numpy(sets["test_images"]).permute(0, 3, 1, 2)
    assert torch.equal(data.datasets["test"][torch.arange(15)][0], expected)


def test_images_of_a_fold_come_from_the_arrays_of_both_splits(tmp_path):
    content = arrays()
    data = ArraysDataModule(path=write(tmp_path, content), fold=0, folds=3)
    data.setup("fit")
    together = np.concatenate([content["train_images"], content["val_images"], content["test_images"]])
    for split, rows in data.split_rows.items():
        pixels = data.datasets[split][torch.arange(len(rows))][0][:, 0]
        assert torch.equal(pixels, torch.from_numpy(together[rows]))


def test_missing_splits_are_cut_off(tmp_path):
    data = load(tmp_path, val_images=None, val_labels=None)
    assert {split: len(rows) for split, rows in data.split_rows.items()} == {"train": 24, "val": 6, "test": 15}
    data = load(tmp_path, val_images=None, val_labels=None, test_images=None, test_labels=None)
    assert {split: len(rows) for split, rows in data.split_rows.items()} == {"train": 21, "val": 3, "test": 6}


def test_names_and_groups_are_read(tmp_path):
    groups = np.array([f"patient {row // 2}" for row in range(30)])
    others = {f"{split}_groups": np.array([f"{split} {row}" for row in range(n)]) for split, n in (("val", 12),)}
    data = load(
        tmp_path,
        class_names=np.array(["x", "y", "z"]),
        train_groups=groups,
        test_images=None,
        test_labels=None,
        **others,
    )
    assert data.class_names == ["x", "y", "z"]
    train, test = (set(data.contents.groups[data.split_rows[split]]) for split in ("train", "test"))
    assert train
    assert not train & test


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64, np.float32])
def test_other_number_types_are_windowed(tmp_path, dtype):
    sets = {f"{split}_images": images(n, 9, 7, dtype=dtype) for split, n in (("train", 30), ("val", 12), ("test", 15))}
    assert load(tmp_path, **sets).window is not None


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.bool_])
def test_labels_may_be_of_any_number_type(tmp_path, dtype):
    sets = {f"{split}_labels": labels(n, 2).astype(dtype) for split, n in (("train", 30), ("val", 12), ("test", 15))}
    assert load(tmp_path, **sets).num_classes == 2


class Unpicklable:
    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"train_images": None}, "has no 'train_images'; it holds test_images, test_labels, train_labels, val_images"),
        ({"train_labels": None}, "has 'train_images' but no 'train_labels'; it holds test_images"),
        (
            {"train_labels": np.zeros((30, 4), int)},
            r"train_labels of .* have the shape \(30, 4\); one label an image is",
        ),
        ({"train_images": images(30, 20, 20, 20)}, r"have the shape \(30, 20, 20, 20\): these are volumes"),
        ({"train_images": images(30, 3, 20, 20)}, r"\(30, 3, 20, 20\); move the channels to the last axis"),
        (
            {"train_images": images(30, 5, 5, 5, 3)},
            r"known: \(images, height, width\) and \(images, height, width, c",
        ),
        ({"train_images": images(30, 9)}, r"have the shape \(30, 9\); known: \(images, height, width\)"),
        (
            {"train_labels": labels(29)},
            "'train_labels' of .* has 29 rows and 'train_images' 30; both need one an image",
        ),
        ({"train_groups": np.arange(3)}, "'train_groups' of .* has 3 rows and 'train_images' 30"),
        ({"train_groups": np.arange(30)}, "has groups for some splits only; give '{split}_groups' for all or for none"),
        ({"val_images": images(12, 9, 8)}, r"val_images of .* are \(9, 8\) uint8 and train_images \(9, 7\) uint8; all"),
        ({"val_images": images(12, 9, 7, dtype=np.int16)}, r"are \(9, 7\) int16 and train_images \(9, 7\) uint8"),
        (
            {"train_images": images(30, 9, 7).astype(bool)},
            "train_images of .* are of type bool; known: uint8",
        ),
        ({"train_images": images(30, 9, 7).astype(complex)}, "are of type complex128; known"),
        ({"train_images": images(30, 9, 7).astype(str)}, "are of type <U3; known"),
        ({"train_images": np.array([Unpicklable()] * 30)}, "are of type object; known"),
        (
            {"train_labels": np.array([Unpicklable()] * 30)},
            "'train_labels' of .* holds Python objects, which only",
        ),
        ({"class_names": np.array([Unpicklable()] * 3)}, "'class_names' of .* holds Python objects"),
        ({"train_labels": labels(30) + 0.5}, "train_labels of .* contain 0.5 .row 0.; labels are whole numbers from 0"),
        ({"train_labels": np.where(labels(30) == 2, np.nan, 0)}, "contain nan .row 2."),
        ({"train_labels": labels(30).astype(str)}, "are of type <U3; use whole numbers from 0, and 'class_names' for"),
        ({"class_names": np.array(["x", "y"])}, r"image train\[2\] has the label 2; with 2 classes labels are 0 to 1"),
        ({"train_labels": labels(30).astype(int) - 1}, r"image train\[0\] has the label -1; with 3 classes"),
        ({"class_names": np.array(["x", "y", "z", "w"])}, "class 'w' has no image in the train split"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, others, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **others)


def test_what_is_no_npz_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*data.npz; give the path of an .npz file"):
        ArraysDataModule(path=str(tmp_path / "data.npz"))
    (tmp_path / "data.npz").write_text("file,label")
    with pytest.raises(UserError, match=r"is not an .npz file that numpy reads"):
        ArraysDataModule(path=str(tmp_path / "data.npz"))
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("notes.txt", "file,label")
    with pytest.raises(UserError, match=r"is not an .npz file that numpy reads"):
        ArraysDataModule(path=str(tmp_path / "data.npz"))
    np.save(tmp_path / "data.npy", images(3, 2, 2))
    with pytest.raises(UserError, match=r"is not an .npz file that numpy reads"):
        ArraysDataModule(path=str(tmp_path / "data.npy"))


def test_a_truncated_file_is_refused(tmp_path):
    whole = io.BytesIO()
    np.savez(whole, **arrays())
    (tmp_path / "data.npz").write_bytes(whole.getvalue()[:-500])
    with pytest.raises(UserError, match=r"is not an .npz file that numpy reads"):
        ArraysDataModule(path=str(tmp_path / "data.npz"))


def test_the_index_does_not_read_the_images(tmp_path, monkeypatch):
    path = write(tmp_path, arrays())
    monkeypatch.setattr(ArraysDataModule, "images", lambda *_: pytest.fail("images were read"))
    assert ArraysDataModule(path=path).num_classes == 3
