import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import DIGITS, ROOT, SHORT
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lightning_automl.callbacks import AtomicCheckpointIO
from lightning_automl.data import DigitsDataModule
from lightning_automl.results import Predictor, Run
from lightning_automl.rundir import lock


def read(path):
    return json.loads(Path(path).read_text())


def test_a_fit_leaves_what_the_design_promises(fit, tmp_path):
    answer = fit("--dir=run", "--trainer.max_epochs=2")
    assert answer.status == 0, answer.err
    run = tmp_path / "run"
    summary = read(run / "summary.json")
    assert set(summary) == {"command", "status", "metrics", "seconds", "artefacts", "test_opened"}
    assert (summary["command"], summary["status"], summary["test_opened"]) == ("fit", "finished", 1)
    names = ("loss", "accuracy", "balanced_accuracy", "auroc", "f1", "calibration_error")
    assert {f"{stage}_{name}" for stage in ("train", "val", "test") for name in names} < set(summary["metrics"])
    for path in summary["artefacts"].values():
        assert (run / path).exists()
    assert {"curves", "confusion_test", "best_checkpoint"} < set(summary["artefacts"])
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"step", "lr", "train_loss", "val_accuracy", "seconds"} < set(rows[0])
    environment = read(run / "environment.json")
    assert environment["seed"] == 0
    assert {"versions", "hardware", "commit", "precision"} < set(environment)
    assert environment["network"] == {"class": "TunableCNN", "parameters": 338_250, "flops": 2_959_872}
    assert "epoch 1/2" in (run / "log.txt").read_text()
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert "dir" not in kept
    assert kept["trainer"]["max_epochs"] == 2


def test_nothing_is_written_beside_the_run_directory(fit, tmp_path):
    assert fit("--dir=run").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_dir_runs_are_numbered_by_the_name_of_the_config(fit, tmp_path):
    assert fit("--test_after_fit=false").status == 0
    assert fit("--test_after_fit=false").status == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits_cnn-1", "digits_cnn-2"]


def test_the_test_split_is_opened_on_purpose_and_counted(fit, command):
    assert fit("--dir=run", "--test_after_fit=false").status == 0
    summary = read("run/summary.json")
    assert summary["test_opened"] == 0
    assert not any(name.startswith("test_") for name in summary["metrics"])
    assert command("validate", "--dir=run").status == 0
    assert read("run/summary.json")["test_opened"] == 0
    assert command("test", "--dir=run").status == 0
    assert command("predict", "--dir=run").status == 0
    summary = read("run/summary.json")
    assert summary["test_opened"] == 2
    assert summary["command"] == "fit"
    assert 0 <= summary["metrics"]["test_accuracy"] <= 1


def test_predictions_have_a_row_an_image_and_agree_with_the_accuracy(fit, command):
    fit("--dir=run", "--trainer.max_epochs=2", "--trainer.limit_train_batches=1.0")
    assert command("predict", "--dir=run").status == 0
    with open("run/predictions.csv") as file:
        rows = list(csv.DictReader(file))
    accuracy = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert accuracy == pytest.approx(read("run/summary.json")["metrics"]["test_accuracy"], abs=1e-6)
    assert accuracy > 0.5
    for row in rows[:5]:
        assert sum(float(row[f"probability_{digit}"]) for digit in range(10)) == pytest.approx(1, abs=1e-4)


def test_a_finished_run_is_not_repeated_and_larger_limits_continue_it(fit):
    fit("--dir=run")
    before = Path("run/checkpoints/last.ckpt").stat().st_mtime_ns
    answer = fit("--dir=run")
    assert answer.status == 0
    assert "run is finished: test_loss" in answer.out
    assert Path("run/checkpoints/last.ckpt").stat().st_mtime_ns == before
    assert fit("--dir=run", "--trainer.max_epochs=3").status == 0
    with open("run/metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert read("run/summary.json")["test_opened"] == 2


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("--trainer.max_epochs=1", "run was started with trainer.max_epochs=2, now it is 1; limits can only grow"),
        (
            "--model.optimizer.lr=0.1",
            "run was started with model.init_args.optimizer.init_args.lr=0.003, now it is 0.1; "
            "give the former value to continue it, or another --dir to start anew",
        ),
        ("--seed_everything=1", "run was started with seed_everything=0, now it is 1; "),
    ],
)
def test_another_run_in_the_same_directory_is_refused(fit, key, sentence):
    assert fit("--dir=run", "--trainer.max_epochs=2").status == 0
    kept = Path("run/config.yaml").read_text()
    answer = fit("--dir=run", "--trainer.max_epochs=2", key)
    assert answer.status == 2
    assert answer.err.startswith(f"lightning-automl: {sentence}")
    assert answer.err.count("\n") == 1
    assert Path("run/config.yaml").read_text() == kept


