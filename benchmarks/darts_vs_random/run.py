"""Are architectures found by DARTS better than random ones of the same space, and than a ResNet and a DenseNet?

``python -m benchmarks.darts_vs_random.run --data-root DIR``; killed, it goes on with the same command. Every network is
trained equally long on train and validation together, and opens the test split once. ``--budget smoke`` shows that all
parts run and writes no result; ``--budget full`` searches and trains longer.
"""

import argparse
import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.architectures import config_of, find_genotype, in_parallel, rivals, train
from lightning_automl.metrics import difference_from_sample
from lightning_automl.studies.retrain import mean_over_seeds

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Condition:
    """A data set, how it is searched on, and how what was found is trained.

    Args:
        data: The data module; ``DATA`` in its path is the data root.
        classes: Of the data.
        channels: Of the images.
        search: Keys of ``configs/nas/darts_digits.yaml`` that differ.
        training: Keys of ``configs/nas/retrain_digits.yaml`` that differ.
        network: Arguments of each ``GenotypeNetwork``.
        searches: How many, with a seed each.
        randoms: How many random genotypes.
        seeds: Trainings of each network.
    """

    data: dict[str, Any]
    classes: int
    channels: int
    search: dict[str, Any]
    training: dict[str, Any]
    network: dict[str, Any]
    searches: int
    randoms: int
    seeds: int


DIGITS = Condition(
    data={"class_path": "DigitsDataModule", "init_args": {"batch_size": 64, "base_augment": "crop"}},
    classes=10,
    channels=1,
    search={},
    training={"trainer__max_epochs": 15},
    network={"channels": 16, "cells": 4},
    searches=3,
    randoms=8,
    seeds=3,
)
CIFAR = Condition(
    data={
        "class_path": "ArraysDataModule",
        "init_args": {"path": "DATA/cifar10_small.npz", "batch_size": 64, "base_augment": "crop_flip"},
    },
    classes=10,
    channels=3,
    search={"trainer__max_epochs": 6, "model__init_args__warmup_epochs": 1},
    training={"trainer__max_epochs": 6},
    network={"channels": 12, "cells": 4},
    searches=1,
    randoms=4,
    seeds=1,
)
BUDGETS = {
    "small": {"digits": DIGITS, "CIFAR-10, 10 x 500": CIFAR},
    "full": {
        "digits": replace(DIGITS, training={"trainer__max_epochs": 60}, searches=5, randoms=20, seeds=5),
        "CIFAR-10, 10 x 500": replace(
            CIFAR,
            search={"trainer__max_epochs": 50, "model__init_args__warmup_epochs": 10},
            training={"trainer__max_epochs": 100},
            searches=4,
            randoms=10,
            seeds=5,
        ),
    },
    "smoke": {
        name: replace(
            each,
            search={"trainer__max_epochs": 1, "trainer__limit_train_batches": 2, "model__init_args__warmup_epochs": 0},
            training={"trainer__max_epochs": 1, "trainer__limit_train_batches": 2},
            searches=2,
            randoms=3,
            seeds=2,
        )
        for name, each in (("digits", DIGITS), ("CIFAR-10, 10 x 500", CIFAR))
    },
}


def data_of(condition: Condition, data_root: Path) -> dict[str, Any]:
    arguments = dict(condition.data["init_args"])
    if "path" in arguments:
        arguments["path"] = arguments["path"].replace("DATA", str(data_root.resolve()))
    return condition.data | {"init_args": arguments}


def search(condition: Condition, data: dict[str, Any], place: Path, seed: int) -> dict[str, Any]:
    config = config_of("darts_digits", **condition.search, seed_everything=seed)
    config["data"] = data | {"init_args": data["init_args"] | {"arch_fraction": 0.5}}
    return find_genotype(config, place / f"search-{seed}")


