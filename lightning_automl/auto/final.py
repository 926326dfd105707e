"""The last stages: final runs of several seeds, one model of them, and the test split, which is opened once.

Nothing before :func:`_open` asks for an image of the test split: seeds, the way of averaging, temperature, threshold
and what counts as unsure are decided by the validation split, and ``model.json`` is there before the test split is
opened.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_automl.auto.averaging import AVERAGED
from lightning_automl.auto.candidates import Candidate
from lightning_automl.auto.evaluated import weights_digest, write_predictions
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.runs import BUDGET, Job, Outcome, Runs
from lightning_automl.auto.shares import seconds_for
from lightning_automl.rundir import read_json, write_json
from lightning_automl.search.study import StudyFailed
from lightning_automl.studies.workers import Workers

if TYPE_CHECKING:
    from lightning_automl.auto.final_model import FinalModel
    from lightning_automl.results.ensemble import Ensemble

log = logging.getLogger("lightning_automl")

#: Names of the stages in the plan.
STAGE, EVALUATION = "final", "evaluation"
#: Images with class activation maps.
_MAPS = 12

#: Of the budget, by how much the final trainings may go beyond their time before they are stopped.
_GRACE = 0.05
#: Of the time that is left, what more seeds than planned may take.
_FURTHER = 0.85

_Seeds = dict[int, Outcome]


def finish(
    runs: Runs,
    workers: Workers,
    directory: Path,
    facts: Facts,
    plan: Mapping[str, Any],
    chosen: Candidate,
    simple: Candidate | None,
) -> Candidate:
    """Train the chosen candidate with several seeds, make one model of the runs and judge it on the test split.

    The simple candidate, if it is another one, is trained, put together and judged in the same way, for comparison.
    Both are trained on the data's own train split and the best epoch is that of the validation split. Where that has
    few images the last one counts, and each run does without another fold of train and validation together, so that all
    of them are trained on and each is judged by the runs that have not seen it.

    Seeds that do not fit into the time, and those that fail, are left out, with the reason. If all of the chosen one
    fail, the simple one is used, which ``evaluation.json`` says in ``instead_of``.

    What is left: ``model.json``, ``data.json``, ``predictions_val.safetensors``, ``predictions_test.safetensors``,
    ``activations.safetensors`` for networks that have such maps, and ``evaluation.json``, written last. The test split
    is opened once for all models; how often, and for which model, is in ``openings.json``: a model that a longer budget
    has changed opens it again, which is counted and told.

    Args:
        runs: Trains the runs; its clock counts the time of both stages.
        workers: Evaluate them.
        directory: Of the strategy.
        facts: What was seen of the data.
        plan: Says in ``final`` how many ``seeds``, and the metric.
        chosen: What is to be used.
        simple: What it is compared with, or None.

    Returns:
        The candidate that is used: the chosen one, or the simple one if no final run of that gave a model.

    Raises:
        StudyFailed: If no final run gave a model.
    """
    arms = [chosen, *([simple] if simple is not None and simple.key != chosen.key else [])]
    settings = directory / "config.yaml"
    seed = int((yaml.safe_load(settings.read_text()) if settings.exists() else {}).get("seed") or 0)
    with runs.clock.stage(STAGE):
        trained, left_out = _train(runs, directory, facts, plan, arms, seed)
    with runs.clock.stage(EVALUATION):
        models = _validate(workers, directory, facts, plan, arms, trained, left_out)
        fingerprint, used = _fingerprint(directory, models), models[0].candidate
        instead_of = None if used is chosen else {"key": chosen.key, "title": chosen.title}
        told = {"budget": plan["budget"], "left_out": left_out, "instead_of": instead_of}
        known = read_json(directory / "evaluation.json") or {}
        if known.get("fingerprint") == fingerprint:
            if known | told != known:
                write_json(directory / "evaluation.json", known | told)
            return used
        for name in ("evaluation.json", "predictions_test.safetensors", "activations.safetensors"):
            (directory / name).unlink(missing_ok=True)  # of a former model
        model = _settle(directory, facts, models[0])
        opened = _open(workers, directory, models, fingerprint)
        record = _judge(directory, plan, models, model) | {"folds": facts.final_folds}
        write_json(directory / "evaluation.json", {**record, **told, "opened": opened, "fingerprint": fingerprint})
        return used


# Training ----------------------------------------------------------------------------------------------------------


def _train(
    runs: Runs, directory: Path, facts: Facts, plan: Mapping[str, Any], arms: Sequence[Candidate], seed: int
) -> tuple[list[_Seeds], list[dict[str, Any]]]:
    """The runs of each arm that have given a network, by seed, and what was left out."""
    wanted = int(plan[STAGE]["seeds"])
    seeds, both = _affordable(runs, directory, facts, plan, arms, seed)
    if seeds < wanted or both < len(arms):
        only = "" if both == len(arms) else f", and {arms[1].title} was left out"
        runs.clock.cut(STAGE, f"{seeds} of {wanted} final seeds were trained{only}, for lack of time.")
    jobs = _jobs(facts, arms[:both], seeds, seed)
    # The first of each arm is begun in any case; what takes longer than the time is stopped, unless it is all there is.
    own_time = _left(runs, plan) + _GRACE * float(plan["budget"])
    several = runs.each(jobs, at_least=both, within=own_time, on_run=_tell)
    if all(each.reason == BUDGET for each in several):
        several = [*runs.each(jobs[:both], at_least=both, on_run=_tell), *several[both:]]
    if both < len(arms) and all(each.value is None for each in several):  # a simple model is better than none
        runs.clock.cut(STAGE, f"{seeds} of {wanted} final seeds were trained, for lack of time.")
        further = _jobs(facts, arms[1:], seeds, seed)
        jobs, several = jobs + further, several + runs.each(further, at_least=len(further), on_run=_tell)
    outcomes = {(job.candidate.key, job.seed): outcome for job, outcome in zip(jobs, several, strict=True)}
    found: list[_Seeds] = []
    left_out = []
    for arm in arms:
        found.append({})
        for own in range(seed, seed + max(wanted, seeds)):
            outcome = outcomes.get((arm.key, own))
            if outcome is not None and outcome.value is not None:
                found[-1][own] = outcome
            else:
                left_out.append(_left_out(arm, own, BUDGET if outcome is None else outcome.reason))
    return found, left_out


def _jobs(facts: Facts, arms: Sequence[Candidate], seeds: int, seed: int) -> list[Job]:
    """Final runs of each arm with so many seeds, the arms in turn; where images are few, each without another fold."""
    folds = facts.final_folds
    own = [folds[number % len(folds)] if folds else None for number in range(seeds)]
    return [Job(arm, fold, seed + number, final=True) for number, fold in enumerate(own) for arm in arms]


def _left_out(candidate: Candidate, seed: int, reason: str) -> dict[str, Any]:
    reason = "there was no time left for it" if reason == BUDGET else reason
    return {"key": candidate.key, "title": candidate.title, "seed": seed, "reason": reason}


def _left(runs: Runs, plan: Mapping[str, Any]) -> float:
    """Seconds for the final trainings."""
    return max(0.0, seconds_for(STAGE, plan, runs.clock))


def _tell(job: Job, outcome: Outcome) -> None:
    """How a final run ended."""
    came_to = f"{outcome.value:.4f}" if outcome.value is not None else outcome.reason
    log.info("final training: %s: %s (%.0f s)", job.title, came_to, outcome.seconds)


def _affordable(
    runs: Runs, directory: Path, facts: Facts, plan: Mapping[str, Any], arms: Sequence[Candidate], seed: int
) -> tuple[int, int]:
    """How many seeds of how many arms fit into the time; once decided, it stays so while the plan does.

    What former stages have left over goes into more of them than planned, up to ``most``.
    """
    path = directory / "final.json"
    question = {"budget": plan["budget"], "arms": [arm.key for arm in arms]}
    known = read_json(path) or {}
    if {key: known.get(key) for key in question} == question:
        return known["seeds"], known["trained_arms"]
    left = _left(runs, plan)

    def fits(seeds: int, both: int) -> bool:
        jobs = _jobs(facts, arms[:both], seeds, seed)
        return runs.wall_seconds(jobs) <= (left if seeds <= planned else _FURTHER * left)

    planned = int(plan[STAGE]["seeds"])
    several = range(max(planned, int(plan[STAGE].get("most", planned))), 0, -1)
    answer = next(((seeds, len(arms)) for seeds in several if fits(seeds, len(arms))), (1, 1))
    write_json(path, {**question, "seeds": answer[0], "trained_arms": answer[1]})
    return answer


# Validation --------------------------------------------------------------------------------------------------------


def _validate(
    workers: Workers,
    directory: Path,
    facts: Facts,
    plan: Mapping[str, Any],
    arms: Sequence[Candidate],
    trained: Sequence[_Seeds],
    left_out: list[dict[str, Any]],
) -> "list[FinalModel]":
    """The model of each arm that has one, the chosen one first; runs that cannot be evaluated are left out."""
    from lightning_automl.auto.final_model import put_together

    targets = [directory / "runs" / arm.key / AVERAGED for arm in arms]
    averages = [
        (target, [each.place for each in seeds.values()])
        for target, seeds in zip(targets, trained, strict=True)
        if len(seeds) > 1 and not facts.final_folds  # no image would be new to the mean of all weights
    ]
    places = [each.place for seeds in trained for each in seeds.values()]
    answer = _evaluated(workers, directory, "val", places, averages) if places else {"failed": {}, "averaged": []}
    models = []
    for arm, seeds, target in zip(arms, trained, targets, strict=True):
        reasons = {seed: answer["failed"].get(str(each.place.resolve())) for seed, each in seeds.items()}
        usable = {seed: each for seed, each in seeds.items() if reasons[seed] is None}
        left_out += [_left_out(arm, seed, reason) for seed, reason in reasons.items() if reason is not None]
        averaged = target if str(target.resolve()) in answer["averaged"] and len(usable) > 1 else None
        if usable:
            models.append(put_together(arm, usable, averaged, plan["metric"], plan["direction"]))
    if not models:
        causes = "; ".join(dict.fromkeys(each["reason"] for each in left_out))
        raise StudyFailed(f"no final run of {arms[0].title} gave a model: {causes}")
    if models[0].candidate is not arms[0]:
        log.warning("no final run of %s gave a model; %s is used", arms[0].title, models[0].candidate.title)
    return models


def _evaluated(
    workers: Workers,
    directory: Path,
    split: str,
    places: Sequence[Path],
    averages: Sequence[tuple[Path, Sequence[Path]]] = (),
    maps: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Let one process evaluate runs on a split; see :func:`~lightning_automl.auto.evaluation.evaluate`."""
    payload = {
        "do": "evaluate",
        "split": split,
        "directories": [str(place.resolve()) for place in places],
        "averages": [
            [str(target.resolve()), [str(each.resolve()) for each in members]] for target, members in averages
        ],
        "maps": maps,
    }
    name = {"val": "validation"}.get(split, split)
    return workers.do(f"the evaluation on the {name} split", payload, directory / "evaluation.txt")


