"""What benchmarks of `auto` share: its command, which goes on when killed, and what its directory says."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import results
from lightning_automl.metrics import SCORES, bootstrap_interval, clopper_pearson
from lightning_automl.results import Predictions, Run
from lightning_automl.results.run import read_predictions
from lightning_automl.rundir import read_json

#: Scores in the tables, by the name that a row has them under.
SHOWN = {"accuracy": "accuracy", "auc": "auroc", "balanced_accuracy": "balanced_accuracy"}


def asked(parser: argparse.ArgumentParser, folder: Path, columns: Sequence[str]) -> argparse.Namespace | None:
    """What was given; None if that was the table alone, which is then printed."""
    given = parser.parse_args()
    if given.table:
        print(results.table(folder, columns))
        return None
    if given.data_root is None:
        parser.error("give --data-root, or set LIGHTNING_AUTOML_DATA")
    return given


def options(about: str, folder: Path, *, budget: str, seeds: int) -> argparse.ArgumentParser:
    """What both benchmarks are told on their command lines.

    Args:
        about: What the benchmark is.
        folder: Of the benchmark.
        budget: Time of each command by default.
        seeds: How many by default.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_AUTOML_DATA"))
    parser.add_argument("--work", type=Path, default=folder / "runs", help="where the runs go")
    parser.add_argument("--budget", default=budget, help="time of each command; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=seeds, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only print the table of the results that are there")
    return parser


def auto(data: Path, directory: Path, *, budget: str, modality: str, seed: int, workers: int = 2) -> dict[str, Any]:
    """Run the command to its end, or go on with it, unless that was done before; return what came of it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lightning_automl", "auto", str(data), "--dir", str(directory)]
    command += ["--budget", budget, "--modality", modality, "--seed", str(seed), "--workers", str(workers)]
    if (read_json(directory / "summary.json") or {}).get("status") != "finished":
        start = time.monotonic()
        with directory.with_suffix(".txt").open("a") as out:
            subprocess.run(command, check=True, stdout=out, stderr=out)
        with directory.with_suffix(".wall").open("a") as out:  # of several commands, if some were killed, the last
            out.write(f"{time.monotonic() - start:.1f}\n")
    judged = predictions(directory)
    evaluation: Any = read_json(directory / "evaluation.json")
    chosen = evaluation["models"]["chosen"]
    selection: Any = read_json(directory / "selection.json")
    return {
        "chosen": chosen["title"],
        "seeds": len(chosen["seeds"]),
        "averaging": evaluation["averaging"]["kind"],
        "arms": len({each["arm"] for each in selection["candidates"]}),
        "candidates": len(selection["candidates"]),
        "adopted": "simple"
        if evaluation["instead_of"]
        else (read_json(directory / "comparison.json") or {}).get("adopted", "simple"),
        "command_seconds": float(directory.with_suffix(".wall").read_text().split()[-1]),
        **scores(judged),
    }


def predictions(directory: Path) -> Predictions:
    """What the chosen model of the command says of the test split."""
    found = read_predictions(directory / "predictions_test.safetensors")
    assert found is not None
    return found


def fit(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Run a fit config to its end with two threads, or go on with it; return the scores of its test split."""
    if (read_json(directory / "summary.json") or {}).get("status") != "finished":
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, "-m", "lightning_automl", "fit", "--config", str(file), "--dir", str(directory)]
        with directory.with_suffix(".txt").open("a") as out:
            subprocess.run(command, check=True, stdout=out, stderr=out)
    run = Run.read(directory)
    judged = run.predictions("test")
    assert judged is not None
    return {"command_seconds": float((run.summary or {})["seconds"]), **scores(judged)}


def scores(judged: Predictions) -> dict[str, float]:
    """Scores of a test split with the ends of their 95 % intervals: exact of the accuracy, else a bootstrap."""
    labels, probabilities = judged.labels, judged.probabilities
    found: dict[str, float] = {}
    for name, score in SHOWN.items():
        value = SCORES[score](probabilities, labels)
        if name == "accuracy":
            low, high = clopper_pearson(int((judged.predicted == labels).sum()), len(labels))
        else:
            low, high, _ = bootstrap_interval(_of_rows(score, probabilities, labels), len(labels))
        found |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _of_rows(score: str, probabilities: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Any:
    return lambda rows: SCORES[score](probabilities[rows], labels[rows])
