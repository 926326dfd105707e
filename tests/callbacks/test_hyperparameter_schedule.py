import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import DIGITS
from lightning.pytorch import Callback, Trainer
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR, StepLR

from lightning_automl.__main__ import main
from lightning_automl.callbacks import HyperparameterSchedule
from lightning_automl.data import DigitsDataModule
from lightning_automl.models import TunableCNN
from lightning_automl.rundir import UserError
from lightning_automl.tasks import ClassificationTask
from lightning_automl.tasks.schedules import WarmupCosineLR

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
BATCHES = 4


class StopAt(Callback):
    """Ends a run at a batch of an epoch; after everything before it."""

    def __init__(self, epoch: int = 1000, batch: int = 0) -> None:
        self.place = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            raise InterruptedError("stopped here")


class Watch(Callback):
    """Writes down the parameter groups at each step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        self.steps.append(groups)

    def values(self, name, group=0):
        return [groups[group][name] for groups in self.steps]


def from_epochs(*parts):
    return [{"from_epoch": epoch, "values": values} for epoch, values in parts]


def fit(segments, optimizer, scheduler=None, epochs=3, **arguments):
    """The groups at every step of a training of four batches an epoch."""
    torch.manual_seed(0)
    network = TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[8])
    task = ClassificationTask(network, 10, optimizer=optimizer, scheduler=scheduler, **arguments)
    watch = Watch()
    callbacks = [] if segments is None else [HyperparameterSchedule(segments)]
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, watch],
        max_epochs=epochs,
        limit_train_batches=BATCHES,
        limit_val_batches=1,
        **QUIET,
    )
    trainer.fit(task, DigitsDataModule())
    watch.weights = task.state_dict()
    return watch


def sgd(**others):
    return lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3, **others)


def adamw(groups):
    return AdamW(groups, lr=1e-3, weight_decay=0.01)


# Values


def test_values_hold_from_the_first_step_of_their_epoch_on():
    watch = fit(from_epochs((0, {}), (1, {"momentum": 0.5, "lr": 0.02}), (2, {"weight_decay": 0.0})), sgd())
    assert watch.values("momentum") == [0.9] * 4 + [0.5] * 8
    assert watch.values("lr") == [0.1] * 4 + [0.02] * 8
    assert watch.values("weight_decay") == [1e-3] * 8 + [0.0] * 4


def test_pairs_may_come_as_lists_and_arrive_as_tuples():
    watch = fit(from_epochs((0, {}), (1, {"betas": [0.8, 0.99]})), adamw, epochs=2)
    assert watch.values("betas") == [(0.9, 0.999)] * 4 + [(0.8, 0.99)] * 4


def test_the_steps_are_those_of_the_new_values_by_hand():
    """One step of SGD without momentum: the difference of the weights is the new rate times the gradient."""
    weights, gradients = [], []

    class Take(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            parameter = optimizer.param_groups[0]["params"][0]
            weights.append(parameter.detach().clone())
            gradients.append(parameter.grad.clone())

    task = ClassificationTask(
        TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[8]), 10, optimizer=lambda g: SGD(g, lr=0.1)
    )
    schedule = HyperparameterSchedule(from_epochs((0, {"lr": 0.1}), (1, {"lr": 0.5, "weight_decay": 0.25})))
    Trainer(
        accelerator="cpu",
        callbacks=[schedule, Take()],
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=0,
        **QUIET,
    ).fit(task, DigitsDataModule())
    torch.testing.assert_close(weights[1], weights[0] - 0.1 * gradients[0])
    torch.testing.assert_close(weights[3], weights[2] - 0.5 * (gradients[2] + 0.25 * weights[2]))


SCHEDULES = {
    "warmup_cosine": lambda optimizer, total_steps: WarmupCosineLR(optimizer, 0.4, total_steps=total_steps),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "step": lambda optimizer: StepLR(optimizer, 1, 0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 3),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.5, total_iters=2), CosineAnnealingLR(optimizer, 4)], [2]
    ),
    "none": None,
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch's SequentialLR itself
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_is_the_new_start_times_the_share_of_the_runs_own_schedule(name):
    plain = fit(None, sgd(), SCHEDULES[name], epochs=4).values("lr")
    assert plain[0] != plain[-1] or name == "none"
    changed = fit(from_epochs((0, {"lr": 0.2}), (2, {"lr": 0.03})), sgd(), SCHEDULES[name], epochs=4).values("lr")
    expected = [2.0 * rate for rate in plain[:8]] + [0.3 * rate for rate in plain[8:]]
    assert changed == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["warmup_cosine", "none"])
def test_values_that_the_config_has_anyway_change_no_bit(name):
    same = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    one = fit(None, sgd(), SCHEDULES[name])
    other = fit(from_epochs((0, same), (1, same)), sgd(), SCHEDULES[name])
    assert one.values("lr") == other.values("lr")
    assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)


def test_a_plateau_that_was_reached_is_kept_as_a_factor():
    from lightning.pytorch.cli import ReduceLROnPlateau

    def plateau(optimizer):  # a loss never falls by 1000, so that each epoch but the first is worse
        return ReduceLROnPlateau(
            optimizer, monitor="val_loss", factor=0.5, patience=0, threshold=1000.0, threshold_mode="abs"
        )

    watch = fit(from_epochs((0, {}), (3, {"lr": 0.8})), sgd(), plateau, epochs=4)
    assert watch.values("lr")[::4] == pytest.approx([0.1, 0.1, 0.05, 0.2])


@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_norms_and_biases_stay_without_decay(decay):
    segments = from_epochs((0, {"weight_decay": 0.0}), (1, {"weight_decay": 0.3}))
    watch = fit(segments, lambda groups: AdamW(groups, weight_decay=decay), decay_norms_and_biases=False, epochs=2)
    assert watch.values("weight_decay") == [0.0] * 4 + [0.3] * 4
    assert watch.values("weight_decay", group=1) == [0.0] * 8
    watch = fit(segments, lambda groups: AdamW(groups, weight_decay=decay), epochs=2)
    assert watch.values("weight_decay") == [0.0] * 4 + [0.3] * 4


# Mistakes


@pytest.mark.parametrize(
    ("segments", "told"),
    [
        ([], r"the segments begin in epochs \[\]; the first is 0"),
        (from_epochs((1, {})), r"begin in epochs \[1\]; the first is 0"),
        (from_epochs((0, {}), (2, {}), (2, {})), r"begin in epochs \[0, 2, 2\]; the first is 0, and each of the next"),
        (from_epochs((0, {}), (3, {}), (2, {})), r"begin in epochs \[0, 3, 2\]"),
        (from_epochs((-1, {})), "from_epoch is -1; it is a whole number, 0 or more"),
        (from_epochs((0.5, {})), "from_epoch is 0.5; it is a whole number"),
        (from_epochs((True, {})), "from_epoch is True; it is a whole number"),
        ([{"from_epoch": 0}], "a segment is {'from_epoch': 0}; it has from_epoch, a number, and values, by name"),
        ([{"from_epoch": 0, "values": {}, "until": 3}], "a segment is .*until"),
        (from_epochs((0, {"lr": "fast"})), "lr is 'fast'; a segment sets numbers and lists of numbers"),
        (from_epochs((0, {"nesterov": True})), "nesterov is True; a segment sets numbers"),
    ],
)
def test_segments_that_are_none_are_refused(segments, told):
    with pytest.raises(UserError, match=told):
        HyperparameterSchedule(segments)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "values", "told"),
    [
        (sgd(), None, {"betas": [0.9]}, "SGD has no 'betas' to set; known: dampening, lr, momentum, weight_decay$"),
        (adamw, None, {"amsgrad": 1}, "AdamW has no 'amsgrad' to set; known: betas, eps, lr, weight_decay$"),
        (sgd(), None, {"params": 1}, "SGD has no 'params' to set"),
        (adamw, None, {"betas": 0.9}, r"betas is 0\.9, but AdamW has \(0\.9, 0\.999\); give the like"),
        (adamw, None, {"betas": [0.9]}, r"betas is \[0\.9\], but AdamW has \(0\.9, 0\.999\)"),
        (adamw, None, {"lr": [0.9]}, r"lr is \[0\.9\], but AdamW has 0\.001"),
        (sgd(), lambda each, total_steps: OneCycleLR(each, 0.1, total_steps), {"lr": 1.0}, "OneCycleLR has learning"),
    ],
)
def test_values_that_the_optimizer_does_not_take_are_refused_before_training(optimizer, scheduler, values, told):
    class Never(ClassificationTask):
        def training_step(self, batch, batch_idx):
            raise AssertionError("trained")

    network = TunableCNN(10, in_channels=1, image_size=8, filters=[4], units=[8])
    schedule = HyperparameterSchedule(from_epochs((0, {}), (50, values)))
    trainer = Trainer(accelerator="cpu", callbacks=[schedule], max_epochs=1, num_sanity_val_steps=0, **QUIET)
    with pytest.raises(UserError, match=told):
        trainer.fit(Never(network, 10, optimizer=optimizer, scheduler=scheduler), DigitsDataModule())


def test_numbers_of_numpy_become_plain_ones_which_a_checkpoint_can_hold():
    (segment,) = HyperparameterSchedule(from_epochs((0, {"lr": np.float64(0.1), "betas": (0.9, 0.99)}))).segments
    assert segment == {"from_epoch": 0, "values": {"lr": 0.1, "betas": [0.9, 0.99]}}
    assert type(segment["values"]["lr"]) is float


# Continued runs, by the command line


OPTIMIZERS = {
    "sgd": (
        {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}},
        [{"lr": 0.05}, {"lr": 0.03, "momentum": 0.8}, {"weight_decay": 0.01, "lr": 0.04}, {"lr": 0.017}],
    ),
    "adamw": (
        {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.01}},
        [{"weight_decay": 0.02}, {"lr": 0.001}, {"betas": [0.8, 0.99], "lr": 0.0017}, {"weight_decay": 0.3}],
    ),
}
EPOCHS = 5


def callbacks(segments, stop):
    return [
        {"class_path": "lightning_automl.callbacks.HyperparameterSchedule", "init_args": {"segments": segments}},
        {"class_path": f"{__name__}.StopAt", "init_args": {"epoch": stop[0], "batch": stop[1]}},
    ]


class Runs:
    """Runs of a small network with one optimizer and schedule, which differ in their callbacks."""

    def __init__(self, folder, optimizer, scheduler):
        self.folder = folder
        model = {"class_path": "TunableCNN", "init_args": {"filters": [8], "pools": ["max"], "units": [16]}}
        task = {"model": model, "optimizer": optimizer, "scheduler": scheduler and {"class_path": scheduler}}
        config = {"model": {"class_path": "ClassificationTask", "init_args": task}}
        (folder / "model.yaml").write_text(yaml.safe_dump(config))

    def fit(self, name, segments, stop=(1000, 0)):
        """The exit status of a run; it goes on from a checkpoint that is there."""
        (self.folder / "callbacks.yaml").write_text(yaml.safe_dump(callbacks(segments, stop)))
        return main(
            [
                *("fit", "--config", DIGITS, "--config", str(self.folder / "model.yaml")),
                *("--trainer.callbacks", str(self.folder / "callbacks.yaml"), f"--dir={self.folder / name}"),
                *(f"--trainer.max_epochs={EPOCHS}", f"--trainer.limit_train_batches={BATCHES}"),
                *("--checkpoint_every_n_steps=2", "--data.batch_size=16", "--test_after_fit=false"),
            ]
        )

    def prepare(self, name, other, segments, stop=(1000, 0)):
        """Give a new run the checkpoint of another, which with other callbacks could not be continued itself."""
        config = yaml.safe_load((self.folder / other / "config.yaml").read_text())
        config["trainer"]["callbacks"] = callbacks(segments, stop)
        (self.folder / name / "checkpoints").mkdir(parents=True)
        (self.folder / name / "config.yaml").write_text(yaml.safe_dump(config))
        shutil.copy(self.folder / other / "checkpoints/last.ckpt", self.folder / name / "checkpoints")

    def checkpoint(self, name):
        return torch.load(self.folder / name / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["WarmupCosineLR", None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_runs_that_go_on_with_one_segment_more_end_with_the_weights_of_one_that_had_them_all(name, scheduler, tmp_path):
    optimizer, values = OPTIMIZERS[name]
    runs = Runs(tmp_path, optimizer, scheduler)
    segments = from_epochs(*enumerate(values))
    assert runs.fit("whole", segments) == 0
    expected = runs.checkpoint("whole")
    assert expected["callbacks"]["HyperparameterSchedule"] == {"done": segments}

    # Stopped at the ends of epochs 0, 1 and 2, and in epoch 2 one batch after the newest checkpoint.
    stops = [(1, 0), (2, 0), (2, 3), (3, 0), (1000, 0)]
    for number, stop in enumerate(stops):
        begun = [segment for segment in segments if (segment["from_epoch"], 0) < stop]
        if number:
            runs.prepare(f"part {number}", f"part {number - 1}", begun, stop)
        assert runs.fit(f"part {number}", begun, stop) == (stop != stops[-1])
        found = runs.checkpoint(f"part {number}")
        assert found["callbacks"]["HyperparameterSchedule"] == {"done": begun}
        assert found["global_step"] == [4, 8, 10, 12, 20][number]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(found[part], expected[part])


@pytest.mark.slow
def test_a_checkpoint_of_other_segments_is_refused(tmp_path, capfd):
    optimizer, values = OPTIMIZERS["sgd"]
    runs = Runs(tmp_path, optimizer, None)
    runs.fit("first", from_epochs((0, values[0]), (1, values[1])), (2, 0))
    other = from_epochs((0, values[0]), (1, values[2]), (2, values[3]))
    runs.prepare("second", "first", other)
    capfd.readouterr()
    assert runs.fit("second", other) == 2
    assert "the checkpoint was trained with the segments [{'from_epoch': 0" in capfd.readouterr().err


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other
