"""The command ``search`` with a ``method``: searches for an augmentation policy, which span many runs.

Whatever the method, what it finds is compared with the simple ways on folds that it has not seen, and ``policy.json``
is what this comparison says.
"""

import logging
import shlex
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lightning_automl.augment import Policy, TrivialAugment, load_policy, save_policy
from lightning_automl.results.policy_pictures import draw_pictures
from lightning_automl.results.run import Run
from lightning_automl.rundir import UserError, write_json, write_text
from lightning_automl.search.autoaugment import AutoAugmentSearch
from lightning_automl.search.fast_autoaugment import FastAutoAugmentSearch, sampler_maker
from lightning_automl.search.policies import PolicyMethod, PolicySpace, Scored, best_of, merged
from lightning_automl.search.spaces import Space
from lightning_automl.search_command import SearchCommand, counted
from lightning_automl.searching import Search, covering
from lightning_automl.studies.acceptance import SEARCHED, compare, policy_of, run_of
from lightning_automl.studies.configs import TrialConfigs, of_fold, with_policy
from lightning_automl.studies.files import StudyFiles
from lightning_automl.studies.policies import FoldSearches, fold_run, record_of_search
from lightning_automl.studies.progress import Pace, bar
from lightning_automl.studies.runs import directory_of
from lightning_automl.studies.workers import Workers

log = logging.getLogger("lightning_automl")

#: Arms of the comparison: no policy, TrivialAugment, the searched one.
_ARMS = 3


