"""Does ASHA find as good a network as no pruning with fewer epochs? Same number of trials, three sampler seeds.

``python -m benchmarks.pruning_saves_epochs.run --data-root DIR``; killed, it goes on with the same command.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.studies import best_so_far, search, small_cifar100

HERE = Path(__file__).parent
NETWORK = "model.init_args.model.init_args"
SPACE = {
    "n_conv": {"int": [2, 3], "path": f"{NETWORK}.n_conv"},
    "filters_0": {"int": [8, 32, 8], "path": f"{NETWORK}.filters.0"},
    "filters_1": {"int": [8, 48, 8], "path": f"{NETWORK}.filters.1"},
    "filters_2": {"int": [8, 64, 8], "path": f"{NETWORK}.filters.2", "when": {"n_conv": 3}},
    "units_0": {"log_int": [32, 256], "path": f"{NETWORK}.units.0"},
    "fc_dropout": {"float": [0.0, 0.5], "path": f"{NETWORK}.fc_dropout"},
    "lr": {"log_float": [1e-4, 1e-1], "path": "model.init_args.optimizer.init_args.lr"},
    "weight_decay": {"log_float": [1e-6, 1e-2], "path": "model.init_args.optimizer.init_args.weight_decay"},
}
PRUNERS: dict[str, Any] = {
    "none": None,
    "asha": {"class_path": "SuccessiveHalvingPruner", "init_args": {"min_resource": 1, "reduction_factor": 3}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_AUTOML_DATA"))
    parser.add_argument("--budget", type=int, default=3, help="sampler seeds")
    parser.add_argument("--trials", type=int, default=24, help="trials a study")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/pruning_saves_epochs"))
    arguments = parser.parse_args()
    if arguments.data_root is None:
        parser.error("give --data-root or set LIGHTNING_AUTOML_DATA to the folder of cifar100.npz")
    arguments.work.mkdir(parents=True, exist_ok=True)
    overrides = small_cifar100(arguments.data_root, arguments.work)
    rows = []
    for seed in range(arguments.budget):
        for name, pruner in PRUNERS.items():
            config: dict[str, Any] = {
                "run": "configs/baseline/cifar100_cnn.yaml",
                "space": SPACE,
                "trials": arguments.trials,
                "sampler": {"class_path": "TPESampler"},
                "pruner": pruner,
                "seed": seed,
                "name": f"pruning-{name}-{seed}",
                "enqueue": [],
            }
            record = search(
                config,
                arguments.work / f"{name}-{seed}",
                "--workers=2",
                *(f"--run.{k}={v}" for k, v in overrides.items()),
            )
            totals = record["totals"]
            rows.append(
                {
                    "pruner": name,
                    "seed": seed,
                    "best_val_accuracy": max(t["values"][0] for t in record["trials"] if t["state"] == "COMPLETE"),
                    "epochs": totals["epochs"],
                    "complete": totals["COMPLETE"],
                    "pruned": totals["PRUNED"],
                    "failed": totals["FAIL"],
                    "seconds_of_trials": totals["seconds"],
                    "curve": best_so_far(record),
                }
            )
            print({key: value for key, value in rows[-1].items() if key != "curve"})
    best = {name: [row["best_val_accuracy"] for row in rows if row["pruner"] == name] for name in PRUNERS}
    epochs = {name: sum(row["epochs"] for row in rows if row["pruner"] == name) for name in PRUNERS}
    error = statistics.stdev(best["none"]) / len(best["none"]) ** 0.5 if len(best["none"]) > 1 else None
    facts = {
        "mean": {name: statistics.fmean(values) for name, values in best.items()},
        "standard_error_without_pruning": error,
        "share_of_epochs": epochs["asha"] / epochs["none"],
    }
    print(facts)
    print(results.write(HERE, "cifar100-16px-tenth", rows, budget=arguments.budget, trials=arguments.trials, **facts))


if __name__ == "__main__":
    main()