def test_a_run_continues_by_its_directory_alone(fit, command):
    fit("--dir=run")
    assert command("fit", "--dir=run", "--trainer.max_epochs=2").status == 0
    with open("run/metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_a_trial_that_never_trained_can_be_corrected_in_place(fit):
    assert fit("--dir=run", "--model.model.pools=[max]").status == 2
    assert fit("--dir=run").status == 0


def test_the_saved_config_is_a_config(fit, command):
    fit("--dir=run")
    assert command("fit", "--config=run/config.yaml", "--dir=again").status == 0
    first, second = (read(f"{run}/summary.json")["metrics"] for run in ("run", "again"))
    assert first == second


def test_a_changed_class_starts_from_its_own_defaults(fit):
    """jsonargparse would hand AdamW's weight decay on to SGD."""
    fit("--dir=run", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
    optimizer = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (0.1, 0.0)


def test_an_unchanged_class_keeps_its_arguments(fit):
    fit("--dir=run", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.1")
    optimizer = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (0.1, 0.01)


def test_short_names_mean_this_package_where_torchvision_has_the_same(fit):
    assert fit("--dir=run", "--model.model=ResNet", "--model.model.depth=8").status == 0
    model = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["init_args"]["model"]
    assert model["class_path"] == "lightning_automl.models.ResNet"


class PlainData(LightningDataModule):
    """Somebody's own data, which know nothing of classes or channels."""

    def __init__(self, count: int = 32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(count, 1, 8, 8, generator=generator)
        self.dataset = TensorDataset(images, torch.arange(count) % 10)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=16)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")  # Lightning's advice on somebody's loader
def test_somebodys_own_data_module_works_with_what_the_user_says_of_it(command):
    keys = ("--model.num_classes=10", "--model.model.num_classes=10")
    keys += ("--model.model.in_channels=1", "--model.model.image_size=8")
    answer = command("fit", "--config", DIGITS, *SHORT, f"--data={__name__}.PlainData", *keys, "--dir=run")
    assert answer.status == 0, answer.err
    assert read("run/summary.json")["test_opened"] == 0  # it has no test split


OWN = """
import torch
from lightning.pytorch import LightningModule
from torch import nn
from lightning_automl.tasks import ClassificationTask

class MyTask(ClassificationTask):
    def __init__(self, *arguments, greeting: str = "hello", **keywords):
        super().__init__(*arguments, **keywords)
        self.greeting = greeting

class MyNetwork(nn.Module):
    def __init__(self, num_classes: int, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, images):
        return self.layers(images)

class Plain(nn.Module):
    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, 2, 3), nn.Flatten(), nn.Linear(72, num_classes))

    def forward(self, images):
        return self.layers(images)

class Bare(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.predictions, self.confusion = [], []

    def forward(self, images):
        return self.layer(images.flatten(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def my_loss(logits, labels):
    return nn.functional.cross_entropy(logits, labels) * 2
"""


def test_somebodys_own_task_network_and_loss_go_by_their_class_paths(command, tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    parts = {"model": {"class_path": "my_own.MyNetwork", "init_args": {"width": 8}}, "loss": "my_own.my_loss"}
    config = {
        "model": {"class_path": "my_own.MyTask", "init_args": {**parts, "greeting": "good morning"}},
        "data": {"class_path": "DigitsDataModule"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    answer = command("fit", "--config=c.yaml", *SHORT, "--dir=run")
    assert answer.status == 0, answer.err
    assert "MyNetwork: 610 parameters" in answer.err
    assert command("test", "--dir=run").status == 0


@pytest.mark.parametrize("model", [["ClassificationTask", "--model.model=my_own.Plain"], ["my_own.Bare"]])
def test_networks_and_tasks_of_few_arguments_go_the_whole_way(model, command, tmp_path, monkeypatch):
    """All arguments of Plain are taken from the data; Bare is a LightningModule that knows nothing of this package."""
    (tmp_path / "my_own.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_own", raising=False)
    keys = [f"--model={model[0]}", *model[1:], "--data=DigitsDataModule", *SHORT]
    answer = command("fit", *keys, "--dir=run")
    assert answer.status == 0, answer.err
    assert command("report", "run").status == 0
    answer = command("export", "run")
    assert answer.status == 0, answer.err
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    assert Predictor("run/model.onnx").arrays(images) == pytest.approx(Predictor("run").arrays(images), abs=1e-5)


def test_validate_leaves_the_run_as_it_was(fit, command):
    fit("--dir=run", "--trainer.max_epochs=2")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert command("validate", "--dir=run").status == 0
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed <= {"summary.json", "log.txt", ".lock"}
    assert fit("--dir=run", "--trainer.max_epochs=3").status == 0
    with open("run/metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_a_killed_run_that_is_tested_is_still_not_finished_and_goes_on(fit, command):
    fit("--dir=run", "--trainer.max_epochs=2")
    Path("run/summary.json").unlink()  # which is written last
    assert command("test", "--dir=run").status == 0
    summary = read("run/summary.json")
    assert (summary["command"], summary["status"], summary["reason"]) == ("fit", "failed", "not finished")
    assert summary["test_opened"] == 1
    assert fit("--dir=run", "--trainer.max_epochs=2").status == 0
    summary = read("run/summary.json")
    assert (summary["status"], "reason" in summary, summary["test_opened"]) == ("finished", False, 2)


def test_the_test_after_a_fit_with_averaged_weights_is_that_of_the_averaged_weights(command):
    keys = ["--trainer.max_epochs=2", "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    assert command("fit", "--config", DIGITS, "--dir=run", "--trainer.precision=32-true", *keys).status == 0
    found = Run.read("run").predictions("test")
    data = DigitsDataModule()
    images = torch.cat([images for images, _ in data.test_dataloader()]).numpy()
    assert Predictor("run").arrays(images) == pytest.approx(found.probabilities, abs=1e-5)
    before = read("run/summary.json")["metrics"]
    assert command("test", "--dir=run").status == 0
    assert read("run/summary.json")["metrics"] == pytest.approx(before, abs=1e-6)


def test_file_names_may_be_any_bytes(command, tmp_path):
    for label in ("a", "b"):
        for number in range(6):
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            name = os.fsdecode(b"\xe9t\xe9%d.png" % number)
            Image.new("L", (8, 8), 40 * number + (label == "b")).save(tmp_path / "images" / label / name)
    keys = ["--model=ClassificationTask", "--model.model=TunableCNN", "--data=FolderDataModule", "--data.path=images"]
    answer = command("fit", *keys, *SHORT, "--dir=run")
    assert answer.status == 0, answer.err
    assert command("report", "run").status == 0
    assert command("predict", "--dir=run").status == 0


BAD = {
    "unknown key": (["--trainer.max_epoch=3"], "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'"),
    "unknown argument": (
        ["--model.model.filtres=[3]"],
        "unknown argument of TunableCNN: 'filtres'; did you mean 'filters'? known: activation, conv_dropout",
    ),
    "inherited argument": (["--data.base_augmnt=crop"], "unknown argument of DigitsDataModule: 'base_augmnt'; did you"),
    "unknown class": (
        ["--model.model=TunabelCNN"],
        "unknown class for model.model: 'TunabelCNN'; did you mean 'TunableCNN'?",
    ),
    "class of another kind": (
        ["--model=DartsTask", "--model.model=ResNet"],
        "model.model: ResNet is not a Supernet",  # and what is known, of other tests too
    ),
    "network in place of a task": (["--model=DartsSpace"], "model: DartsSpace is not a LightningModule"),
    "network in place of a callback": (["--trainer.callbacks+=ResNet"], "trainer.callbacks: ResNet is not a Callback"),
    "argument before its class": (
        ["--model=DartsTask", "--model.model=DartsSpace", "--model.model.relaxation.k=3"],
        "model.model.relaxation has no class yet that could take 'k'; name one before it: ",
    ),
    "no such module": (["--model=nowhere.Task"], "model: class_path nowhere.Task cannot be imported: No module"),
    "wrong type": (["--trainer.max_epochs=many"], "trainer.max_epochs: 'many' is not a whole number or null"),
    "wrong choice": (["--model.model.activation=rleu"], "model.model.activation: 'rleu' is not one of "),
    "not a list": (["--model.model.filters=abc"], "model.model.filters: 'abc' is not a list"),
    "impossible combination": (["--model.model.pools=[max]"], "pools has 1 value for 2 convolution blocks"),
    "refused learning rate": (["--model.optimizer.lr=-1"], "the optimizer refused its arguments: Invalid learning"),
    "classes against the data": (
        ["--model.num_classes=7"],
        "model.init_args.num_classes is 7, but the data have 10 classes; leave it out",
    ),
    "missing file": (["--data=ArraysDataModule", "--data.path=nope.npz"], "there is no file nope.npz"),
    "missing path": (["--data=ArraysDataModule"], "missing: path of ArraysDataModule"),
    "fold out of range": (["--data.fold=9"], "fold is 9; with folds=5 it must be between 0 and 4"),
    "unknown metric": (["--monitor=val_acc"], "monitor 'val_acc' is not logged by ClassificationTask; logged are: "),
    "weights for other classes": (["--model.class_weights=[1, 2]"], "class_weights has 2 numbers for 10 classes"),
    "weights without a place": (
        ["--model.class_weights=balanced", "--model.loss=torch.nn.HuberLoss"],
        "class_weights is given, but the loss HuberLoss has no 'weight'; use CrossEntropyLoss",
    ),
    "adapter on a norm": (
        [
            *("--model=FinetuneTask", "--model.model=ResNet", "--model.model.depth=8", "--model.adapter=LoraConfig"),
            "--model.adapter.target_modules=[bn1]",
        ],
        "bn1 is a BatchNorm2d, which this adapter cannot be put on; candidates: ",
    ),
    "unknown device": (["--trainer.accelerator=quantum"], "You selected an invalid accelerator name"),
    "scheduler without an end": (["--trainer.max_epochs=-1"], "the scheduler needs to know the length of the run"),
}


@pytest.mark.parametrize(("keys", "sentence"), BAD.values(), ids=BAD)
def test_a_mistake_is_told_in_one_sentence(fit, keys, sentence):
    answer = fit("--dir=run", *keys)
    assert answer.status == 2
    told = [line for line in answer.err.splitlines() if line.startswith("lightning-automl: ")]
    assert len(told) == 1, answer.err
    assert told[0].startswith(f"lightning-automl: {sentence}")
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trainer: {max_epoch: 3}", "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'"),
        ("trainr: {max_epochs: 3}", "unknown key 'trainr.max_epochs'; did you mean 'trainer.max_epochs'"),
        ("model: [", "Problems parsing config"),
        ("data: {class_path: torch.nn.Linear}", "data: torch.nn.Linear is not a LightningDataModule; known: "),
        (
            "trainer: {callbacks: [{class_path: EarlyStoping}]}",
            "unknown class for trainer.callbacks: 'EarlyStoping'; did",
        ),
        ("data: {class_path: DigitsDataModule}", "missing: model; give it in the config or on the command line"),
    ],
)
def test_a_mistake_in_a_config_is_told_in_one_sentence(command, text, sentence, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    answer = command("fit", "--config=c.yaml")
    assert answer.status == 2
    assert answer.err.startswith(f"lightning-automl: {sentence}")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_missing_config_is_named(command, tmp_path):
    answer = command("fit", "--config=nope.yaml")
    assert (answer.status, answer.err.count("\n")) == (2, 1)
    assert "nope.yaml does not exist" in answer.err


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_commands_on_a_run_want_a_run_directory(name, command, tmp_path):
    answer = command(name)
    assert answer == (2, "", f"lightning-automl: {name} needs the directory of a run; give --dir\n")
    answer = command(name, "--dir=nowhere")
    assert answer.status == 2
    assert answer.err.startswith("lightning-automl: nowhere is not a run directory: it has no config.yaml")
    assert not (tmp_path / "nowhere").exists()


def test_a_foreign_directory_is_left_alone(fit, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    answer = fit("--dir=thesis")
    assert answer.status == 2
    assert "thesis is not a run directory and not empty (it holds chapter.tex); give another --dir" in answer.err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_two_runs_cannot_share_a_directory(fit, tmp_path):
    with lock(tmp_path / "run"):
        answer = fit("--dir=run")
    assert answer.status == 2
    assert "run is in use by process" in answer.err


def test_a_checkpoint_of_another_network_is_refused(fit, command):
    fit("--dir=run")
    answer = command("test", "--dir=run", "--model.model.filters=[32, 32]")
    assert answer.status == 2
    assert "the checkpoint is of another network: tensors" in answer.err
    assert "of another shape (model." in answer.err


def test_a_full_disk_ends_the_run_in_one_sentence_and_loses_nothing(fit, monkeypatch):
    assert fit("--dir=run").status == 0
    whole = Path("run/checkpoints/last.ckpt").read_bytes()

    def full(self, checkpoint, path, storage_options=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO.__base__, "save_checkpoint", full)
        answer = fit("--dir=run", "--trainer.max_epochs=2")
    assert answer.status == 1
    told = [line for line in answer.err.splitlines() if line.startswith("lightning-automl: ")]
    assert told == [
        "lightning-automl: no space left for run/checkpoints/last.ckpt; "
        "free some and give the same command again, it goes on"
    ]
    assert Path("run/checkpoints/last.ckpt").read_bytes() == whole
    assert not list(Path("run").rglob("*.tmp"))
    assert read("run/summary.json")["status"] == "failed"
    assert fit("--dir=run", "--trainer.max_epochs=2").status == 0
    assert read("run/summary.json")["status"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_is_not_finished(number, fit, monkeypatch):
    from lightning_automl.tasks import ClassificationTask

    def stop(self):
        if self.current_epoch == 1:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "on_train_epoch_start", stop, raising=False)
        answer = fit("--dir=run", "--trainer.max_epochs=3")
    assert answer.status != 0
    summary = read("run/summary.json")
    assert (summary["status"], summary["reason"]) == ("failed", "interrupted")
    assert fit("--dir=run", "--trainer.max_epochs=3").status == 0
    assert read("run/summary.json")["status"] == "finished"
    with open("run/metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_a_crash_is_a_failure_of_the_run_and_says_where(fit, monkeypatch):
    from lightning_automl.tasks import ClassificationTask

    def crash(self, batch, batch_idx):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(ClassificationTask, "training_step", crash)
    answer = fit("--dir=run")
    assert answer.status == 1
    assert "Traceback" in answer.err
    assert answer.err.splitlines()[-1] == "lightning-automl: a bug of ours"
    assert read("run/summary.json")["reason"] == "a bug of ours"
    assert "a bug of ours" in Path("run/log.txt").read_text()


def test_the_users_own_callbacks_and_logger_work_beside_ours(fit, tmp_path):
    keys = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    keys += ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.log_every_n_steps=1"]
    keys += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    answer = fit("--dir=run", *keys)
    assert answer.status == 0, answer.err
    assert list((tmp_path / "logs").rglob("metrics.csv"))
    assert read("run/summary.json")["status"] == "finished"


def test_what_happens_to_the_keys_of_a_weight_file_is_told_and_logged(fit):
    fit("--dir=run", "--model.model=ResNet", "--model.model.depth=8")
    keys = ("--model.model=ResNet", "--model.model.depth=8", "--model.model.weights=run/checkpoints/best.ckpt")
    answer = fit("--dir=again", *keys)
    assert answer.status == 0, answer.err
    assert "matched" in answer.err
    assert "matched" in Path("again/log.txt").read_text()


def test_print_config_shows_the_config_and_runs_nothing(command, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        command("fit", "--config", DIGITS, "--print_config")
    assert ended.value.code in (0, None)
    assert yaml.safe_load(capfd.readouterr().out)["data"]["class_path"] == "lightning_automl.data.DigitsDataModule"
    assert not list(tmp_path.iterdir())


def test_every_config_names_its_command_in_the_first_line():
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert config.read_text().startswith("# lightning-automl "), config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"garbage", "weights.pt cannot be read as weights"),
        (None, "there is no weight file weights.pt"),
    ],
)
def test_a_weight_file_that_cannot_be_read_is_told_in_one_sentence(command, tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "weights.pt").write_bytes(content)
    keys = ["--model=ClassificationTask", "--model.model=Backbone", "--model.model.name=resnet18"]
    keys += ["--model.model.pretrained=false", "--model.model.weights=weights.pt", "--data=DigitsDataModule"]
    answer = command("fit", *keys, "--dir=run")
    assert (answer.status, answer.err.count("\n")) == (2, 1), answer.err
    assert answer.err.startswith(f"lightning-automl: {sentence}")


def test_data_that_changed_since_the_run_began_are_refused(command, folder_run):
    """Without one file the splits would be cut anew, and the test split hold images that were trained on."""
    images = Path(yaml.safe_load((folder_run / "config.yaml").read_text())["data"]["init_args"]["path"])
    other = folder_run.parent / "images"
    shutil.copytree(images, other)
    text = (folder_run / "config.yaml").read_text().replace(str(images), str(other))
    (folder_run / "config.yaml").write_text(text)
    assert command("test", f"--dir={folder_run}").status == 0
    (other / "dark" / "3.gif").unlink()
    for arguments in (["test"], ["validate"], ["fit", "--trainer.max_epochs=9"]):
        answer = command(*arguments, f"--dir={folder_run}")
        assert answer.status == 2
        assert "the data are not those that" in answer.err
    assert command("test", f"--dir={folder_run}", f"--data.path={images}").status == 0


def test_a_directory_that_cannot_be_made_is_told(fit, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        answer = fit(f"--dir={place}")
        assert answer.status == 2
        assert answer.err.startswith(f"lightning-automl: {place} cannot be written (")
