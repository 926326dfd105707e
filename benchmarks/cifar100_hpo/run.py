"""The CIFAR-100 study: TPE, TPE with ASHA, 100 trials of it, random with the median pruner, one group at a time.

``python -m benchmarks.cifar100_hpo.run --data-root DIR``; killed, it goes on with the same command. The default is a
tenth of the images at 16 x 16, narrower networks and one sampler seed; ``--budget full`` takes the configs as they are
with three seeds.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml

from benchmarks import results
from benchmarks.studies import best_so_far, search, small_cifar100

HERE = Path(__file__).parent
CONFIGS = Path("configs/hpo")
RUNS = {
    "A": ("cifar100_cnn_tpe", "TPE, no pruner; joint search"),
    "B": ("cifar100_cnn_asha", "TPE, ASHA"),
    "C": ("cifar100_cnn_asha_100", "TPE, ASHA, 100 trials at most"),
    "D": ("cifar100_cnn_random", "random, median pruner"),
    "E": ("cifar100_cnn_groups", "TPE, one group of parameters at a time"),
}
#: What was expected before measuring: capacity, then optimizer and learning rate, then details.
EXPECTED = {
    "layers": ("n_conv", "n_fc"),
    "optimizer and learning rate": ("optimizer", "lr_", "momentum", "nesterov", "weight_decay"),
    "details": ("filters_", "kernel_", "pool_", "units_", "conv_dropout", "fc_dropout"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_AUTOML_DATA"))
    parser.add_argument("--budget", choices=("small", "full"), default="small")
    parser.add_argument("--epochs", type=int, default=150, help="epochs a run of the small study")
    parser.add_argument("--only", choices=RUNS, action="append")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/cifar100_hpo"))
    arguments = parser.parse_args()
    if arguments.data_root is None:
        parser.error("give --data-root or set LIGHTNING_AUTOML_DATA to the folder of cifar100.npz")
    arguments.work.mkdir(parents=True, exist_ok=True)
    small = arguments.budget == "small"
    rows = []
    for seed in range(1 if small else 3):
        for letter in arguments.only or RUNS:
            rows.append(_run(letter, seed, small, arguments))
            print({key: value for key, value in rows[-1].items() if key not in ("curve", "importances")})
    name = f"{arguments.budget}{'' if not arguments.only else '-' + ''.join(arguments.only)}"
    print(results.write(HERE, name, rows, budget=arguments.budget, expected_order=list(EXPECTED)))


def _run(letter: str, seed: int, small: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    name, words = RUNS[letter]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config |= {"run": str(CONFIGS / config["run"]), "seed": seed, "name": f"{name}-{seed}", "enqueue": []}
    space = yaml.safe_load((CONFIGS / "cifar100_cnn_tpe.yaml").read_text())["space"]
    overrides: dict[str, Any] = {"data.init_args.path": arguments.data_root / "cifar100.npz"}
    if small:
        overrides = small_cifar100(arguments.data_root, arguments.work)
        network = "model.init_args.model.init_args"
        overrides |= {f"{network}.filters": "[32,32,32,32]", f"{network}.kernels": "[3,3,3,3]"}
        overrides |= {
            f"{network}.pools": "[max,max,none,none]",
            f"{network}.units": "[128,128]",
            f"{network}.n_conv": 3,
        }
        config["epochs"] = arguments.epochs
        space = _narrower(space)
        if letter == "E":
            config["sampler"]["init_args"]["trials_per_group"] = max(2, arguments.epochs // 9 // 3)
    config["space"] = space
    place = arguments.work / f"{letter}-{seed}"
    record = search(
        config,
        place,
        f"--workers={arguments.workers}",
        "--retrain=3",
        *(f"--run.{k}={v}" for k, v in overrides.items()),
    )
    totals = record["totals"]
    retrained = json.loads((place / "retrain.json").read_text())
    return {
        "run": letter,
        "words": words,
        "seed": seed,
        "best_val_accuracy": max(t["values"][0] for t in record["trials"] if t["state"] == "COMPLETE"),
        "test_accuracy": retrained["metrics"]["test_accuracy"],
        "complete": totals["COMPLETE"],
        "pruned": totals["PRUNED"],
        "failed": totals["FAIL"],
        "infeasible": sum(t["infeasible"] for t in record["trials"]),
        "epochs": totals["epochs"],
        "seconds_of_trials": totals["seconds"],
        "curve": best_so_far(record),
        "importances": record["importances"],
        "importance_of_groups": {
            evaluator: {
                group: sum(value for name, value in shares.items() if name.startswith(names))
                for group, names in EXPECTED.items()
            }
            for evaluator, shares in record["importances"].items()
        },
    }


def _narrower(space: dict[str, Any]) -> dict[str, Any]:
    """The space for 16 x 16 images on a small budget: up to four blocks of 8 to 48 filters, up to two hidden layers."""
    narrow = {}
    for name, entry in space.items():
        if name[-2:] in ("_4", "_5") or name == "units_2":
            continue
        changed = dict(entry)
        if name == "n_conv":
            changed["int"] = [2, 4]
        elif name == "n_fc":
            changed["int"] = [1, 2]
        elif name.startswith("filters_"):
            changed["int"] = [8, 48, 8]
        elif name.startswith("units_"):
            changed["log_int"] = [32, 256]
        if "when" in changed and "n_conv" in changed["when"]:
            wanted = changed["when"]["n_conv"]
            kept = [each for each in (wanted if isinstance(wanted, list) else [wanted]) if each <= 4]
            changed["when"] = {"n_conv": kept}
        if "when" in changed and "n_fc" in changed["when"]:
            changed["when"] = {"n_fc": 2}
        narrow[name] = changed
    return narrow


if __name__ == "__main__":
    main()
