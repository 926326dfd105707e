"""Ten search methods on the digits at equal epochs: best validation accuracy so far against epochs, over seeds.

``python -m benchmarks.hpo_methods.run`` needs no data beside the digits. A candidate is scored in this process
by a plain training loop, so that the methods are compared and not the cost of starting runs.
"""

import argparse
import copy
import math
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.pruners import BasePruner, HyperbandPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from benchmarks import results
from lightning_automl.models import TunableCNN
from lightning_automl.search.samplers import PopulationSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import Candidate, open_study, search

HERE = Path(__file__).parent
LONGEST = 9  # epochs of a whole run; rungs after 1 and 3
SPACE = {
    "lr": {"log_float": [1e-3, 1.0]},
    "momentum": {"float": [0.0, 0.99]},
    "weight_decay": {"log_float": [1e-6, 1e-1]},
    "dropout": {"float": [0.0, 0.8]},
}
GRID = {"lr": [1e-3, 1e-2, 1e-1, 1.0], "momentum": [0.0, 0.9], "weight_decay": [1e-6, 1e-3], "dropout": [0.0, 0.4]}

#: Sampler by seed, and pruner.
METHODS: dict[str, tuple[Callable[[int], BaseSampler], BasePruner | None]] = {
    "grid": (lambda seed: optuna.samplers.GridSampler(GRID, seed=seed), None),
    "random": (lambda seed: optuna.samplers.RandomSampler(seed=seed), None),
    "TPE": (lambda seed: optuna.samplers.TPESampler(seed=seed), None),
    "GP": (lambda seed: optuna.samplers.GPSampler(seed=seed), None),
    "CMA-ES": (lambda seed: optuna.samplers.CmaEsSampler(seed=seed), None),
    "NSGA-II": (lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10), None),
    "ASHA": (lambda seed: optuna.samplers.RandomSampler(seed=seed), SuccessiveHalvingPruner(1, 3)),
    "Hyperband": (lambda seed: optuna.samplers.RandomSampler(seed=seed), HyperbandPruner(1, LONGEST, 3)),
    "BOHB": (lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True), HyperbandPruner(1, LONGEST, 3)),
    "PBT": (lambda seed: PopulationSampler(population=10, ready=1, total=LONGEST, seed=seed), None),
}


class Digits:
    """Trains a small CNN by SGD on a few digits for some epochs; the state of each trial is kept for its successors."""

    def __init__(self, seed: int) -> None:
        images, labels = load_digits(return_X_y=True)
        tensors = [torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)]
        train, val = train_test_split(
            np.arange(len(labels)), train_size=300, test_size=1000, random_state=0, stratify=labels
        )
        self.train = [tensor[train] for tensor in tensors]
        self.val = [tensor[val] for tensor in tensors]
        self.seed = seed
        self.states: dict[int, Any] = {}
        self.epochs = 0
        self.curve: list[list[float]] = []

    def __call__(self, candidate: Candidate) -> float:
        """Validation accuracy of the best epoch, or of a segment's last one."""
        torch.manual_seed(self.seed)
        network = TunableCNN(10, 1, 8, filters=[8, 16], pools=["max", "none"], units=[32], fc_dropout=0.5)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        attributes = candidate.attributes
        until, first = attributes.get("until", LONGEST), 0
        if "parent" in attributes:
            first, weights, moments = self.states[attributes["parent"]]
            network.load_state_dict(weights)
            optimizer.load_state_dict(moments)
        values = candidate.values
        optimizer.param_groups[0].update({name: values[name] for name in ("lr", "momentum", "weight_decay")})
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = values["dropout"]
        best = 0.0
        for epoch in range(first, until):
            accuracy = self._epoch(network, optimizer, epoch)
            self.epochs += 1
            if not math.isfinite(accuracy):
                raise FloatingPointError("the network has diverged")
            best = accuracy if "until" in attributes else max(best, accuracy)
            if not self.curve or accuracy > self.curve[-1][1]:
                self.curve.append([self.epochs, accuracy])
            if candidate.report(epoch + 1, accuracy) and epoch + 1 < until:
                raise optuna.TrialPruned
        self.states[candidate.number] = (
            until,
            copy.deepcopy(network.state_dict()),
            copy.deepcopy(optimizer.state_dict()),
        )
        return best

    def _epoch(self, network: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        images, labels = self.train
        network.train()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed * 1000 + epoch))
        for rows in order.split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
        if not torch.isfinite(loss):
            return math.nan
        network.eval()
        with torch.no_grad():
            return float((network(self.val[0]).argmax(1) == self.val[1]).float().mean())


def one(job: tuple[str, int, int]) -> dict[str, Any]:
    """Run one study."""
    method, seed, epochs = job
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    sampler, pruner = METHODS[method]
    space, score = Space.parse(SPACE), Digits(seed)
    with tempfile.TemporaryDirectory() as work:
        storage, _ = open_storage(None, Path(work))
        study, _ = open_study(f"{method}-{seed}", storage, ["maximize"], sampler(seed), pruner, space=space)
        search(study, space, score, epochs=epochs)
        states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return {
        "method": method,
        "seed": seed,
        "best": score.curve[-1][1],
        "epochs": score.epochs,
        **{state.lower(): states.count(state) for state in ("COMPLETE", "PRUNED", "FAIL")},
        "curve": score.curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=5, help="seeds a method")
    parser.add_argument("--epochs", type=int, default=180, help="epochs a study")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(method, seed, arguments.epochs) for seed in range(arguments.budget) for method in METHODS]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        rows = []
        for row in pool.imap(one, jobs):
            rows.append(row)
            print({key: value for key, value in row.items() if key != "curve"}, flush=True)
    summary = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        best = [row["best"] for row in own]
        early = [max((v for e, v in row["curve"] if e <= arguments.epochs // 4), default=0.0) for row in own]
        summary.append(
            {
                "method": method,
                "mean_best": statistics.fmean(best),
                "sd": statistics.stdev(best) if len(best) > 1 else None,
                "mean_best_at_a_quarter": statistics.fmean(early),
                "mean_trials": statistics.fmean(row["complete"] + row["pruned"] + row["fail"] for row in own),
            }
        )
        print(summary[-1])
    print(
        results.write(
            HERE, "digits", summary, studies=rows, budget=arguments.budget, epochs=arguments.epochs, space=SPACE
        )
    )


if __name__ == "__main__":
    main()
