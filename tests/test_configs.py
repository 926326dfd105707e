import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_automl.models import ResNet

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

#: Drawn data in place of the file that the first line of a config names: classes, channels, side.
ARRAYS = {"cifar100.npz": (100, 3, 32), "cifar10_small.npz": (10, 3, 32), "pneumoniamnist.npz": (2, 1, 28)}
#: And in place of a file of weights.
WEIGHTS = {"cifar10_resnet20.th": lambda: ResNet(10)}


def draw_folder(path):
    for label in ("cat", "dog"):
        (path / label).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (40 + number, 50), (10 * number, 0, 100)).save(path / label / f"{number}.png")
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_runs_by_the_command_of_its_first_line(config, command, make_npz, warm_server, tmp_path):
    line = config.read_text().splitlines()[0]
    program, *arguments = shlex.split(line.removeprefix("# "))
    assert program == "lightning-automl"
    assert ROOT / arguments[arguments.index("--config") + 1] == config
    arguments[arguments.index("--config") + 1] = str(config)
    for index, argument in enumerate(arguments):
        if argument == "my_images":
            arguments[index] = str(draw_folder(tmp_path / argument))
        elif argument in ARRAYS:
            classes, channels, side = ARRAYS[argument]
            counts = (4 * classes, classes, classes)
            arguments[index] = str(make_npz(tmp_path / argument, classes, channels, side, counts))
        elif argument in WEIGHTS:
            arguments[index] = str(tmp_path / argument)
            torch.save(WEIGHTS[argument]().state_dict(), arguments[index])
    if "--dir" not in arguments:
        arguments += ["--dir", "run"]
    if arguments[0] == "search":
        small = (
            "--run.trainer.max_epochs=1",
            "--run.trainer.limit_train_batches=2",
            "--run.data.init_args.batch_size=8",
        )
        if "PopulationSampler" in config.read_text():
            small += ("--sampler.init_args.ready=1",)
        if "method:" in config.read_text():
            small += ("--folds=2", "--method.init_args.keep=1", "--acceptance=null")
        answer = command(*arguments, *small, "--trials=2")
    else:
        answer = command(*arguments, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    assert answer.status == 0, answer.err
    assert (tmp_path / arguments[arguments.index("--dir") + 1] / "summary.json").exists()
