"""All stages in their order. What a stage has left in the directory is read and not made again."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_automl.auto.clock import Clock
from lightning_automl.auto.facts import Facts
from lightning_automl.durations import seconds_of
from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.report import report
from lightning_automl.rundir import (
    UserError,
    differences,
    lock,
    new_directory,
    read_json,
    remove_partial_files,
    summarise,
    write_json,
    write_text,
)
from lightning_automl.search.devices import slices, visible_gpus
from lightning_automl.search.trials import TrialServer
from lightning_automl.studies.runs import RANK
from lightning_automl.studies.workers import Workers, answer_of

if TYPE_CHECKING:
    from lightning_automl.auto.candidates import Candidate
    from lightning_automl.auto.runs import Runs
    from lightning_automl.auto.selection import Selection
    from lightning_automl.results import Predictor

log = logging.getLogger("lightning_automl")

#: Runs at once on a processor with many cores; more of them would each have fewer threads than they can use.
_MOST_WORKERS = 8

#: Metrics that may decide; all but the loss are to be large.
METRICS = ("val_auroc", "val_balanced_accuracy", "val_accuracy", "val_f1", "val_loss")

#: What may not change any more when a file is there, since that hangs on it.
_FIXED = {
    "look.json": ("auto", "modality", "image_size", "folds", "seed"),
    "measured.json": ("metric", "backbone", "weights"),
}


@dataclass(frozen=True)
class Result:
    """What :func:`auto` has left.

    Attributes:
        directory: Where everything is.
        status: ``finished``, or ``planned`` after a dry run.
        metrics: ``test_*`` and ``val_*`` of the chosen model, by name; empty after a dry run.
        plan: Which arms, folds, seeds and epochs, as ``plan.json`` has it.
    """

    directory: Path
    status: str
    metrics: Mapping[str, float]
    plan: Mapping[str, Any]

    def predictor(self) -> "Predictor":
        """What gives class probabilities for new images."""
        from lightning_automl.results import Predictor

        return Predictor(self.directory)


def auto(
    data: str | Path,
    *,
    budget: str | float = "3m",
    modality: str = "natural",
    directory: str | Path | None = None,
    metric: str | None = None,
    image_size: int | None = None,
    folds: int | None = None,
    backbone: str | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    dry_run: bool = False,
    log_to: Callable[[Path], None] = lambda path: None,
) -> Result:
    """From labelled images to a model and a report, within a time.

    The test split is set apart first. Arms, that is ways of training with fixed values, compete on folds of the rest;
    what is searched (hyper-parameters, an augmentation policy, an architecture) is adopted only if it beats the best of
    them on folds that no search has seen. The chosen one is trained with several seeds and averaged, calibrated on the
    validation split, and tested once.

    Killed at any moment, the same call with the same ``directory`` goes on and comes to the same model; with a larger
    ``budget`` it continues a finished one. It starts processes of its own, so that a script needs no
    ``if __name__ == "__main__"``.

    Args:
        data: ``digits``; a folder with one sub-folder a class, or ``train/ val/ test/`` above them, or with a
            ``labels.csv``; an ``.npz`` in the MedMNIST layout; or a YAML file with ``class_path`` and ``init_args`` of
            a data module.
        budget: Time for all, as ``90s``, ``30m``, ``2h`` or a number of seconds; at least about a minute.
        modality: ``natural``, ``radiograph``, ``histology``, ``dermoscopy``, or a YAML file with an operation space.
        directory: Where everything goes; a new ``runs/auto-N`` by default.
        metric: One of ``METRICS``, by which arms are judged; ``val_auroc`` for two classes and
            ``val_balanced_accuracy`` for more by default.
        image_size: Side in pixels that images of a folder are resized to.
        folds: Parts that train and validation images are cut into, 2 or more.
        backbone: Pretrained network, a name of torchvision or timm; ``efficientnet_lite0`` by default.
        weights: File with weights for the backbone.
        seed: Decides about everything random.
        workers: Runs at once; one a GPU, or one a core and at most 8, by default.
        dry_run: Look, measure and plan, and train nothing more.
        log_to: Called with the path of the log file as soon as there is a directory.

    Returns:
        What it has left.

    Raises:
        UserError: If the data, an argument or the directory do not allow it, or not even one epoch fits into the time.
        StudyFailed: If no arm could be trained.
    """
    started = time.monotonic()
    if metric is not None and metric not in METRICS:
        raise UserError(f"metric is {metric!r}; known: {', '.join(METRICS)}")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; give 1 or more")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; give 1 or more pixels")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; give 0 to {2**32 - 1}")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"there is no file {weights}; give the file with the weights of the backbone")
    given = {
        "auto": str(data),
        "budget": seconds_of("budget", budget),
        "modality": str(modality),
        "metric": metric,
        "image_size": image_size,
        "folds": folds,
        "backbone": backbone,
        "weights": None if weights is None else str(weights),
        "seed": seed,
        "workers": workers,
    }
    # Before the directory is made: it answers for a wrong path in an empty place.
    if directory is None:
        _check_data(str(data))
    place = (new_directory("auto") if directory is None else Path(directory)).resolve()  # as the trial server sees it
    _check_place(str(data), place)  # not later: even what is left of a refusal would be taken for a class
    with contextlib.ExitStack() as held:
        settings = _claim(place, given, held, keep=not dry_run)
        log_to(place / "log.txt")
        server = held.enter_context(TrialServer(RANK))
        clock = held.enter_context(Clock(place, settings["budget"], since=started))
        return _Strategy(place, settings, server, clock)(dry_run)


def _check_data(data: str) -> None:
    if data != "digits" and not Path(data).exists():
        raise UserError(f"there is no {data}; give digits, a folder of images, an .npz file or a YAML file")


def _check_place(data: str, place: Path) -> None:
    if data != "digits" and Path(data).is_dir():
        from lightning_automl.auto.look import check_place

        check_place({"path": str(Path(data).resolve())}, place)


def _claim(directory: Path, given: dict[str, Any], held: contextlib.ExitStack, keep: bool = True) -> dict[str, Any]:
    """Hold the directory, and write down what was asked for after a look whether it takes that.

    Args:
        directory: Of the strategy.
        given: What was asked for.
        held: Closes the lock.
        keep: Whether to write it down also if something was asked for before.
    """
    saved = directory / "config.yaml"
    before = yaml.safe_load(saved.read_text()) if saved.exists() else None
    if before is not None and not (isinstance(before, dict) and "auto" in before):
        raise UserError(f"{directory} is the directory of another command; give another --dir")
    strange = {path.name for path in directory.glob("[!.]*")} - {"log.txt"}
    if strange and before is None:
        raise UserError(
            f"{directory} is not a directory of auto and not empty (it holds {min(strange)}); give another --dir"
        )
    if not (directory / "look.json").exists():
        _check_data(given["auto"])
    held.enter_context(lock(directory))
    remove_partial_files(directory)
    fixed = {key for name, keys in _FIXED.items() if (directory / name).exists() for key in keys}
    for key, (old, new) in differences(before or given, given).items():
        if key == "budget" and new < old and (directory / "plan.json").exists():
            raise UserError(
                f"{directory} was started with a budget of {old:g} s, now it is {new:g} s; it can only grow"
            )
        if key in fixed:
            raise UserError(
                f"{directory} was started with {key}={old}, now it is {new}; give the former value to continue it, or "
                "another --dir to start anew"
            )
    if keep or before is None:
        write_text(saved, yaml.safe_dump(given, sort_keys=False))
    return given


class _Strategy:
    """One call of :func:`auto`, in a directory that is held."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], server: TrialServer, clock: Clock) -> None:
        self.directory = directory
        self.settings = settings
        self.server = server
        self.clock = clock
        gpus = visible_gpus()
        cores = len(os.sched_getaffinity(0))
        count = settings["workers"] or len(gpus) or min(cores, _MOST_WORKERS)
        # A run is one process, and would take all GPUs that it sees.
        self.workers = Workers(server, slices(count, 1, gpus[:count], cores), 1)
        self.count = count

    def __call__(self, dry: bool) -> Result:
        started = time.monotonic()
        finished = self._finished()
        if finished is not None:
            return finished
        if not dry:
            self._begin()
        with self._noting_failure(started):
            with self.clock.stage("look"):
                facts = self._look()
            metric = self.settings["metric"] or ("val_auroc" if facts.num_classes == 2 else "val_balanced_accuracy")
            with self.clock.stage("measure"):
                plan = self._plan(facts, metric, keep=not dry)
            if dry:
                log.info("nothing more was trained")
                return Result(self.directory, "planned", {}, plan)
            self._train(facts, plan)
        evaluation = read_json(self.directory / "evaluation.json")
        metrics = _metrics(evaluation)
        before = int((read_json(self.directory / "summary.json") or {}).get("test_opened", 0))
        (self.directory / "report.html").unlink(missing_ok=True)  # of a plan with a smaller budget, or of a failure
        summarise(
            self.directory,
            "auto",
            "finished",
            metrics=metrics,
            seconds=time.monotonic() - started,
            opened=int(evaluation["opened"]) - before,
            artefacts=self._artefacts(),
        )
        report(self.directory)
        return Result(self.directory, "finished", metrics, plan)

    def _finished(self) -> Result | None:
        """What an earlier call has left, if it was for as much time."""
        summary, plan = (read_json(self.directory / name) for name in ("summary.json", "plan.json"))
        if not summary or summary["status"] != "finished" or plan["budget"] < self.settings["budget"]:
            return None
        log.info("%s is finished; a larger budget would continue it", self.directory)
        if not (self.directory / "report.html").exists():
            report(self.directory)
        return Result(self.directory, "finished", summary["metrics"], plan)

    def _begin(self) -> None:
        """Until it ends again, what had been finished with a smaller budget is not, even if this is killed."""
        if (read_json(self.directory / "summary.json") or {}).get("status") == "finished":
            reason = "not finished: continued with a larger budget"
            summarise(self.directory, "auto", "failed", reason=reason)

    def _look(self) -> Facts:
        path = self.directory / "look.json"
        known = read_json(path)
        if known is not None and self.settings["auto"] == "digits":  # others may have changed since the last call
            return Facts.from_dict(known)
        modality = self.settings["modality"]
        payload = {
            "do": "look",
            "directory": str(self.directory.resolve()),
            "data": _absolute(self.settings["auto"]),
            "modality": modality if Path(modality).suffix not in (".yaml", ".yml") else _absolute(modality),
            "image_size": self.settings["image_size"] or _side(known),  # not another one for a larger budget
            **{key: self.settings[key] for key in ("folds", "budget", "seed")},
        }
        found = answer_of(self.server, payload)
        facts = Facts.from_dict(found["facts"])
        if known is not None and known["digest"] != facts.digest:
            raise UserError(
                f"the data are not those that {self.directory} was started with: images were added, removed, renamed "
                "or labelled otherwise, which changes the splits; restore them, or start anew in another --dir"
            )
        if known is None:
            write_json(self.directory / "environment.json", found["environment"])
            write_json(path, facts.to_dict())
        for note in facts.notes:
            log.info("%s", note)
        return Facts.from_dict(known or facts.to_dict())

    def _plan(self, facts: Facts, metric: str, *, keep: bool = True) -> dict[str, Any]:
        from lightning_automl.auto.arms import available
        from lightning_automl.auto.measure import measure
        from lightning_automl.auto.plan import make_plan

        path = self.directory / "plan.json"
        pretrained = {"backbone": self.settings["backbone"], "weights": _absolute(self.settings["weights"])}
        former = read_json(path)
        if former is not None and former["budget"] >= self.settings["budget"]:
            plan: dict[str, Any] = former
        else:
            arms, not_run = available(facts, **pretrained)
            measured = measure(
                self.workers,
                self.directory,
                facts,
                arms,
                not_run,
                metric=metric,
                seed=self.settings["seed"],
                budget=self.settings["budget"],
                **pretrained,
            )
            plan = make_plan(
                facts,
                measured,
                budget=self.settings["budget"],
                spent=self.clock.spent(),
                workers=self.count,
                metric=metric,
                former=former,
            )
            if keep or former is None:  # a dry run leaves what was done as it was
                self.clock.forget_cuts()
                write_json(path, plan)
        for sentence in plan["sentences"]:
            log.info("%s", sentence)
        return plan

    def _train(self, facts: Facts, plan: dict[str, Any]) -> None:
        """All that is trained: arms, what is searched, and the chosen one."""
        from lightning_automl.auto.arms import ARMS
        from lightning_automl.auto.final import finish
        from lightning_automl.auto.runs import Runs
        from lightning_automl.auto.selection import select

        runs = Runs(self.workers, self.directory, facts, plan, self.clock)
        arms = [ARMS[each["name"]] for each in plan["arms"]]
        with self.clock.stage("selection"):
            selection = select(runs, self.directory, facts, plan, arms, self.settings["seed"])
        chosen = self._adopted(runs, facts, plan, selection)
        used = finish(runs, self.workers, self.directory, facts, plan, chosen, selection.simple)
        self._keep_parts(used)

    def _adopted(self, runs: "Runs", facts: Facts, plan: dict[str, Any], selection: "Selection") -> "Candidate":
        """The best simple candidate, or what was searched if that has beaten it."""
        from lightning_automl.auto import architecture_arm, policy_arm
        from lightning_automl.auto.comparison import Challenger, best_challenger, compare

        seed, simple = self.settings["seed"], selection.simple
        challengers = []
        if selection.searched is not None:
            challengers.append(Challenger(selection.searched, "hyper-parameters"))
        leader = selection.searched or simple
        with self.clock.stage("policy_search"):
            policy = policy_arm.search_policy(self.workers, self.directory, facts, plan, leader, self.clock, seed=seed)
            if policy is not None:
                challengers.append(Challenger(policy_arm.challenger(self.directory, leader, policy), "policy"))
        with self.clock.stage("architecture_search"):
            genotype = architecture_arm.search_architecture(
                self.workers, self.directory, facts, plan, self.clock, seed=seed
            )
            if genotype is not None:
                found = architecture_arm.challenger(self.directory, plan, genotype, simple.policy)
                challengers.append(Challenger(found, "architecture"))
        with self.clock.stage("comparison"):
            choice = best_challenger(runs, plan, simple, challengers, seed=seed)
            candidate, kind = choice.challenger or (None, "")
            why = choice.sentence
            if not challengers and any(not each.default for each in selection.candidates.values()):
                why = "The tuned hyper-parameters did not outperform the defaults on the search folds"
            record = compare(runs, plan, facts, simple, candidate, kind, seed=seed, tried=choice.tried, why=why)
        write_json(self.directory / "comparison.json", record | {"challengers": choice.means})
        log.info("%s", record["sentence"])
        return candidate if candidate is not None and record["adopted"] == "searched" else simple

    def _keep_parts(self, chosen: "Candidate") -> None:
        """Leave the policy and the genotype of the chosen candidate where other commands take them from."""
        policy = chosen.config["data"]["init_args"].get("train_policy")
        if policy is not None:
            write_text(self.directory / "policy.json", Path(policy).read_text(encoding="utf-8"))
        genotype = chosen.config["model"]["init_args"]["model"]["init_args"].get("genotype")
        if genotype is not None:
            write_json(self.directory / "genotype.json", genotype)
        else:
            (self.directory / "genotype.json").unlink(missing_ok=True)  # of a plan with a smaller budget

    def _artefacts(self) -> dict[str, str]:
        names = {
            **{"model": "model.json", "plan": "plan.json", "evaluation": "evaluation.json", "trials": "trials.csv"},
            **{"policy": "policy.json", "genotype": "genotype.json"},
        }
        return {key: name for key, name in names.items() if (self.directory / name).exists()} | {
            "report": "report.html"
        }

    @contextlib.contextmanager
    def _noting_failure(self, started: float) -> Iterator[None]:
        """Leave in the summary, and in the report, why it did not come to its end."""
        try:
            yield
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_sentence(root_cause(error))
            with contextlib.suppress(OSError):  # the disk may be full, which is what is being reported
                summarise(self.directory, "auto", "failed", seconds=time.monotonic() - started, reason=reason)
            if (self.directory / "plan.json").exists() and not isinstance(error, KeyboardInterrupt):
                try:
                    report(self.directory)
                except Exception as other:  # the first one is told
                    log.debug("the report was not written: %s", other)
            raise


def _side(look: Mapping[str, Any] | None) -> int | None:
    """Of the squares that the images of a former look were brought to; None where nobody has chosen such a size."""
    if look is None or look["image_size"][0] != look["image_size"][1]:
        return None
    return int(look["image_size"][0])


def _absolute(path: str | None) -> str | None:
    """A path as the trial server finds it too, which may have been started elsewhere; what is no path as it is."""
    return str(Path(path).resolve()) if path is not None and path != "digits" and Path(path).exists() else path


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    chosen = evaluation["models"]["chosen"]
    return {
        f"{split}_{name.removeprefix(f'{split}_')}": value
        for split in ("val", "test")
        for name, value in (chosen[split] or {}).items()
    }
