"""Seconds from "ask" to the first training step of a trial, and trials a minute of two workers against one.

``python -m benchmarks.trial_overhead.run`` needs no data beside scikit-learn's digits.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna

from benchmarks import results
from lightning_automl.search.devices import Slice
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import open_study, search
from lightning_automl.search.trials import TrialServer
from lightning_automl.studies.configs import TrialConfigs
from lightning_automl.studies.runs import RANK, FitTrials, directory_of

HERE = Path(__file__).parent
CONFIG = "configs/baseline/digits_cnn.yaml"
SPACE = {"lr": {"log_float": [1e-3, 1e-2], "path": "model.init_args.optimizer.init_args.lr"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="trials a measurement")
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    rows: list[dict[str, Any]] = []
    with TrialServer(RANK) as server, tempfile.TemporaryDirectory() as work:
        base = _resolved(server, Path(work))
        for ranks, bound in ((1, 1.5), (2, 4.0)):
            seconds = _starts(server, base, Path(work) / f"ranks{ranks}", ranks, arguments.repeats)
            rows.append(
                {
                    "what": f"first step, {ranks} rank(s), warm",
                    "median": statistics.median(seconds),
                    "bound": bound,
                    "least": min(seconds),
                    "most": max(seconds),
                    "repeats": len(seconds),
                }
            )
            print(rows[-1])
        fresh = [_fresh(Path(work) / f"fresh{turn}") for turn in range(3)]
        rows.append(
            {
                "what": "first step, 1 rank, fresh interpreter",
                "median": statistics.median(fresh),
                "least": min(fresh),
                "most": max(fresh),
                "repeats": len(fresh),
            }
        )
        print(rows[-1])
        rates: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(3):  # alternating
            for workers in (1, 2):
                rates[workers].append(_rate(server, base, Path(work) / f"rate{turn}-{workers}", workers, 8))
        for workers, values in rates.items():
            rows.append(
                {
                    "what": f"trials a minute, {workers} worker(s) of one thread",
                    "median": statistics.median(values),
                    "least": min(values),
                    "most": max(values),
                    "repeats": len(values),
                }
            )
        ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
        rows.append(
            {
                "what": "two workers against one",
                "median": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "repeats": len(ratios),
                "bound": 1.7,
            }
        )
        print(rows[-1])
    print(results.write(HERE, "digits", rows, config_file=CONFIG))


def _resolved(server: TrialServer, work: Path) -> dict[str, Any]:
    ending = server.run(
        {
            "do": "resolve",
            "arguments": ["--config", CONFIG, "--trainer.accelerator", "cpu"],
            "monitors": [],
            "gpus": 0,
            "seed": 0,
        },
        ranks=1,
        threads=1,
        log=work / "resolve.txt",
        environment={},
        on_message=lambda message: None,
        silence=None,
        timeout=None,
        stop=None,
    )
    assert ending.result is not None, ending.reason
    base: dict[str, Any] = ending.result["config"]
    return base


def _study(
    server: TrialServer, base: dict[str, Any], place: Path, ranks: int, workers: int, epochs: int, trials: int
) -> tuple[optuna.Study, dict[int, float]]:
    """Run a small study; return it and when the first step of each trial was done."""
    place.mkdir()
    base = base | {"trainer": base["trainer"] | {"max_epochs": epochs, "devices": ranks}}
    space = Space.parse(SPACE)
    storage, _ = open_storage(None, place)
    study, _ = open_study("overhead", storage, ["maximize"], optuna.samplers.TPESampler(seed=0), None, space=space)
    score = FitTrials(
        server,
        TrialConfigs(base, space, "val_accuracy", "maximize", place),
        place,
        ["val_accuracy"],
        [Slice((), 1)] * workers,
        ranks,
    )
    started: dict[int, float] = {}
    score.on_started = lambda number: started.setdefault(number, time.time())
    search(study, space, score, trials=trials, workers=workers, directory_of=directory_of)
    return study, started


def _starts(server: TrialServer, base: dict[str, Any], place: Path, ranks: int, repeats: int) -> list[float]:
    study, started = _study(server, base, place, ranks, 1, 1, repeats + 1)
    found = [started[trial.number] - _time(trial.datetime_start) for trial in study.trials]
    return found[1:]  # the first one waits for the server's imports


def _rate(server: TrialServer, base: dict[str, Any], place: Path, workers: int, trials: int) -> float:
    start = time.monotonic()
    _study(server, base, place, 1, workers, 10, trials)
    return 60 * trials / (time.monotonic() - start)


def _fresh(place: Path) -> float:
    """Seconds from starting the command to the end of the first epoch's first step, taken from its log."""
    code = (
        "import sys, time\n"
        "from lightning.pytorch import Callback\n"
        "from lightning_automl.cli import AutoMLCLI\n"
        "from lightning_automl.parser import adapt_jsonargparse\n"
        "class First(Callback):\n"
        "    def on_train_batch_end(self, *args):\n"
        "        print('STARTED', time.time(), flush=True)\n"
        "        sys.stdout.flush(); import os; os._exit(0)\n"
        "adapt_jsonargparse()\n"
        "AutoMLCLI(['fit', '--config', sys.argv[1], '--dir', sys.argv[2]], [First()])\n"
    )
    start = time.time()
    found = subprocess.run(
        [sys.executable, "-c", code, CONFIG, str(place)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return float(found.stdout.split("STARTED")[1].split()[0]) - start


def _time(moment: datetime | None) -> float:
    assert moment is not None
    return moment.timestamp()


if __name__ == "__main__":
    main()
