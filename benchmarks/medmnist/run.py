"""One command against the published table of MedMNIST: BreastMNIST and PneumoniaMNIST, official splits.

``python -m benchmarks.medmnist.run --data-root DIR``; killed, it goes on with the same command.
"""

from pathlib import Path

from benchmarks import results, strategies

HERE = Path(__file__).parent

#: File, kind of the images for the safe operations, and the best published AUC and accuracy at 28x28 (Yang et al.,
#: *MedMNIST v2*, Scientific Data 10:41, 2023, table 3), with who has it.
SETS = {
    "BreastMNIST": ("breastmnist.npz", "radiograph", (0.919, "Google AutoML Vision"), (0.863, "ResNet-18")),
    "PneumoniaMNIST": (
        "pneumoniamnist.npz",
        "radiograph",
        (0.991, "Google AutoML Vision"),
        (0.946, "Google AutoML Vision"),
    ),
}
COLUMNS = ("data", "seed", "chosen", "seeds", "auc", "auc_low", "auc_high", "published_auc", "accuracy", "accuracy_low")
COLUMNS += ("accuracy_high", "published_accuracy", "command_seconds")


def main() -> None:
    """Run the benchmark."""
    parser = strategies.options(__doc__, HERE, budget="30m", seeds=2)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    given = strategies.asked(parser, HERE, COLUMNS)
    if given is None:
        return
    rows = []
    for seed in range(given.seeds):
        for name in given.sets:
            file, modality, (auc, auc_of), (accuracy, accuracy_of) = SETS[name]
            place = given.work / f"{name.lower()}-{given.budget}-seed-{seed}"
            found = strategies.auto(
                Path(given.data_root) / file, place, budget=given.budget, modality=modality, seed=seed
            )
            published = {
                "published_auc": auc,
                "auc_of": auc_of,
                "published_accuracy": accuracy,
                "accuracy_of": accuracy_of,
            }
            rows.append({"data": name, "seed": seed, **found, **published})
            results.write(HERE, f"auto-{given.budget}", rows, budget=given.budget, seeds=given.seeds)
    print(results.table(HERE, COLUMNS))


if __name__ == "__main__":
    main()
