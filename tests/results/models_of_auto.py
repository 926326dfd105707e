"""Directories of `auto` with a model, written by hand: what its members' tasks are at their start, or given logits."""

import math

import torch
import yaml
from torch import nn

import lightning_automl.adapters
import lightning_automl.tasks  # noqa: F401  # so that configs may name its classes in short
from lightning_automl.parser import adapt_jsonargparse
from lightning_automl.results.ensemble import Ensemble
from lightning_automl.results.network import Trained, build_task
from lightning_automl.rundir import write_json

TWO = Trained(["cat", "dog"], 1, (2, 2))


def write_run(directory, model, trained, change):
    """Write what `fit` leaves of a task, after `change(task)` in place of training."""
    adapt_jsonargparse()  # as the commands do: short names mean our classes
    task = build_task(model, trained)
    (directory / "checkpoints").mkdir(parents=True)
    if hasattr(task, "save_base"):
        task.save_base(directory / "checkpoints" / "base.safetensors")
    change(task)
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, directory / "checkpoints" / "best.ckpt")
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {}, "trainer": {}}))
    names = ("class_names", "channels", "window")
    write_json(
        directory / "data.json",
        {name: getattr(trained, name) for name in names} | {"image_size": list(trained.image_size)},
    )
    return directory


def write_model(directory, members, trained, **facts):
    """Write the directory of `auto` whose model has these members: a `(model, change)` each."""
    names = [f"runs/arm-00000000/final-seed-{seed}" for seed in range(len(members))]
    for name, (model, change) in zip(names, members, strict=True):
        write_run(directory / name, model, trained, change)
    (directory / "config.yaml").write_text(yaml.safe_dump({"auto": "images", "budget": 60.0}))
    given = {"members": names, "average": "predictions" if len(names) > 1 else "single", "temperature": 1.0} | facts
    Ensemble(
        directory,
        **given,
        **{name: getattr(trained, name) for name in ("class_names", "channels")},
        image_size=trained.image_size,
        window=trained.window,
    ).write()
    return directory


def of_logits(*white, black=(0, 0)):
    """A member that gives these two logits for a white image of four pixels, and others for a black one."""

    def change(task):
        ends = torch.tensor([white, black], dtype=torch.float)
        task.model.linear.weight.data = (ends[0] - ends[1])[:, None].expand(-1, 4) / 4
        task.model.linear.bias.data = ends[1]

    return {"class_path": "ClassificationTask", "init_args": {"model": {"class_path": f"{__name__}.Linear"}}}, change


class Linear(nn.Module):
    """A linear layer on the pixels."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels * math.prod(image_size), num_classes)

    def forward(self, images):
        return self.linear(images.flatten(1))