def _settle(directory: Path, facts: Facts, model: "FinalModel") -> "Ensemble":
    """Write ``model.json``, ``data.json`` and the validation predictions: all that is decided by validation."""
    from lightning_automl.auto.operating import choose_threshold, choose_unsure_below
    from lightning_automl.results.ensemble import Ensemble
    from lightning_automl.results.network import what_was_trained
    from lightning_automl.results.run import Run

    run = Run.read(next(iter(model.seeds.values())).place)
    trained = what_was_trained(run)
    validated = model.predictions("val")
    two = len(trained.class_names) == 2
    ensemble = Ensemble(
        directory,
        [place.relative_to(directory).as_posix() for place in model.members],
        model.average,
        model.temperature,
        trained.class_names,
        trained.channels,
        trained.image_size,
        trained.window,
        choose_threshold(validated.probabilities[:, 1], validated.labels) if two else None,
        choose_unsure_below(validated.probabilities),
    )
    # Counts are those of the data's own splits, whichever fold the first run did without.
    write_json(directory / "data.json", run.data | {"counts": facts.counts})
    write_predictions(directory / "predictions_val.safetensors", validated)
    ensemble.write()
    log.info("%s: %s", model.candidate.title, model.why)
    return ensemble


# Test --------------------------------------------------------------------------------------------------------------


