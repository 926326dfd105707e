import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from lightning_automl.data import CIFAR10DataModule, CIFAR100DataModule
from lightning_automl.rundir import UserError


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)


def write_torchvision_folder(root, monkeypatch, classes):
    """The files of CIFAR with few images; their checksums are not asked for."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    reader = getattr(datasets, f"CIFAR{classes}")
    folder = root / reader.base_folder
    folder.mkdir()
    key, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    for name, number in [(name, 200) for name, _ in reader.train_list] + [(name, 100) for name, _ in reader.test_list]:
        content = {"data": pixels(number).reshape(number, -1), key: [row % classes for row in range(number)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({names: [f"class {n}" for n in range(classes)]}))


@pytest.mark.parametrize(
    ("module", "classes", "train"), [(CIFAR10DataModule, 10, 1000), (CIFAR100DataModule, 100, 200)]
)
def test_the_folder_of_torchvision_is_read(tmp_path, monkeypatch, module, classes, train):
    write_torchvision_folder(tmp_path, monkeypatch, classes)
    data = module(path=str(tmp_path), val_fraction=0.5)
    data.setup("fit")
    assert (data.num_classes, data.channels, data.image_size) == (classes, 3, (32, 32))
    assert data.class_names[3] == "class 3"
    assert {split: len(rows) for split, rows in data.split_rows.items()} == {
        "train": train // 2,
        "val": train // 2,
        "test": 100,
    }
    images, labels = data.datasets["test"][torch.arange(100)]
    assert torch.equal(images, torch.from_numpy(pixels(100)))
    assert labels.tolist() == [row % classes for row in range(100)]


def test_an_npz_file_is_read(tmp_path):
    images, labels = pixels(200).transpose(0, 2, 3, 1), np.arange(200) % 10
    np.savez(tmp_path / "c.npz", train_images=images, train_labels=labels)
    assert CIFAR10DataModule(path=str(tmp_path / "c.npz")).num_classes == 10
    with pytest.raises(UserError, match=r"c.npz has 10 classes and CIFAR100 100; use ArraysDataModule for other data"):
        CIFAR100DataModule(path=str(tmp_path / "c.npz"))


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no complete folder cifar-10-batches-py; give the folder"):
        CIFAR10DataModule(path=str(tmp_path))
    with pytest.raises(UserError, match="holds no complete folder cifar-100-python"):
        CIFAR100DataModule(path=str(tmp_path / "nowhere"))
