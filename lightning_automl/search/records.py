"""What a search leaves to be read: ``trials.csv`` and ``study.json``, made from the study alone."""

import csv
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_automl.rundir import write_json, write_text
from lightning_automl.search.spaces import Space

if TYPE_CHECKING:
    from optuna.importance import BaseImportanceEvaluator

#: COMPLETE trials that importances are computed from, at least.
IMPORTANCE_TRIALS = 10

_STATES = ("COMPLETE", "PRUNED", "FAIL", "LOST", "RUNNING", "WAITING")


def write_records(
    study: optuna.Study,
    space: Space,
    directory: Path,
    *,
    monitors: Sequence[str],
    search: Mapping[str, Any],
    storage: str | None = None,
    fanova: bool = True,
    shares: Mapping[str, Any] | None = None,
) -> None:
    """Write ``trials.csv`` and ``study.json`` into the study's directory, each atomically.

    Args:
        study: With trials in any state.
        space: What it searches.
        directory: Of the study.
        monitors: The metric of each objective.
        search: The resolved config of the search, kept in ``study.json``.
        storage: URL to open the study with; ``search["storage"]`` when left out. A password in it is not written.
        fanova: Whether to compute this importance too. It takes half a second with 100 trials and six seconds with
            500, so leave it out between the trials.
        shares: Importances, where they are of something else than the values.
    """
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    write_text(directory / "trials.csv", _table(trials, space, monitors))
    if storage is None:
        storage = search.get("storage")
    if isinstance(search.get("storage"), str):
        search = {**search, "storage": _without_password(search["storage"])}
    if shares is None:
        shares = _importances(study, space, monitors, fanova)
    write_json(
        directory / "study.json",
        {
            "name": study.study_name,
            "storage": _without_password(storage) if isinstance(storage, str) else None,
            "monitors": list(monitors),
            "directions": [direction.name.lower() for direction in study.directions],
            "search": search,
            "space": space.describe(),
            "best": pareto_front(study),
            "importances": shares,
            "totals": _totals(trials),
            "trials": [_record(trial) for trial in trials],
        },
    )