class _PolicySearch(SearchCommand):
    """What all searches for policies do with what they find."""

    artefacts: ClassVar[tuple[str, ...]] = (
        *("policy.json", "searched_policy.json", "best.yaml", "trials.csv", "policy_search.json", "study.json"),
        *("policy.png", "space.png"),
    )
    changeable: ClassVar[tuple[str, ...]] = tuple(key for key in SearchCommand.changeable if key != "retrain")

    @property
    def method(self) -> PolicyMethod:
        """How policies are searched."""
        assert self.config.method is not None
        return self.config.method

    @property
    def apart(self) -> int:
        """Number of folds that the search does not see."""
        return 0 if self.given.acceptance is None else int(self.given.acceptance.folds)

    def _check(self, scratch: Path) -> None:
        given = self.given
        for name in self.monitors:
            if name.startswith("test_"):
                raise UserError(f"monitor is {name}: a search must not see the test split; take its val_ metric")
            if name.startswith("train_"):
                raise UserError(
                    f"monitor is {name}: policies are compared by images that were not trained on; take its val_ metric"
                )
        arguments = (self.base.get("data") or {}).get("init_args") or {}
        if arguments.get("train_policy") is not None:
            raise UserError("the run has a train_policy of its own, which is what is searched for; leave it out there")
        for key in ("fold", "without_folds"):
            if arguments.get(key) not in (None, []):
                raise UserError(
                    f"the run has data.init_args.{key}, and the search cuts folds itself; leave it out there"
                )
        self.method.check(given.trials, given.folds)
        self.base |= {"monitor": self.monitors[0], "mode": self.directions[0].removesuffix("imize")}
        self.images = self._check_data(scratch)

    def _resolved(self) -> dict[str, Any]:
        kept = super()._resolved()
        arguments = kept["method"].get("init_args") or {}
        if "space" in arguments:  # its content: a file may change, or not be found from another folder
            arguments["space"] = self.method.space.to_dict()
        return kept

    def _check_data(self, scratch: Path) -> dict[str, Any]:
        """Build the run on the first fold, and on one of the comparison; what is known of its images."""
        space, folds = self.method.space, self.given.folds + self.apart
        built = [fold_run(self.base, scratch, space, 0, folds, range(self.given.folds, folds))]
        if self.apart:
            save_policy(TrivialAugment(space), policy_of(scratch, "trivial_augment"))
            built.append(run_of(self.base, scratch, "trivial_augment", folds - 1, folds, self.given.seed))
        try:
            found = self._ask(do="check", file=str(scratch / "check.yaml"), configs=[], built=built)
        except UserError as error:
            if f"{folds} folds" in str(error) and self.apart:
                parts = f"{self.given.folds} folds to search on and {counted(self.apart, 'fold')} to compare on"
                raise UserError(f"{parts} are {folds}: {error} in all") from error
            raise
        images: dict[str, Any] = found["images"][0]
        return images

    def _policies(self) -> PolicySpace:
        """What is gone through for the images at hand."""
        size = tuple(self.images.get("image_size", (1, 1)))
        return self.method.policies(self.images.get("channels", 3), (size[0], size[1]))

    def _keep_searched(self, policy: Policy) -> None:
        """Write the policy that was found; what was trained with one of fewer trials is put aside."""
        save_policy(policy, self.directory / "searched_policy.json")
        path = policy_of(self.directory, SEARCHED)
        if path.exists() and load_policy(path) != policy:
            former = self.directory / "superseded"
            former.mkdir(exist_ok=True)
            aside = former / f"searched-{len(list(former.iterdir())) + 1}"
            path.parent.rename(aside)
            log.info("more trials have found another policy; what was trained with the former one is in %s", aside)
        if self.apart:
            save_policy(policy, path)

    def _accept(self, policy: Policy, workers: Workers) -> dict[str, Any] | None:
        """Compare the searched policy, and write the one that is adopted; None if there is to be no comparison."""
        wanted = self.given.acceptance
        if wanted is None:
            log.warning("acceptance is null: the searched policy is taken without a comparison")
            save_policy(policy, self.directory / "policy.json")
            return None
        total = _ARMS * wanted.folds * wanted.seeds
        log.info("comparing on %s that the search has not seen: %s", counted(self.apart, "fold"), self._compared())
        pace = Pace(total)
        with bar("runs", total) as advance:

            def told(arm: str, fold: int, seed: int, value: float) -> None:
                pace.step()
                words = f"{arm}, fold {fold}, seed {seed}: {self.monitors[0]} {value:.4f}"
                log.info("%d/%d %s%s", pace.done, total, words, pace.left())
                advance(pace.done, words)

            record = compare(
                workers,
                self.base,
                self.directory,
                self.method.space,
                folds=range(self.given.folds, self.given.folds + self.apart),
                all_folds=self.given.folds + self.apart,
                seeds=range(self.given.seed, self.given.seed + wanted.seeds),
                metric=self.monitors[0],
                direction=self.directions[0],
                read=Run.read,
                on_run=told,
            )
        log.info("%s", record["sentence"])
        save_policy(load_policy(policy_of(self.directory, record["adopted"])), self.directory / "policy.json")
        return record

    def _record(self, kept: Iterable[Mapping[str, Any]], **further: Any) -> dict[str, Any]:
        """What ``policy_search.json`` says of any method."""
        acceptance = self.directory / "acceptance"
        stages = {name: self._cost(places) for name, places in self._stages().items()}
        compared = self._cost(sorted(acceptance.glob("*/fold-*")))
        searched = self.directory / "searched_policy.json"
        policy = load_policy(searched) if searched.exists() else None
        record = record_of_search(self.method, self.given.folds, self.given.trials, kept) | {
            "sub_policies": len(policy) if isinstance(policy, Policy) else 0,
            "seconds": {**{name: seconds for name, (_, seconds) in stages.items()}, "acceptance": compared[1]},
            "epochs": {**{name: epochs for name, (epochs, _) in stages.items()}, "acceptance": compared[0]},
        }
        return record | further

    @abstractmethod
    def _stages(self) -> dict[str, list[Path]]:
        """Directories of the runs of each stage before the comparison."""

    @staticmethod
    def _cost(places: Iterable[Path]) -> tuple[int, float]:
        """Epochs and seconds of runs."""
        epochs, seconds = 0, 0.0
        for place in places:
            if (place / "config.yaml").exists():
                run = Run.read(place)
                epochs += int(run.epochs[-1]["epoch"]) + 1 if run.epochs else 0
                seconds += float((run.summary or {}).get("seconds", 0.0))
        return epochs, round(seconds, 3)

    def _write_best(self) -> None:
        """Write the fit config with the policy that was adopted."""
        path = self.directory / "best.yaml"
        config = with_policy(self.base, self.directory / "policy.json")
        about = (
            f"The run with the policy that {type(self.method).__name__} has found, or the simple one that was better"
        )
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_text(path, f"# lightning-automl fit --config {shlex.quote(str(path))}\n# {about}\n{text}")

    def _workers(self, timeout: float | None) -> Workers:
        return Workers(
            self.server,
            self.slices,
            self.ranks,
            silence=self.config.silence,
            limit=self.config.limit,
            timeout=timeout,
        )

    def _metrics(self, acceptance: Mapping[str, Any] | None) -> dict[str, float]:
        """What the summary says: the metric of each arm on the held-out folds."""
        if acceptance is None:
            return {}
        adopted = acceptance["arms"][acceptance["adopted"]]["mean"]
        found = {f"{acceptance['metric']}_{name}": own["mean"] for name, own in acceptance["arms"].items()}
        return {acceptance["metric"]: adopted, **found}

    def _compared(self) -> str:
        wanted = self.given.acceptance
        if wanted is None:
            return "no comparison"
        total = _ARMS * wanted.folds * wanted.seeds
        return (
            f"{counted(total, 'run')} (no policy, TrivialAugment and the searched one, on "
            f"{counted(wanted['folds'], 'fold')} with {counted(wanted['seeds'], 'seed')})"
        )

    def _show_runs(self, runs: int) -> None:
        """Print how much is trained."""
        epochs = self.base["trainer"].get("max_epochs")
        if epochs and epochs > 0:
            print(f"{counted(runs, 'run')} of at most {counted(epochs, 'epoch')}: {runs * epochs:,} epochs")
        at_once, threads = counted(self.given.workers, "job"), counted(self.slices[0].threads, "thread")
        print(f"{at_once} at once, of {counted(self.ranks, 'process', 'processes')} with {threads} each")

    def _show_space(self) -> None:
        policies = self._policies()
        size = policies.size
        print(f"space {self.method.space.name}: {', '.join(policies.operations)}")
        shape = f"{policies.sub_policies} sub-policies of {counted(policies.length, 'operation')}"
        print(f"policies: {shape}{'' if size is None else f', {size:.2g} of them'}")

    def _compared_runs(self) -> int:
        wanted = self.given.acceptance
        return 0 if wanted is None else _ARMS * wanted.folds * wanted.seeds


