"""What Fast AutoAugment costs on the digits, against AutoAugment with the same number of policies.

``python -m benchmarks.faa_cost.run``; killed, it goes on with the same command. Fast AutoAugment is searched to its
end; of AutoAugment some children are trained, and their mean cost is multiplied by the number of policies.
"""

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import yaml

from benchmarks import results
from benchmarks.studies import search

HERE = Path(__file__).parent
RUN = Path("configs/baseline/digits_cnn.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=5, help="K")
    parser.add_argument("--rounds", type=int, default=2, help="T")
    parser.add_argument("--trials", type=int, default=200, help="B")
    parser.add_argument("--epochs", type=int, help="of a fold's network and of a child; as in the config by default")
    parser.add_argument("--children", type=int, default=6, help="children of AutoAugment that are trained")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread at once")
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/faa_cost"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    run = yaml.safe_load(RUN.read_text())
    run["trainer"] |= {"accelerator": "cpu", **({} if arguments.epochs is None else {"max_epochs": arguments.epochs})}
    epochs = run["trainer"]["max_epochs"]
    fast = _fast(run, epochs, arguments)
    slow = _slow(run, epochs, fast["policies"], arguments)
    facts = {
        "folds": arguments.folds,
        "rounds": arguments.rounds,
        "trials": arguments.trials,
        "workers": arguments.workers,
        "times_cheaper_in_seconds": slow["seconds"] / fast["seconds"],
        "times_cheaper_in_epochs": slow["epochs"] / fast["epochs"],
        # Children of fewer epochs cost less: with so many they would cost a hundred times what Fast AutoAugment does.
        "epochs_of_a_child_at_100_times": 100 * fast["seconds"] / (slow["seconds"] / epochs),
    }
    print(markdown([fast, slow], facts))
    if not arguments.dry:
        print(results.write(HERE, "digits", [fast, slow], **facts))


def _fast(run: dict[str, Any], epochs: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search with Fast AutoAugment; what its folds and its scores took."""
    place = arguments.work / "fast"
    settings = {"space": "natural", "rounds": arguments.rounds, "keep": min(10, arguments.trials)}
    method = {"class_path": "FastAutoAugmentSearch", "init_args": settings}
    config = {"run": run, "method": method, "folds": arguments.folds, "trials": arguments.trials, "acceptance": None}
    record = search(config, place, f"--workers={arguments.workers}", record_name="policy_search.json")
    assert record["evaluations"] == arguments.folds * arguments.rounds * arguments.trials
    with (place / "trials.csv").open(newline="") as file:
        scores = [float(row["seconds"]) for row in csv.DictReader(file)]
    trained, scored = record["seconds"]["folds"], record["seconds"]["density"]
    return {
        "search": "Fast AutoAugment",
        "policies": record["evaluations"],
        "networks": arguments.folds,
        "epochs_of_each": epochs,
        "epochs": record["epochs"]["folds"],
        "seconds": trained + scored,
        "seconds_of_networks": trained,
        "seconds_of_scores": scored,
        "policies_a_second": len(scores) / scored,
        "median_score_ms": 1000 * statistics.median(scores),
    }


def _slow(run: dict[str, Any], epochs: int, policies: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train some children with AutoAugment; what as many as ``policies`` would take.

    Their epochs alone count, with validation; of Fast AutoAugment also what a run does before and after its epochs.
    """
    place = arguments.work / "children"
    config = {
        "run": run,
        "method": {
            "class_path": "AutoAugmentSearch",
            "init_args": {"space": "natural", "keep": min(5, arguments.children)},
        },
        "folds": arguments.folds,
        "trials": arguments.children,
        "acceptance": None,
    }
    search(config, place, f"--workers={arguments.workers}", record_name="policy_search.json")
    children = []
    for number in range(arguments.children):
        with (place / "trials" / f"{number:04d}" / "metrics.csv").open(newline="") as file:
            children.append(sum(float(row["seconds"]) for row in csv.DictReader(file)))
    return {
        "search": "AutoAugment, extrapolated",
        "policies": policies,
        "networks": policies,
        "epochs_of_each": epochs,
        "epochs": epochs * policies,
        "seconds": statistics.fmean(children) * policies,
        "seconds_of_children": children,
    }


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table of the README."""
    lines = ["| search | policies | networks trained | epochs | process seconds |", "|---|---|---|---|---|"]
    for row in rows:
        networks = f"{row['networks']:,} of {row['epochs_of_each']} epochs"
        lines.append(
            f"| {row['search']} | {row['policies']:,} | {networks} | {row['epochs']:,} | {row['seconds']:,.0f} |"
        )
    in_seconds, in_epochs = facts["times_cheaper_in_seconds"], facts["times_cheaper_in_epochs"]
    lines.append(f"| times cheaper | | | {in_epochs:,.0f} | {in_seconds:,.0f} |")
    fast = rows[0]
    said = (
        f"Of the {fast['seconds']:,.0f} seconds {fast['seconds_of_networks']:,.0f} are the folds' networks and "
        f"{fast['seconds_of_scores']:,.0f} the scores: {fast['policies_a_second']:.1f} policies a second and process. "
        f"A child takes {rows[1]['seconds'] / rows[1]['policies']:.1f} seconds; with children of "
        f"{facts['epochs_of_a_child_at_100_times']:.0f} epochs AutoAugment would be a hundred times as expensive."
    )
    return "\n".join([*lines, "", said])


if __name__ == "__main__":
    main()
