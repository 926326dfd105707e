"""Does an augmentation policy help, and does a searched one help more? PneumoniaMNIST and CIFAR-100, few images each.

``python -m benchmarks.policies.run --data-root DIR``; killed, it goes on with the same command. Fast AutoAugment is
searched on the train images, then a small ResNet is trained with each policy and several seeds, equally long, on all
train images, and the test split is opened once by each of these runs. ``--budget full`` takes more images, epochs,
seeds and arms; ``--budget smoke`` shows that all parts run and writes no result.
"""

import argparse
import os
import statistics
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import results
from benchmarks.studies import fit, search
from lightning_automl.rundir import replacing
from lightning_automl.studies.retrain import mean_over_seeds

HERE = Path(__file__).parent
METRICS = {"test_accuracy": "accuracy", "test_auroc": "AUROC"}


@dataclass(frozen=True)
class Condition:
    """Some images of a data set, how a network is trained on them, and what may be done to them.

    Args:
        file: Name of the file with the data, in the layout of MedMNIST.
        images: Train images of all classes together, drawn so that classes keep their shares.
        space: Operation space of all policies.
        base_augment: Done to the images in all arms.
        depth: Layers of the ResNet.
        epochs: Passes through the train images, of the folds' networks and of the runs that are compared.
        trials: Policies that are scored on each fold in each of two rounds.
        arms: Policies by name; ``None`` stands for the one that is searched.
        task: Arguments of the task beside its network.
        batch_size: Train images a step.
        folds: K.
        seeds: Runs of each arm.
    """

    file: str
    images: int
    space: str
    base_augment: str
    depth: int
    epochs: int
    trials: int
    arms: dict[str, dict[str, Any] | None]
    task: dict[str, Any]
    batch_size: int = 64
    folds: int = 4
    seeds: int = 3


def _arms(space: str) -> dict[str, dict[str, Any] | None]:
    own = {"init_args": {"space": space}}
    return {
        "none": {"class_path": "Identity", **own},
        "TrivialAugment": {"class_path": "TrivialAugment", **own},
        "Fast AutoAugment": None,
    }


PNEUMONIA = Condition(
    file="pneumoniamnist.npz",
    images=1000,
    space="radiograph",
    base_augment="crop",
    depth=14,
    epochs=30,
    trials=50,
    arms=_arms("radiograph"),
    task={
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 2e-3, "weight_decay": 0.05, "fused": True},
        },
        "scheduler": {"class_path": "WarmupCosineLR"},
        "class_weights": "balanced",
        "decay_norms_and_biases": False,
    },
)
CIFAR = Condition(
    file="cifar100.npz",
    images=5000,
    space="natural",
    base_augment="crop_flip",
    depth=14,
    epochs=20,
    trials=25,
    arms=_arms("natural"),
    task={
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        },
        "scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.1}},
        "decay_norms_and_biases": False,
    },
)


def _more(space: str) -> dict[str, dict[str, Any] | None]:
    return _arms(space) | {"RandAugment": {"class_path": "RandAugment", "init_args": {"space": space}}}


BUDGETS = {
    "small": {"PneumoniaMNIST": PNEUMONIA, "CIFAR-100, 10 %": CIFAR},
    "full": {
        "PneumoniaMNIST": replace(
            PNEUMONIA, images=4708, depth=20, epochs=60, trials=200, seeds=5, arms=_more("radiograph")
        ),
        "CIFAR-100, 10 %": replace(
            CIFAR,
            depth=20,
            epochs=120,
            trials=200,
            seeds=5,
            arms=_more("natural")
            | {
                "TrivialAugment, wide": {"class_path": "TrivialAugment"},
                "AutoAugment of CIFAR-10": {"class_path": "AutoAugment", "init_args": {"name": "cifar10"}},
            },
        ),
    },
    "smoke": {
        "PneumoniaMNIST": replace(PNEUMONIA, images=100, depth=8, epochs=1, trials=3, folds=2, seeds=2),
        "CIFAR-100, 10 %": replace(CIFAR, images=400, depth=8, epochs=1, trials=3, folds=2, seeds=2),
    },
}


