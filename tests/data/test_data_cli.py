import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image

from lightning_automl.augment import random_flip
from lightning_automl.data import DigitsDataModule, ImageDataModule


def parse(*arguments):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    return parser.instantiate(parser.parse_args(list(arguments))).data


def test_short_names_and_inherited_arguments_are_accepted():
    data = parse(
        "--data=DigitsDataModule",
        "--data.base_augment=crop_flip",
        "--data.fold=1",
        "--data.batch_size=auto",
        "--data.train_policy=torch.nn.Identity",
        "--data.subset=0.5",
    )
    assert isinstance(data, DigitsDataModule)
    assert (data.base_augment, data.batch_size, data.device_batch_size) == ("crop_flip", "auto", 128)
    assert len(data.split_rows["val"]) == pytest.approx(1797 * 0.8 / 5, abs=1)
    assert isinstance(data.train_policy, torch.nn.Identity)


def test_folders_and_sizes_are_accepted(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(4):
            Image.new("RGB", (20 + number, 20)).save(tmp_path / label / f"{number}.png")
    path = f"--data.path={tmp_path}"
    assert parse("--data=FolderDataModule", path, "--data.image_size=8").image_size == (8, 8)
    assert parse("--data=FolderDataModule", path, "--data.image_size=[8, 6]").image_size == (8, 6)


@pytest.mark.parametrize("wrong", ["--data.fold=many", "--data.base_augment=flip", "--data.folder=3"])
def test_wrong_arguments_are_refused_by_the_parser(wrong):
    with pytest.raises(Exception, match=wrong.split("=")[0].removeprefix("--data.")):
        parse("--data=DigitsDataModule", wrong)


def test_a_policy_may_be_a_function():
    data = parse("--data=DigitsDataModule", "--data.train_policy=lightning_automl.augment.random_flip")
    assert data.train_policy is random_flip


def test_a_policy_may_have_arguments():
    data = parse("--data=DigitsDataModule", "--data.train_policy=torch.nn.Dropout", "--data.train_policy.p=0.2")
    assert data.train_policy.p == 0.2
