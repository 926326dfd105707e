"""The best config trained anew with several seeds on train and val together, each opening the test split once."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_automl.rundir import read_json, write_json
from lightning_automl.search.devices import Slice
from lightning_automl.search.trials import TrialServer
from lightning_automl.studies.configs import of_seed, shared_cache
from lightning_automl.studies.workers import Workers

log = logging.getLogger("lightning_automl")


def retrain(
    server: TrialServer,
    config: Mapping[str, Any],
    directory: Path,
    seeds: Sequence[int],
    slices: Sequence[Slice],
    ranks: int,
    *,
    trial: int,
    silence: float | None = 600.0,
) -> dict[str, Any]:
    """Train ``config`` on train and val with each seed, test it, and write ``retrain.json``.

    Runs that are finished are not repeated, and one that was killed goes on from its last checkpoint.

    Args:
        server: Makes the processes.
        config: The best config, a resolved fit config.
        directory: Of the study; the runs are in ``retrain/trial-N/seed-N``.
        seeds: Of the runs.
        slices: Devices and threads of each worker; so many runs are trained at once.
        ranks: Processes of a run.
        trial: The number of the trial that the config is of.
        silence: Seconds without a sign of life after which a run is killed.

    Returns:
        What ``retrain.json`` holds: ``runs``, and ``metrics`` by name with ``mean``, ``std``, ``low``, ``high`` and
        ``n``; the interval is Student's at 95 % over the seeds, which does not tell how far another test set would
        differ.

    Raises:
        UserError: If the run refuses the config, for example since its data module has no ``train_on_val``.
        StudyFailed: If a run failed.
    """
    workers = Workers(server, slices, ranks, silence=silence)

    def train(seed: int) -> dict[str, Any]:
        place = directory / "retrain" / f"trial-{trial:04d}" / f"seed-{seed}"
        own = of_seed(shared_cache(config, directory), seed)
        metrics = workers.fit(f"retraining with seed {seed}", own, place)["metrics"]
        log.info("retrained with seed %d: %s", seed, _shown(metrics))
        return {"seed": seed, "directory": str(place.relative_to(directory)), "metrics": metrics}

    runs = workers.each(train, seeds)
    names = [name for name in runs[0]["metrics"] if name.startswith("test_")]
    record = {
        "trial": trial,
        "config": "best.yaml",
        "seeds": list(seeds),
        "runs": runs,
        "metrics": {
            name: mean_over_seeds([run["metrics"][name] for run in runs], bounded=not name.endswith("loss"))
            for name in names
        },
    }
    write_json(directory / "retrain.json", record)
    return record


def times_opened(directory: Path) -> int:
    """How often retrained runs of a study have opened the test split."""
    summaries = (directory / "retrain").glob("*/*/summary.json")
    return sum(int(read_json(path).get("test_opened", 0)) for path in summaries)


def mean_over_seeds(values: Sequence[float], bounded: bool = False) -> dict[str, float]:
    """Mean, standard deviation and Student's 95 % interval over seeds; no interval of a single value, or of NaN.

    Args:
        values: One a seed.
        bounded: Whether the metric lies in [0, 1], so that the interval does too.
    """
    from scipy.stats import t

    mean, count = math.fsum(values) / len(values), len(values)
    if count < 2 or not math.isfinite(mean):
        return {"mean": mean, "std": math.nan, "low": math.nan, "high": math.nan, "n": count}
    spread = statistics.stdev(values)
    half = float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    low, high = mean - half, mean + half
    if bounded:
        low, high = max(0.0, low), min(1.0, high)
    return {"mean": mean, "std": spread, "low": low, "high": high, "n": count}


def _shown(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("test_"))
