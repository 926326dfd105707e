import shutil

import numpy as np
import pytest
import torch
import yaml

from lightning_automl.data import DigitsDataModule
from lightning_automl.results.network import trained_task
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError, write_json


def test_the_network_is_built_again_with_its_weights_and_normalisation(finished_digits):
    run = Run.read(finished_digits)
    task = trained_task(run)
    assert not task.training
    data = DigitsDataModule()
    images = torch.cat([images for images, _ in data.test_dataloader()])
    with torch.no_grad():
        found = task.probabilities(task(images)).numpy()
    # the run itself may have computed in bf16
    kept = run.predictions("test").probabilities
    assert (found.argmax(1) == kept.argmax(1)).mean() > 0.99
    assert np.abs(found - kept).mean() < 0.01
    assert task.mean.flatten().tolist() == pytest.approx([0.305], abs=0.01)


def test_neither_data_nor_first_weights_are_needed(finished_folder, tmp_path):
    directory = shutil.copytree(finished_folder, tmp_path / "run")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["data"]["init_args"]["path"] = "gone"
    config["model"]["init_args"]["model"] = {"class_path": "ResNet", "init_args": {"depth": 8, "weights": "gone.th"}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="another network"):  # and not: there is no file gone.th
        trained_task(Run.read(directory))


def test_averaged_weights_are_the_ones_that_are_built(command, tmp_path):
    from conftest import DIGITS

    command("fit", "--config", DIGITS, "--dir=run", "--trainer.max_epochs=2", "--trainer.callbacks+=EMAWeightAveraging")
    checkpoint = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    task = trained_task(Run.read("run"))
    name = "model.linear.weight"
    assert torch.equal(task.state_dict()[name], checkpoint["state_dict"][name])
    assert not torch.equal(task.state_dict()[name], checkpoint["current_model_state"][name])


def test_a_run_without_a_finished_epoch_has_no_network(digits):
    (digits / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match="no epoch of this run was finished"):
        trained_task(Run.read(digits))


def test_a_run_that_does_not_know_its_classes_says_so(digits):
    write_json(digits / "data.json", {"channels": 1})
    with pytest.raises(UserError, match="does not say the class_names, image_size"):
        trained_task(Run.read(digits))


def test_a_class_that_is_gone_is_told(digits):
    text = (digits / "config.yaml").read_text().replace("models.TunableCNN", "models.Vanished")
    (digits / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"cannot be built again: .*Vanished"):
        trained_task(Run.read(digits))