def _fingerprint(directory: Path, models: "Sequence[FinalModel]") -> str:
    """16 hexadecimal digits that change with anything that the test split is opened for."""
    facts = [
        {
            **{"average": model.average, "temperature": model.temperature},
            "weights": {
                place.relative_to(directory).as_posix(): weights_digest(place)
                for place in (*model.members, *(each.place for each in model.seeds.values()))
            },
        }
        for model in models
    ]
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _open(workers: Workers, directory: Path, models: "Sequence[FinalModel]", fingerprint: str) -> int:
    """Evaluate all models on the test split; return how often it was opened, this time included."""
    path = directory / "openings.json"
    openings: list[str] = read_json(path) or []
    if fingerprint not in openings:
        openings.append(fingerprint)
        write_json(path, openings)  # before: what was begun and killed is the same opening when it goes on
    if len(openings) > 1:
        log.warning(
            "the model is another one now, and the test split is opened again, %d times in all: the more often it was "
            "looked at, the less its scores say of new images",
            len(openings),
        )
    places = [place for model in models for place in (*model.members, *(each.place for each in model.seeds.values()))]
    maps = {
        "file": str((directory / "activations.safetensors").resolve()),
        "members": [str(place.resolve()) for place in models[0].members],
        "most": _MAPS,
    }
    answer = _evaluated(workers, directory, "test", list(dict.fromkeys(places)), maps=maps)
    if answer["failed"]:
        raise StudyFailed("; ".join(answer["failed"].values()))
    return len(openings)


