"""Ten and fifty images a class of BreastMNIST and PneumoniaMNIST: one command against a fixed ResNet-18.

``python -m benchmarks.few_labels.run --data-root DIR``; killed, it goes on with the same command. The ResNet-18 is
trained from scratch with the defaults of torchvision's reference script (SGD of rate 0.1 and momentum 0.9, weight decay
1e-4, rate divided by 10 every 30 of 90 epochs, batches of 32, random crops and flips), on 28x28 pixels, on all images
of the class, last epoch.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results, strategies
from lightning_automl.metrics import SCORES, paired_bootstrap
from lightning_automl.results import Run
from lightning_automl.rundir import replacing

HERE = Path(__file__).parent
SETS = {"BreastMNIST": "breastmnist.npz", "PneumoniaMNIST": "pneumoniamnist.npz"}
COLUMNS = (
    "data",
    "images",
    "seed",
    "arm",
    "chosen",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "auc",
    "balanced_accuracy",
)
COLUMNS += ("less_auc", "less_auc_low", "less_auc_high", "command_seconds")


def main() -> None:
    """Run the benchmark."""
    parser = strategies.options(__doc__, HERE, budget="5m", seeds=3)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50], help="of a class")
    given = strategies.asked(parser, HERE, COLUMNS)
    if given is None:
        return
    rows = []
    for seed in range(given.seeds):
        for images in given.images:
            for name, file in SETS.items():
                data = few(Path(given.data_root) / file, images, seed, given.work / "data")
                place = given.work / f"{name.lower()}-{images}-{given.budget}-seed-{seed}"
                searched = strategies.auto(data, place, budget=given.budget, modality="radiograph", seed=seed)
                fixed_place = given.work / f"{name.lower()}-{images}-resnet18-seed-{seed}"
                fixed = strategies.fit(resnet18(data, seed), fixed_place)
                about = {"data": name, "images": images, "seed": seed}
                rows.append({**about, "arm": "auto", **searched, **_less(place, fixed_place)})
                rows.append({**about, "arm": "ResNet-18", **fixed})
                results.write(HERE, f"auto-{given.budget}", rows, budget=given.budget, seeds=given.seeds)
    print(results.table(HERE, COLUMNS))


def few(source: Path, images: int, seed: int, folder: Path) -> Path:
    """A file with so many train images of each class, drawn by the seed, and the whole official test split."""
    path = folder / f"{source.stem}-{images}-seed-{seed}.npz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([seed, images])
    with np.load(source) as file:
        labels = file["train_labels"].reshape(-1)
        drawn = [generator.choice(np.flatnonzero(labels == each), images, replace=False) for each in np.unique(labels)]
        rows = np.sort(np.concatenate(drawn))
        arrays = {"train_images": file["train_images"][rows], "train_labels": labels[rows]}
        arrays |= {"test_images": file["test_images"], "test_labels": file["test_labels"].reshape(-1)}
        if "class_names" in file:
            arrays["class_names"] = file["class_names"]
    with replacing(path) as partial, partial.open("wb") as out:
        np.savez(out, **arrays)
    return path


def resnet18(data: Path, seed: int) -> dict[str, Any]:
    """The fixed arm."""
    return {
        "seed_everything": seed,
        "model": {
            "class_path": "ClassificationTask",
            "init_args": {
                "model": {"class_path": "Backbone", "init_args": {"name": "resnet18", "pretrained": False}},
                "optimizer": {
                    "class_path": "torch.optim.SGD",
                    "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
                },
                "scheduler": {
                    "class_path": "torch.optim.lr_scheduler.StepLR",
                    "init_args": {"step_size": 30, "gamma": 0.1},
                },
            },
        },
        "data": {
            "class_path": "ArraysDataModule",
            "init_args": {"path": str(data), "batch_size": 32, "base_augment": "crop_flip", "train_on_val": True},
        },
        "trainer": {"max_epochs": 90, "limit_val_batches": 0, "enable_progress_bar": False},
    }


def _less(searched: Path, fixed: Path) -> dict[str, float]:
    """AUC of the command less that of the fixed arm, with the interval of a paired bootstrap over test images."""
    one, other = strategies.predictions(searched), Run.read(fixed).predictions("test")
    assert other is not None
    assert (one.labels == other.labels).all()
    score = SCORES["auroc"]
    found = paired_bootstrap(
        lambda rows: score(one.probabilities[rows], one.labels[rows]),
        lambda rows: score(other.probabilities[rows], other.labels[rows]),
        len(one.labels),
    )
    return {"less_auc": found.difference, "less_auc_low": found.low, "less_auc_high": found.high}


if __name__ == "__main__":
    main()
