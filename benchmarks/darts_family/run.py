"""Each relaxation of DARTS on the digits, same budget: accuracy after retraining, skip connections, time, memory.

``python -m benchmarks.darts_family.run`` needs no data beside the digits; killed, it goes on with the same command.
``--budget smoke`` shows that all parts run and writes no result.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.architectures import config_of, find_genotype, in_parallel, train
from lightning_automl.studies.retrain import mean_over_seeds

HERE = Path(__file__).parent
SPACE = "model__init_args__model__init_args__"

#: Keys of ``configs/nas/darts_digits.yaml`` that differ. No cap on skip connections: they are what is counted.
ARMS: dict[str, dict[str, Any]] = {
    "DARTS, first order": {},
    "DARTS, second order": {"model__init_args__unrolled": True},
    "PC-DARTS": {f"{SPACE}relaxation": {"class_path": "PartialChannels", "init_args": {"k": 2}}},
    "GDAS": {f"{SPACE}relaxation": {"class_path": "GumbelSoftmax"}},
    "DARTS-": {f"{SPACE}relaxation": {"class_path": "AuxiliarySkip"}},
}
#: Epochs of a search and of a training, searches of each arm, trainings of each genotype.
BUDGETS = {"small": (20, 15, 1, 2), "full": (50, 60, 5, 3), "smoke": (1, 1, 1, 1)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the README."""
    head = ["relaxation", "test accuracy", "of each search and training", "skips, normal", "skips, reduction"]
    head += ["processor seconds a search", "MB a search"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row["relaxation"],
            f"{100 * row['mean']:.1f}",
            "; ".join(", ".join(f"{100 * value:.1f}" for value in each) for each in row["accuracies"]),
            ", ".join(str(each["normal"]) for each in row["skips"]),
            ", ".join(str(each["reduce"]) for each in row["skips"]),
            f"{row['cpu_seconds']:.0f}",
            f"{row['memory']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--processes", type=int, default=2, help="each has one thread")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/darts_family"))
    arguments = parser.parse_args()
    search_epochs, epochs, searches, seeds = BUDGETS[arguments.budget]
    place = arguments.work / arguments.budget

    def find(job: tuple[str, int]) -> dict[str, Any]:
        arm, seed = job
        config = config_of("darts_digits", **ARMS[arm], trainer__max_epochs=search_epochs, seed_everything=seed)
        config["model"]["init_args"]["model"]["init_args"]["max_skips"] = None
        return find_genotype(config, place / f"search-{_slug(arm)}-{seed}")

    def one(job: tuple[str, int, int]) -> dict[str, Any]:
        arm, number, seed = job
        own = {"genotype": found[arm, number]["genotype"], "channels": 16, "cells": 4}
        network = {"class_path": "GenotypeNetwork", "init_args": own}
        config = config_of("retrain_digits", trainer__max_epochs=epochs)
        done = train(config, network, place / f"train-{_slug(arm)}-{number}-{seed}", seed)
        print(arm, number, seed, done, flush=True)
        return done

    found = in_parallel(find, [(arm, seed) for seed in range(searches) for arm in ARMS], arguments.processes)
    jobs = [(arm, number, seed) for seed in range(seeds) for number in range(searches) for arm in ARMS]
    runs = in_parallel(one, jobs, arguments.processes)
    rows = []
    for arm in ARMS:
        own = [found[arm, number] for number in range(searches)]
        accuracies = [[runs[arm, number, seed]["accuracy"] for seed in range(seeds)] for number in range(searches)]
        rows.append(
            {
                "relaxation": arm,
                "accuracies": accuracies,
                **mean_over_seeds([statistics.fmean(each) for each in accuracies], bounded=True),  # over searches
                "skips": [each["skips"] for each in own],
                "parameters": [runs[arm, number, 0]["parameters"] for number in range(searches)],
                "cpu_seconds": statistics.fmean(each["cpu_seconds"] for each in own),
                "memory": max(each["memory"] for each in own),
                "genotypes": [each["genotype"] for each in own],
            }
        )
    if arguments.budget != "smoke":
        facts = {"search_epochs": search_epochs, "epochs": epochs, "searches": searches, "seeds": seeds}
        print(results.write(HERE, arguments.budget, rows, **facts))
    print(markdown(rows))


def _slug(arm: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in arm)


if __name__ == "__main__":
    main()