def _judge(
    directory: Path, plan: Mapping[str, Any], models: "Sequence[FinalModel]", ensemble: "Ensemble"
) -> dict[str, Any]:
    """What ``evaluation.json`` says; writes the test predictions."""
    from lightning_automl.auto.judging import compare_models
    from lightning_automl.auto.operating import rates_at, sure_and_unsure
    from lightning_automl.metrics.scores import calibration_error

    model, *others = models
    raw = {split: model.predictions(split, calibrated=False) for split in ("val", "test")}
    found = {split: model.predictions(split) for split in ("val", "test")}
    write_predictions(directory / "predictions_test.safetensors", found["test"])
    threshold, below = ensemble.threshold, ensemble.unsure_below
    comparison = None
    if others:
        test = found["test"]
        comparison = compare_models(
            (model.candidate.title, others[0].candidate.title),
            (test.probabilities, others[0].predictions("test").probabilities),
            test.labels,
            test.groups,
            plan["metric"],
            plan["direction"],
            (len(model.seeds), len(others[0].seeds)),
        )
        log.info("%s", comparison["sentence"])
    calibration = {
        f"{split}_{when}": calibration_error(each[split].probabilities, each[split].labels)
        for split in ("val", "test")
        for when, each in (("before", raw), ("after", found))
    }
    return {
        "metric": plan["metric"],
        "models": {
            "chosen": model.record(directory),
            "simple": others[0].record(directory) if others else None,
        },
        "averaging": {"kind": model.average, "values": dict(model.values), "why": model.why},
        "temperature": model.temperature,
        "temperature_why": model.temperature_why,
        "calibration": calibration,
        "threshold": threshold,
        "at_threshold": None
        if threshold is None
        else {split: rates_at(threshold, each.probabilities, each.labels) for split, each in found.items()},
        "unsure": {
            "below": below,
            **{
                split: None if below is None else sure_and_unsure(each.probabilities, each.labels, below)
                for split, each in found.items()
            },
        },
        "comparison": comparison,
    }