class FastAutoAugment(_PolicySearch):
    """Fast AutoAugment: a network a fold, policies scored by it, the best of all merged and compared."""

    growing: ClassVar[tuple[str, ...]] = ("trials",)

    @property
    def method(self) -> FastAutoAugmentSearch:
        """How policies are searched."""
        assert isinstance(self.config.method, FastAutoAugmentSearch)
        return self.config.method

    def _check(self, scratch: Path) -> None:
        super()._check(scratch)
        self.config.sampler(self._policies().as_space(), self.base["trainer"])  # refuses its arguments
        sampler_maker(self.config.sampler_spec())  # refuses one that cannot go on after a kill

    def _show(self) -> None:
        given = self.given
        self._show_space()
        scored = given.folds * self.method.rounds * given.trials
        print(f"folds: {counted(given.folds, 'run')}, each without one of {given.folds} folds")
        print(
            f"density: {scored:,} policies scored, {given.trials} in each of {counted(self.method.rounds, 'round')} "
            f"on each fold; {self.method.keep} of each round are kept, at most "
            f"{given.folds * self.method.rounds * self.method.keep * self._policies().sub_policies:,} sub-policies"
        )
        print(f"acceptance: {self._compared()}")
        self._show_runs(given.folds + self._compared_runs())

    def _search(self, environment: Mapping[str, Any]) -> None:
        given = self.given
        if not (self.directory / "environment.json").exists():
            write_json(self.directory / "environment.json", environment)
        workers = self._workers(self.config.timeout)
        self.searches = FoldSearches(
            workers,
            self.base,
            self.directory,
            self.method,
            folds=given.folds,
            apart=self.apart,
            trials=given.trials,
            seed=given.seed,
            sampler=self.config.sampler_spec(),
        )
        with self._noting_failure(self._write):
            log.info(
                "%s, %d policies to score; then %s",
                counted(given.folds, "fold"),
                self.searches.evaluations,
                self._compared(),
            )
            self.searches.run()
            policy = self.searches.policy()
            self._keep_searched(policy)
            self._write()
            acceptance = self._accept(policy, workers)
            self._write(acceptance)
            self._write_best()
            draw_pictures(self.directory)
        self._finish(self._metrics(acceptance), 0, self.artefacts)

    def _write(self, acceptance: Mapping[str, Any] | None = None) -> None:
        """Write the table of trials and the record."""
        self.searches.write_table()
        found = self.searches.record()
        record = self._record(found.pop("kept"), **found | {"acceptance": acceptance})
        record["seconds"]["density"] = self.searches.density_seconds()
        write_json(self.directory / "policy_search.json", record)

    def _stages(self) -> dict[str, list[Path]]:
        return {"folds": [self.searches.place(fold) for fold in range(self.given.folds)]}