def _importances(study: optuna.Study, space: Space, monitors: Sequence[str], fanova: bool) -> dict[str, Any]:
    if len(monitors) == 1:
        return importances(study, space, fanova=fanova)
    return {
        monitor: importances(study, space, _lower_is_better(index, direction), fanova=fanova)
        for index, (monitor, direction) in enumerate(zip(monitors, study.directions, strict=True))
    }


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best COMPLETE trial, the first of equals, or with several objectives the Pareto front in order of numbers.

    Trials with a violated constraint do not count, nor do segments of population based training that others are longer
    than: their weights are not what the training ends with.

    Returns:
        An empty list when there is none.
    """
    if len(study.directions) > 1:
        return sorted(study.best_trials, key=lambda trial: trial.number)
    # study.best_trial leaves it to the storage which of equal trials it gives.
    better = _lower_is_better(0, study.direction)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [trial for trial in trials if all(value <= 0 for value in trial.constraints.values())]
    longest = max((trial.user_attrs.get("until", 0) for trial in feasible), default=0)
    feasible = [trial for trial in feasible if trial.user_attrs.get("until", 0) == longest]
    return sorted(feasible, key=lambda trial: (better(trial), trial.number))[:1]


def pareto_front(study: optuna.Study) -> list[int]:
    """The numbers of `best_trials`."""
    return [trial.number for trial in best_trials(study)]


def importances(
    study: optuna.Study,
    space: Space,
    target: Callable[[FrozenTrial], float] | None = None,
    *,
    fanova: bool = True,
) -> dict[str, dict[str, float]]:
    """How much of the values' differences each parameter explains, by two methods; the same at every call.

    ``ped_anova`` (Watanabe, Bansal and Hutter, *PED-ANOVA*, IJCAI 2023, https://arxiv.org/abs/2304.10255) compares the
    values of the best trials with those of all, and knows conditional parameters. ``fanova`` (Hutter, Hoos and
    Leyton-Brown, ICML 2014, http://proceedings.mlr.press/v32/hutter14.html) splits the variance that a random forest
    predicts, over the parameters that every COMPLETE trial has.

    Args:
        study: Needs `IMPORTANCE_TRIALS` COMPLETE trials with finite values.
        space: Whose parameters are asked for.
        target: What of a trial is explained, lower being better; the value of its one objective when left out.
        fanova: Whether to compute it.

    Returns:
        By method, shares in [0, 1] by name that sum to 1, the largest first. A method that cannot tell, because all
        values are equal or no parameter varied, is left out, and with too few trials both are.
    """
    # They bring scikit-learn, a second and a half that a search need not wait for when it starts.
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

    trials = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if all(map(math.isfinite, trial.values if target is None else (target(trial),)))
    ]
    if len(trials) < IMPORTANCE_TRIALS:
        return {}
    # Optuna asks for five trials or more among the best; its default of a tenth has one in ten trials.
    quantile = max(0.1, min(0.5, 5 / len(trials)))
    some = [name for name in space.parameters if any(name in trial.params for trial in trials)]
    found = {"ped_anova": _shares(study, PedAnovaImportanceEvaluator(target_quantile=quantile), some, target)}
    if fanova:
        every = [name for name in some if all(name in trial.params for trial in trials)]
        found["fanova"] = _shares(study, FanovaImportanceEvaluator(seed=0), every, target)
    return {method: shares for method, shares in found.items() if shares}


def _shares(
    study: optuna.Study,
    evaluator: "BaseImportanceEvaluator",
    names: list[str],
    target: Callable[[FrozenTrial], float] | None,
) -> dict[str, float]:
    if not names:
        return {}
    with warnings.catch_warnings():
        # PED-ANOVA tells each time that it takes low targets as good, as ours are; that a condition held in one trial
        # only, which it then leaves out; and that all trials are equally good, which ends in no shares here.
        for message in (".* computes the importances of params", "Some regimes for parameter", "Target and region"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        try:
            raw = evaluator.evaluate(study, names, target=target)
        except (ValueError, RuntimeError):  # fANOVA of equal values
            return {}
    total = math.fsum(raw.values())
    if not total > 0 or not math.isfinite(total):
        return {}
    return {name: float(raw[name] / total) for name in sorted(raw, key=lambda name: (-raw[name], names.index(name)))}


def _lower_is_better(index: int, direction: StudyDirection) -> Callable[[FrozenTrial], float]:
    sign = -1.0 if direction == StudyDirection.MAXIMIZE else 1.0
    return lambda trial: sign * float(trial.values[index])


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def _seconds(trial: FrozenTrial) -> float | None:
    seconds = trial.user_attrs.get("seconds")
    # A lost trial ends when somebody notices, which may be days after its worker died.
    if seconds is None and trial.duration is not None and not trial.user_attrs.get("lost"):
        seconds = trial.duration.total_seconds()
    return None if seconds is None else round(float(seconds), 3)


def _values(trial: FrozenTrial) -> list[float] | None:
    """Those of the objectives; a pruned trial has its last report, a failed one none."""
    return None if trial.values is None else [float(value) for value in trial.values]


def _table(trials: Sequence[FrozenTrial], space: Space, monitors: Sequence[str]) -> str:
    values = ["value"] if len(monitors) == 1 else [f"value_{monitor}" for monitor in monitors]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["number", "state", *values, "seconds", "reason", "epochs", "directory", "retry_of", *space.parameters]
    )
    for trial in trials:
        attributes = trial.user_attrs
        writer.writerow(
            [
                trial.number,
                trial.state.name,
                *(_values(trial) or ("",) * len(values)),
                _seconds(trial),
                attributes.get("reason", ""),
                attributes.get("epochs", 0),
                attributes.get("directory", ""),
                attributes.get("retry_of", ""),
                *(_cell(trial.params[name]) if name in trial.params else "" for name in space.parameters),
            ]
        )
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Text and numbers as they are; ``null``, ``true`` and ``false`` as in YAML, so that none looks like inactive."""
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def _state(trial: FrozenTrial) -> str:
    return "LOST" if trial.user_attrs.get("lost") else trial.state.name


def _totals(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    counts = Counter(_state(trial) for trial in trials)
    return {
        **{state: counts[state] for state in _STATES},
        "epochs": sum(int(trial.user_attrs.get("epochs", 0)) for trial in trials),
        "seconds": round(math.fsum(_seconds(trial) or 0.0 for trial in trials), 3),
    }


def _record(trial: FrozenTrial) -> dict[str, Any]:
    attributes = trial.user_attrs
    started, ended = trial.datetime_start, trial.datetime_complete
    return {
        "number": trial.number,
        "state": trial.state.name,
        "values": _values(trial),
        "reason": attributes.get("reason", ""),
        "seconds": _seconds(trial),
        "epochs": attributes.get("epochs", 0),
        "directory": attributes.get("directory", ""),
        "params": trial.params,
        "intermediate": [[step, value] for step, value in sorted(trial.intermediate_values.items())],
        "started": None if started is None else started.isoformat(timespec="seconds"),
        "ended": None if ended is None else ended.isoformat(timespec="seconds"),
        "lost": bool(attributes.get("lost", False)),
        "infeasible": bool(attributes.get("infeasible", False)),
        "retry_of": attributes.get("retry_of"),
        **{key: attributes[key] for key in ("member", "parent") if key in attributes},
        "metrics": attributes.get("metrics", {}),
    }