def few_images(condition: Condition, data_root: Path, work: Path) -> Path:
    """A file with the first of the shuffled train images of each class, and the whole test split."""
    path = work / "data" / f"{Path(condition.file).stem}-{condition.images}.npz"
    if path.exists():
        return path
    with np.load(data_root / condition.file) as file:
        arrays = {name: file[name] for name in file.files if name.startswith(("train_", "test_"))}
        if "class_names" in file.files:
            arrays["class_names"] = file["class_names"]
    rows = _draw(arrays["train_labels"].reshape(-1), condition.images)
    arrays |= {name: arrays[name][rows] for name in ("train_images", "train_labels")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as out:
        np.savez(out, **arrays)
    return path


def _draw(labels: NDArray[Any], images: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(0)
    kept = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        kept.append(generator.permutation(own)[: round(images * len(own) / len(labels))])
    return np.sort(np.concatenate(kept))


def fit_config(condition: Condition, data: Path) -> dict[str, Any]:
    """What all runs of a condition have in common; the folds' networks of the search are trained by it as it is."""
    network = {"class_path": "ResNet", "init_args": {"depth": condition.depth}}
    return {
        "model": {"class_path": "ClassificationTask", "init_args": {"model": network, **condition.task}},
        "data": {
            "class_path": "ArraysDataModule",
            "init_args": {
                "path": str(data.resolve()),
                "batch_size": condition.batch_size,
                "base_augment": condition.base_augment,
            },
        },
        "trainer": {"max_epochs": condition.epochs, "accelerator": "cpu", "enable_progress_bar": False},
    }


def find_policy(condition: Condition, data: Path, place: Path) -> dict[str, Any]:
    """Search with Fast AutoAugment; its record. The policy is in ``place``."""
    settings = {"space": condition.space, "keep": min(10, condition.trials)}
    method = {"class_path": "FastAutoAugmentSearch", "init_args": settings}
    config = {
        "run": fit_config(condition, data),
        "method": method,
        "folds": condition.folds,
        "trials": condition.trials,
        "acceptance": None,
    }
    return search(config, place, "--workers=2", record_name="policy_search.json")


def train(condition: Condition, data: Path, place: Path, policy: dict[str, Any] | str, seed: int) -> dict[str, Any]:
    """Train on all train images with a policy, and open the test split at the end, unless that was done before.

    Returns:
        The run's ``summary.json``.
    """
    config = fit_config(condition, data)
    config["data"]["init_args"] |= {"train_policy": policy, "train_on_val": True}
    config["trainer"]["limit_val_batches"] = 0
    config["seed_everything"] = seed
    done = fit(config, place)
    assert done["test_opened"] == 1, f"{place} has opened the test split {done['test_opened']} times"
    return done


def summary(name: str, condition: Condition, runs: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each arm: test metrics of each seed, their mean, and the paired differences from no policy."""
    rows = []
    seeds = range(condition.seeds)
    for arm in condition.arms:
        row: dict[str, Any] = {"condition": name, "arm": arm}
        for metric, short in METRICS.items():
            values = [runs[arm, seed]["metrics"][metric] for seed in seeds]
            row[short] = {"values": values, **mean_over_seeds(values)}
            if arm != "none":
                pairs = [value - runs["none", seed]["metrics"][metric] for seed, value in enumerate(values)]
                row[f"{short} less none"] = {"values": pairs, **mean_over_seeds(pairs)}
        row["seconds"] = statistics.fmean(runs[arm, seed]["seconds"] for seed in seeds)
        rows.append(row)
    return rows


def markdown(rows: Iterable[dict[str, Any]], searches: dict[str, dict[str, Any]]) -> str:
    """The table of the README, in percent and percentage points, and what the searches took."""
    head = ["data", "policy", "test accuracy", "of each seed", "less none", "AUROC", "less none", "seconds a run"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["condition"], row["arm"], _percent(row["accuracy"])]
        cells.append(", ".join(f"{100 * value:.1f}" for value in row["accuracy"]["values"]))
        cells.append(_percent(row.get("accuracy less none"), "+"))
        auroc = row["AUROC"]
        cells.append(f"{auroc['mean']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})")
        less = row.get("AUROC less none")
        cells.append("" if less is None else f"{less['mean']:+.3f} ({less['low']:+.3f} to {less['high']:+.3f})")
        cells.append(f"{row['seconds']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, each in searches.items():
        lines.append(
            f"- {name}: {each['evaluations']} policies scored, {each['sub_policies']} sub-policies kept, "
            f"{each['epochs']} epochs of the folds' networks, {each['seconds'] / 60:.1f} minutes."
        )
    return "\n".join(lines)


def _percent(found: dict[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return ""
    mean, low, high = (format(100 * found[key], f"{sign}.1f") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_AUTOML_DATA"))
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--processes", type=int, default=2, help="each has one thread")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/policies"))
    arguments = parser.parse_args()
    if arguments.data_root is None:
        parser.error("give --data-root or set LIGHTNING_AUTOML_DATA to the folder of the .npz files")
    work, conditions = arguments.work / arguments.budget, BUDGETS[arguments.budget]
    files = {name: few_images(each, arguments.data_root, work) for name, each in conditions.items()}
    places = {name: work / Path(each.file).stem for name, each in conditions.items()}
    searches = {}
    for name, condition in conditions.items():
        record = find_policy(condition, files[name], places[name] / "search")
        searches[name] = {
            "evaluations": record["evaluations"],
            "sub_policies": record["sub_policies"],
            "epochs": record["epochs"]["folds"],
            "seconds": sum(record["seconds"].values()),
        }
        print(name, searches[name], flush=True)
    jobs = [
        (name, arm, seed)
        for seed in range(max(each.seeds for each in conditions.values()))
        for name, each in conditions.items()
        if seed < each.seeds
        for arm in each.arms
    ]

    def one(job: tuple[str, str, int]) -> dict[str, Any]:
        name, arm, seed = job
        policy = conditions[name].arms[arm]
        found = places[name] / "search" / "searched_policy.json"
        slug = "".join(letter if letter.isalnum() else "_" for letter in arm)
        place = places[name] / "runs" / f"{slug}-{seed}"
        done = train(conditions[name], files[name], place, policy or str(found.resolve()), seed)
        print(name, arm, seed, {metric: round(done["metrics"][metric], 4) for metric in METRICS}, flush=True)
        return done

    with ThreadPoolExecutor(arguments.processes) as pool:
        runs = dict(zip(jobs, pool.map(one, jobs), strict=True))
    rows = []
    for name, condition in conditions.items():
        own = {(arm, seed): done for (of, arm, seed), done in runs.items() if of == name}
        rows += summary(name, condition, own)
    if arguments.budget != "smoke":
        settings = ("images", "space", "depth", "epochs", "batch_size", "folds", "trials", "seeds")
        facts = {name: {key: getattr(each, key) for key in settings} for name, each in conditions.items()}
        print(results.write(HERE, arguments.budget, rows, conditions=facts, searches=searches))
    print(markdown(rows, searches))


if __name__ == "__main__":
    main()
