"""Plans, arms and workers that train nothing, for tests of how candidates compete."""

import csv
import json
import threading

import yaml

from lightning_automl.auto.arms import Arm
from lightning_automl.auto.runs import Runs
from lightning_automl.rundir import write_json
from lightning_automl.search.devices import Slice
from lightning_automl.studies.workers import Workers

LR = "model.init_args.optimizer.init_args.lr"

SPACE = {
    "lr": {"log_float": [1e-4, 1e-1], "path": LR},
    "filters": {"choice": [[4], [8, 8]], "path": "model.init_args.model.init_args.filters"},
}


def arm(name):
    return Arm(name, name.capitalize(), make=lambda facts, source: {}, work=1.0, steps=100, epochs=(1, 10), space=SPACE)


def config_of(name="cnn", **data):
    """As an arm's resolved config, as far as it matters."""
    network = {"class_path": "lightning_automl.models.cnn.TunableCNN", "init_args": {"filters": [8, 8]}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    return {
        "seed_everything": 0,
        "trainer": {"max_epochs": 9, "callbacks": None, "accelerator": "auto"},
        "monitor": "val_auroc",
        "model": {"class_path": name, "init_args": {"model": network, "optimizer": optimizer}},
        "data": {"class_path": "Images", "init_args": {"path": "/images", "base_augment": "crop", **data}},
        "test_after_fit": False,
    }


def write_arms(directory, *names):
    (directory / "arms").mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / "arms" / f"{name}.yaml").write_text(yaml.safe_dump(config_of(name)))


def planned(name, **keys):
    entry = {"name": name, "title": name.capitalize(), "epochs": 3, "run_seconds": 10.0}
    return {**entry, "policies": ["none", "trivial_augment"], **keys}


def plan_of(*names, facts, generations=(4,), **keys):
    stages = [{"name": "selection", "seconds": 100.0}, {"name": "final", "seconds": 40.0}]
    return {
        "budget": 1000.0,
        "metric": "val_auroc",
        "direction": "maximize",
        "search_folds": facts.search_folds,
        "comparison_folds": facts.comparison_folds,
        "comparison": {"seeds": 1},
        "arms": [planned(name) for name in names],
        "generations": list(generations),
        "reduction": 3,
        "patience": 1,
        "stages": stages,
        **keys,
    }


class FakeClock:
    """Each training takes so many seconds of it."""

    def __init__(self, left=1000.0, cost=0.0):
        self.seconds, self.cost, self.cuts = left, cost, {}

    def left(self):
        return self.seconds

    def cut(self, stage, sentence):
        self.cuts[stage] = sentence


class Scripted(Workers):
    """Leaves what a training leaves.

    Args:
        value: Of a run by its config and fold: a number, or an exception to raise.
        clock: Goes on with each run.
    """

    def __init__(self, value, clock=None, number=2):
        super().__init__(None, [Slice((), 1)] * number, 1)
        self.value, self.clock = value, clock
        self.trained, self.ends = [], []
        self.lock = threading.Lock()

    def within(self, seconds):
        self.ends.append(seconds)
        return self

    def fit(self, what, config, place):
        with self.lock:
            self.trained.append(f"{place.parent.name}/{place.name}")
            if self.clock is not None:
                self.clock.seconds -= self.clock.cost
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(yaml.safe_dump(config))
        value = self.value(config, config["data"]["init_args"].get("fold"))
        if isinstance(value, BaseException):
            raise value
        leave(place, value, config["trainer"]["max_epochs"])
        return json.loads((place / "summary.json").read_text())


def leave(place, value, epochs=3):
    """What a finished run has in its directory; its best epoch is above the last."""
    with (place / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["epoch", "val_auroc", "val_loss"])
        table.writeheader()
        for epoch in range(epochs):
            bonus = 0.01 if epoch == 0 else 0.0
            table.writerow({"epoch": epoch, "val_auroc": value + bonus, "val_loss": 1 - value})
    (place / "checkpoints").mkdir(exist_ok=True)
    for name in ("last.ckpt", "best.ckpt"):
        (place / "checkpoints" / name).write_text("weights")
    summary = {"command": "fit", "status": "finished", "metrics": {"val_auroc": value + 0.01}, "seconds": 2.5}
    write_json(place / "summary.json", summary)


def runs_of(directory, facts, plan, value, *, clock=None, number=2):
    clock = clock or FakeClock()
    return Runs(Scripted(value, clock, number), directory, facts, plan, clock)
