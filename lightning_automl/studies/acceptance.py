"""Whether a searched augmentation policy is adopted: it has to beat the simple ways on images that it never saw.

The data are cut into K folds for the search and some more. For each of these and each seed a run is trained with every
arm, on all folds but this one, and validated on it. The seeds are the same for all arms, so that what makes a fold hard
or a start lucky is no difference between them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_automl.augment import Identity, OperationSpace, TrivialAugment, save_policy
from lightning_automl.metrics.comparison import corrected_resampled_t_test
from lightning_automl.rundir import UserError
from lightning_automl.studies.configs import closed, of_fold, to_its_end, with_policy
from lightning_automl.studies.retrain import mean_over_seeds
from lightning_automl.studies.workers import Workers

SEARCHED = "searched"

#: The simple ways, by the name of their arm: a policy, and what to call it.
SIMPLE: dict[str, tuple[type[Identity] | type[TrivialAugment], str]] = {
    "none": (Identity, "no policy"),
    "trivial_augment": (TrivialAugment, "TrivialAugment"),
}


class Outcome(Protocol):
    """What a run directory says, read back: a row of metrics an epoch, and what is known of the data."""

    @property
    def directory(self) -> Path:
        """Where it is."""

    @property
    def epochs(self) -> Sequence[Mapping[str, float]]:
        """Oldest first."""

    @property
    def data(self) -> Mapping[str, Any]:
        """Among it ``counts``: images of each class by split."""


#: Values of an arm by fold and seed; NaN where a run gave none.
Values = Mapping[tuple[int, int], float]


def compare(
    workers: Workers,
    base: Mapping[str, Any],
    directory: Path,
    space: OperationSpace,
    *,
    folds: Sequence[int],
    all_folds: int,
    seeds: Sequence[int],
    metric: str,
    direction: str,
    read: Callable[[Path], Outcome],
    on_run: Callable[[str, int, int, float], None] = lambda arm, fold, seed, value: None,
) -> dict[str, Any]:
    """Train every arm on every fold with every seed, and judge the searched one.

    Runs that are finished are not repeated, and one that was killed goes on from its last checkpoint.

    Args:
        workers: Train the runs.
        base: The resolved fit config, without a policy.
        directory: Of the search; its ``acceptance/searched/policy.json`` is the searched policy, and the runs are in
            ``acceptance/ARM/fold-J-seed-S``.
        space: Of the simple arms.
        folds: Numbers of the folds that the search has not seen.
        all_folds: How many folds there are.
        seeds: Of the runs.
        metric: Of the validation, to compare by.
        direction: ``maximize`` or ``minimize`` for it.
        read: Reads the directory of a run.
        on_run: Called, in a thread, with arm, fold, seed and value of each run.

    Returns:
        See :func:`judge`.

    Raises:
        UserError: If a run refuses its config.
        StudyFailed: If a run failed.
    """
    for name, (cls, _) in SIMPLE.items():
        save_policy(cls(space), policy_of(directory, name))

    def train(job: tuple[int, int, str]) -> tuple[float, dict[str, int]]:
        seed, fold, arm = job
        config = run_of(base, directory, arm, fold, all_folds, seed)
        place = directory / "acceptance" / arm / f"fold-{fold}-seed-{seed}"
        workers.fit(f"the training of {arm} on fold {fold} with seed {seed}", config, place)
        run = read(place)
        value = last_value(run, metric)
        on_run(arm, fold, seed, value)
        return value, {split: sum(counts) for split, counts in run.data["counts"].items()}

    arms = (*SIMPLE, SEARCHED)
    # Seed by seed, so that what is there when the search is stopped is a whole comparison of fewer seeds.
    jobs = [(seed, fold, arm) for seed in seeds for fold in folds for arm in arms]
    found = dict(zip(jobs, workers.each(train, jobs), strict=True))
    values = {arm: {(fold, seed): found[seed, fold, arm][0] for fold in folds for seed in seeds} for arm in arms}
    sizes = [size for _, size in found.values()]
    train_images, test_images = (round(sum(size[split] for size in sizes) / len(sizes)) for split in ("train", "val"))
    return judge(values, metric, direction, train_images, test_images)


def policy_of(directory: Path, arm: str) -> Path:
    """The file of the policy that an arm is trained with."""
    return directory / "acceptance" / arm / "policy.json"


def run_of(base: Mapping[str, Any], directory: Path, arm: str, fold: int, all_folds: int, seed: int) -> dict[str, Any]:
    """The config of a run of the comparison: trained on all folds but one, to its last epoch, and validated on it."""
    config = of_fold(closed(with_policy(base, policy_of(directory, arm)), directory), fold, all_folds)
    return to_its_end(config | {"seed_everything": seed})


def last_value(run: Outcome, metric: str) -> float:
    """The metric after the last epoch; the best epoch's would be chosen on the images that are to judge it.

    NaN if the training has diverged.

    Raises:
        UserError: If no epoch has it.
    """
    value = next((row[metric] for row in reversed(run.epochs) if metric in row), None)
    if value is None:
        raise UserError(
            f"{run.directory} has no {metric} after any of its {len(run.epochs)} epochs, so that there is nothing to "
            "compare by; look at check_val_every_n_epoch and limit_val_batches of the run's trainer"
        )
    return value


def judge(
    values: Mapping[str, Values], metric: str, direction: str, train_images: int, test_images: int
) -> dict[str, Any]:
    """Adopt the searched policy if it is better than every simple arm, and more than by chance; else the best of these.

    Nadeau and Bengio, *Inference for the Generalization Error*, 2003: a paired test for overlapping training sets
    (:func:`~lightning_automl.metrics.comparison.corrected_resampled_t_test`). The search is judged by the interval of
    the difference at 95 %, which has to exclude zero. Of the simple arms no policy is taken unless TrivialAugment has
    the better mean.

    Args:
        values: By arm, then by fold and seed, the same for each arm.
        metric: What they are.
        direction: ``maximize`` or ``minimize``.
        train_images: Images that each run was trained on.
        test_images: Images that each was validated on.

    Returns:
        ``metric``, ``direction``; ``arms`` by name with ``values`` (``fold``, ``seed``, ``value``), ``mean``, ``low``,
        ``high`` (Student's 95 % over the runs); ``comparisons`` with each simple arm: ``against``, ``difference``
        (searched minus simple), ``low``, ``high``, ``p_value``, ``better``; ``adopted``, the name of an arm; and a
        ``sentence``.
    """
    sign = 1 if direction == "maximize" else -1
    arms = {}
    for name, own in values.items():
        several = mean_over_seeds(list(own.values()), bounded=not metric.endswith("loss"))
        rows = [{"fold": fold, "seed": seed, "value": value} for (fold, seed), value in own.items()]
        arms[name] = {"values": rows, **{key: several[key] for key in ("mean", "low", "high")}}
    comparisons = [
        {"against": name, **paired(values[SEARCHED], values[name], direction, train_images, test_images)}
        for name in SIMPLE
    ]
    adopted = SEARCHED if all(each["better"] for each in comparisons) else _best_simple(arms, sign)
    record = {"metric": metric, "direction": direction, "arms": arms, "comparisons": comparisons, "adopted": adopted}
    return record | {"sentence": _sentence(record)}


def paired(searched: Values, simple: Values, direction: str, train_images: int, test_images: int) -> dict[str, Any]:
    """Whether an arm is better than another one by more than chance, by runs on the same folds with the same seeds.

    See :func:`judge` for the test. Of less than two pairs, of differences that all are equal, and where a run has
    diverged, nothing is claimed.

    Args:
        searched: The arm in question, by fold and seed.
        simple: The other one, at least for the same folds and seeds.
        direction: ``maximize`` or ``minimize`` for the values.
        train_images: Images that each run was trained on.
        test_images: Images that each was validated on.

    Returns:
        ``difference`` (searched minus simple), ``low``, ``high`` (its interval at 95 %), ``p_value``, each NaN where it
        is not known; ``better``.
    """
    sign = 1 if direction == "maximize" else -1
    differences = [value - simple[key] for key, value in searched.items()]
    nothing = dict.fromkeys(("difference", "low", "high", "p_value"), math.nan)
    if not differences or not all(map(math.isfinite, differences)):
        return {**nothing, "better": False}
    if len(differences) == 1:
        return {**nothing, "difference": differences[0], "better": False}
    found = corrected_resampled_t_test(differences, train_images, test_images)
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "better": found.excludes_zero and sign * found.difference > 0,
    }


def _best_simple(arms: Mapping[str, Any], sign: int) -> str:
    names = list(SIMPLE)
    # of equal ones the first, and no number is worse than any
    return max(names, key=lambda name: sign * mean if math.isfinite(mean := arms[name]["mean"]) else -math.inf)


def difference_words(metric: str, found: Mapping[str, Any]) -> str:
    """What :func:`paired` has found, for a person: ``val_auroc +0.0021 [-0.0100, +0.0142]``."""
    interval = f" [{found['low']:+.4f}, {found['high']:+.4f}]" if math.isfinite(found["low"]) else ""
    return f"{metric} {found['difference']:+.4f}{interval}"


def _sentence(record: Mapping[str, Any]) -> str:
    """What came of the comparison, for a person."""
    metric = record["metric"]
    told = []
    for each in record["comparisons"]:
        name = SIMPLE[each["against"]][1]
        verb = "beats" if each["better"] else "does not beat"
        if math.isfinite(each["difference"]):
            told.append(f"{verb} {name} ({difference_words(metric, each)})")
        else:
            told.append(f"cannot be compared with {name}, since a run has diverged")
    linked = " and ".join(told)
    if record["adopted"] == SEARCHED:
        return f"on held-out folds the searched policy {linked}, and is adopted"
    return f"on held-out folds the searched policy {linked}; {SIMPLE[record['adopted']][1]} is adopted instead"