def networks(condition: Condition, searches: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All networks by name."""

    def of(**arguments: Any) -> dict[str, Any]:
        return {"class_path": "GenotypeNetwork", "init_args": condition.network | arguments}

    found = {f"DARTS {number}": of(genotype=each["genotype"]) for number, each in enumerate(searches)}
    # Random ones of the space of the first search: its nodes and operations.
    random = {
        f"random {number}": of(genotype=searches[0]["genotype"], random=number) for number in range(condition.randoms)
    }
    return found | random | rivals(found["DARTS 0"], condition.classes, condition.channels)


def summary(name: str, runs: dict[tuple[str, int], dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """One row for each network: test accuracy of each seed, mean and interval, parameters, processor seconds."""
    rows = []
    for network in dict.fromkeys(network for network, _ in runs):
        own = [runs[network, seed] for seed in range(seeds)]
        accuracies = [each["accuracy"] for each in own]
        rows.append(
            {
                "condition": name,
                "network": network,
                "values": accuracies,
                **mean_over_seeds(accuracies, bounded=True),
                "parameters": own[0]["parameters"],
                "cpu_seconds": statistics.fmean(each["cpu_seconds"] for each in own),
            }
        )
    return rows


def comparison(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over architectures of the found and of the random ones, with intervals over architectures (not images)."""
    means = {kind: [row["mean"] for row in rows if row["network"].startswith(kind)] for kind in ("DARTS", "random")} | {
        row["network"]: [row["mean"]] for row in rows if row["network"] in ("ResNet", "DenseNet")
    }
    found = {kind: mean_over_seeds(values, bounded=True) for kind, values in means.items()}
    return found | {"difference": difference(means["DARTS"], means["random"])}


def difference(found: list[float], random: list[float]) -> dict[str, float]:
    """Found less random, with a 95 % interval over architectures.

    Welch's for several searches; for a single one that of a further draw from the random ones, which is wider.
    """
    from scipy.stats import ttest_ind

    if len(found) > 1:
        mean = statistics.fmean(found) - statistics.fmean(random)
        interval = ttest_ind(found, random, equal_var=False).confidence_interval(0.95)
        return {"mean": mean, "low": float(interval.low), "high": float(interval.high)}
    each = difference_from_sample(found[0], random)
    return {"mean": each.difference, "low": each.low, "high": each.high}


def markdown(rows: list[dict[str, Any]], searches: dict[str, Any], compared: dict[str, Any]) -> str:
    """The tables of the README."""
    lines = ["| data | networks | number | test accuracy | worst to best | parameters | processor seconds a training |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, found in compared.items():
        for kind in ("DARTS", "random", "ResNet", "DenseNet"):
            own = [row for row in rows if row["condition"] == name and row["network"].startswith(kind)]
            # One network: the interval is over its seeds.
            each = found[kind] if len(own) > 1 else own[0]
            counts = sorted(row["parameters"] for row in own)
            lines.append(
                f"| {name} | {kind} | {len(own)} | {_percent(each)} | "
                f"{100 * min(row['mean'] for row in own):.1f} to {100 * max(row['mean'] for row in own):.1f} | "
                f"{counts[0]:,}{f' to {counts[-1]:,}' if len(own) > 1 else ''} | "
                f"{statistics.fmean(row['cpu_seconds'] for row in own):.0f} |"
            )
    lines.append("")
    for name, found in compared.items():
        known = [each["cpu_seconds"] for each in searches[name] if each["cpu_seconds"]]
        seconds = ", ".join(f"{each:.0f}" for each in known) or "not measured"
        skips = ", ".join(f"{each['skips']['normal']} and {each['skips']['reduce']}" for each in searches[name])
        gap = found["difference"]
        lines.append(
            f"- {name}: found less random {100 * gap['mean']:+.2f} points ({100 * gap['low']:+.2f} to "
            f"{100 * gap['high']:+.2f}); processor seconds of a search {seconds}; skip connections in the normal and "
            f"the reduction cell {skips}."
        )
    return "\n".join(lines)


def _percent(found: dict[str, Any]) -> str:
    if not math.isfinite(found["low"]):  # of a single run
        return f"{100 * found['mean']:.1f}"
    return f"{100 * found['mean']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_AUTOML_DATA"))
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--processes", type=int, default=2, help="each has one thread")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/darts_vs_random"))
    arguments = parser.parse_args()
    if arguments.data_root is None:
        parser.error("give --data-root or set LIGHTNING_AUTOML_DATA to the folder of cifar10_small.npz")
    rows: list[dict[str, Any]] = []
    searches, compared = {}, {}
    for name, condition in BUDGETS[arguments.budget].items():
        place = arguments.work / arguments.budget / name.split(",")[0]
        data = data_of(condition, arguments.data_root)

        def find(seed: int, condition: Condition = condition, data: Any = data, place: Path = place) -> dict[str, Any]:
            return search(condition, data, place, seed)

        found = in_parallel(find, range(condition.searches), arguments.processes)
        searches[name] = list(found.values())
        arms = networks(condition, searches[name])
        config = config_of("retrain_digits", **condition.training) | {"data": data}

        def one(job: tuple[str, int], arms: Any = arms, config: Any = config, place: Path = place) -> dict[str, Any]:
            network, seed = job
            done = train(config, arms[network], place / f"{network.replace(' ', '-')}-{seed}", seed)
            print(network, seed, done, flush=True)
            return done

        jobs = [(network, seed) for seed in range(condition.seeds) for network in arms]
        own = summary(name, in_parallel(one, jobs, arguments.processes), condition.seeds)
        rows += own
        compared[name] = comparison(own)
    if arguments.budget != "smoke":
        settings = ("search", "training", "network", "searches", "randoms", "seeds")
        facts = {
            name: {key: getattr(each, key) for key in settings} for name, each in BUDGETS[arguments.budget].items()
        }
        print(results.write(HERE, arguments.budget, rows, conditions=facts, searches=searches, comparison=compared))
    print(markdown(rows, searches, compared))


if __name__ == "__main__":
    main()