class _ChildConfigs(TrialConfigs):
    """Makes the config of a child: the run, on the first fold, trained with the policy of the trial's values."""

    policies: PolicySpace
    folds: int
    apart: range

    def trained(self, values: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The config to train with the policy of these values, which is written to the trial's ``policy.json``."""
        path = self.directory / attributes["directory"] / "policy.json"
        save_policy(self.policies.policy(values), path)
        config = with_policy(super().trained({}, attributes), path)
        return of_fold(config, 0, self.folds, self.apart)


class AutoAugment(_PolicySearch, Search):
    """AutoAugment: a study whose trials are children, each trained with a policy; the best are merged and compared.

    A child is trained on all folds that are searched on but the first, and scored by the monitored metric on the first.
    """

    def _check(self, scratch: Path) -> None:
        _PolicySearch._check(self, scratch)
        Search._check(self, scratch)

    def _space(self) -> Space:
        return self._policies().as_space()

    def _make_configs(self, watch: str | None, direction: str, directory: Path) -> TrialConfigs:
        configs = _ChildConfigs(self.base, self.space, watch, direction, directory)
        configs.policies = self._policies()
        configs.folds = self.given.folds + self.apart
        configs.apart = range(self.given.folds, configs.folds)
        return configs

    def _check_runs(self, scratch: Path) -> None:
        self.unchanged = None  # the run as it is has no policy, and so is not in the space
        child = self.configs.of_trial(covering(self.space, 1)[0], {"directory": directory_of(0)})
        self._ask(do="check", file=str(scratch / "check.yaml"), configs=[child], built=[])

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"apart": self.apart, "method": self.method.arguments()}

    def _folds(self) -> int | None:
        return None

    def _first(self) -> list[dict[str, Any]]:
        return []

    def _show(self) -> None:
        given = self.given
        self._show_space()
        print(
            f"trials: {counted(given.trials, 'run')}, each with a policy, without one of {given.folds} folds, on which "
            f"it is scored; the best {self.method.keep} are merged"
        )
        print(f"acceptance: {self._compared()}")
        self._show_runs(given.trials + self._compared_runs())

    def _results(self, files: StudyFiles) -> tuple[dict[str, float], int]:
        """Merge the best policies and compare what they make."""
        self._places = sorted((self.directory / "trials").glob("*"))
        best = self._best(files)
        policy = merged(self.method.policies(), best)
        self._keep_searched(policy)
        self._write(files, best, None)
        acceptance = self._accept(policy, self._workers(None))  # the time is that of the study
        self._write(files, best, acceptance)
        self._write_best()
        draw_pictures(self.directory)
        metrics = self._metrics(acceptance)
        return metrics or {self.monitors[0]: float(best[0].value or 0.0)}, 0

    def _best(self, files: StudyFiles) -> list[Scored]:
        trials = files.study.get_trials(deepcopy=False)
        scored = [Scored(trial.number, trial.params, trial.value) for trial in trials if trial.state.name == "COMPLETE"]
        return best_of(scored, self.method.keep, "maximize" if self.directions[0] == "maximize" else "minimize")

    def _write(self, files: StudyFiles, best: Iterable[Scored], acceptance: Mapping[str, Any] | None) -> None:
        kept = [{"fold": 0, "round": 0, "number": each.number, **self.method.entry(each)} for each in best]
        evaluations = sum(trial.state.is_finished() for trial in files.study.get_trials(deepcopy=False))
        record = self._record(kept, evaluations=evaluations, identity_values=[], acceptance=acceptance)
        write_json(self.directory / "policy_search.json", record)

    def _stages(self) -> dict[str, list[Path]]:
        return {"trials": self._places}


_COMMANDS: dict[type[PolicyMethod], Callable[..., SearchCommand]] = {
    FastAutoAugmentSearch: FastAutoAugment,
    AutoAugmentSearch: AutoAugment,
}


def command_of(method: PolicyMethod) -> Callable[..., SearchCommand]:
    """The command that searches by a method.

    Raises:
        UserError: If there is none for it.
    """
    for kind, command in _COMMANDS.items():
        if isinstance(method, kind):
            return command
    known = ", ".join(kind.__name__ for kind in _COMMANDS)
    raise UserError(f"no search is known for the method {type(method).__name__}; known: {known}, or a subclass of one")
