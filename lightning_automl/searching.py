"""The command ``search``: a study over a fit config, whose trials are runs of their own.

Lightning is not imported here. Runs, and all that only LightningCLI knows of configs, are the business of the trial
server and ``trial.py``.
"""

import contextlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import optuna
import yaml
from optuna.samplers import BruteForceSampler, GridSampler
from optuna.trial import TrialState

from lightning_automl.process import exit_status, messages, see_working_directory
from lightning_automl.rundir import (
    UserError,
    differences,
    flatten,
    read_json,
    write_json,
)
from lightning_automl.search.pruners import hyperband_sentence
from lightning_automl.search.samplers import PopulationSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import identifier, open_study, search
from lightning_automl.search.trials import TrialServer
from lightning_automl.search_command import SearchCommand, counted
from lightning_automl.search_config import SearchConfig, plain
from lightning_automl.studies.configs import TrialConfigs, of_fold, of_seed
from lightning_automl.studies.files import StudyFiles
from lightning_automl.studies.retrain import retrain, times_opened
from lightning_automl.studies.runs import COSTS, RANK, FitTrials, directory_of

log = logging.getLogger("lightning_automl")

#: Keys of a run that may differ between the machines that share a study.
_LOCAL = (
    "data.init_args.path",
    "data.init_args.labels",
    "data.init_args.cache",
    "trainer.accelerator",
    "trainer.enable_progress_bar",
)


class Search(SearchCommand):
    """A study over a fit config."""

    #: Files that it leaves.
    artefacts: ClassVar[tuple[str, ...]] = ("best.yaml", "trials.csv", "study.json", "retrain.json")

    def _check(self, scratch: Path) -> None:
        self.space = self._space()
        watch = next((name for name in self.monitors if name not in COSTS), None)
        self.configs = self._make_configs(
            watch, self.directions[self.monitors.index(watch)] if watch else "maximize", scratch
        )
        self.sampler = self.config.sampler(self.space, self.base["trainer"])
        self.pruner = self.config.pruner(self.directions, self.sampler)
        if self.pruner is not None and (sentence := hyperband_sentence(self.pruner)):
            log.warning("%s", sentence)
        self._check_runs(scratch)

    def _space(self) -> Space:
        """What is varied."""
        return self.config.space

    def _make_configs(self, watch: str | None, direction: str, directory: Path) -> TrialConfigs:
        return TrialConfigs(
            self.base,
            self.space,
            watch,
            direction,
            directory,
            scheduled=self.config.is_sampler(PopulationSampler),
        )

    def _check_runs(self, scratch: Path) -> None:
        """Read configs of all kinds that may be tried, and build one."""
        given = self.given
        base = self.configs.of_trial({}, {})
        built = [base if given.folds is None else of_fold(base, 0, given.folds)]
        if given.retrain:
            built.append(of_seed(base, given.seed))
        _check_paths(self.base, self.space)
        unchanged = self.space.values_in(self.base)
        sampled = [self.configs.of_trial(values, {}) for values in (unchanged, *covering(self.space))]
        found = self._ask(do="check", file=str(scratch / "check.yaml"), configs=sampled, built=built)
        self.unchanged = self._unchanged(unchanged, differences(base, found["resolved"][0]))

    def _unchanged(self, values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values of the run as it is, or None if the space does not contain them."""
        missing = [
            name
            for name, parameter in self.space.parameters.items()
            if name not in values and parameter.active(values, self.space.parameters)
        ]
        # One class may have a short and a long path.
        changes = {
            key: pair
            for key, pair in changes.items()
            if not (key.endswith("class_path") and len({str(each).rsplit(".", 1)[-1] for each in pair}) == 1)
        }
        if not missing and not changes:
            return values
        where = ", ".join(missing) or next(iter(changes))
        log.info("the run as it is lies outside of the space (%s) and is not tried", where)
        return None

    def _claim(self, directory: Path, log_to: Callable[[Path], None]) -> None:
        super()._claim(directory, log_to)
        self.storage, self.url = open_storage(self.given.storage, directory)

    def _resolved(self) -> dict[str, Any]:
        kept = super()._resolved()
        if kept["storage"] is not None:
            kept["storage"] = self.url  # without a password
        return kept

    def _check_study(self, study: optuna.Study, environment: Mapping[str, Any]) -> None:
        """Refuse a directory that has trials of another study; their numbers would be taken for this one's."""
        path = self.directory / "environment.json"
        kept = read_json(path)
        if kept is None:
            write_json(path, {**environment, "command": sys.argv, "study": identifier(study)})
        elif kept.get("study") != identifier(study):
            raise UserError(
                f"{self.directory} holds trials of another study than {self.config.name!r} in {self.url}; give the "
                "former --storage, or another --dir"
            )

    def _search(self, environment: Mapping[str, Any]) -> None:
        given = self.given
        self.configs.directory = self.directory
        study, made = open_study(
            self.config.name,
            self.storage,
            self.directions,
            self.sampler,
            self.pruner,
            space=self.space,
            identity=self._identity(),
        )
        trials = study.get_trials(deepcopy=False)
        existing = len(trials)
        if not made:
            others = not existing or any(trial.state == TrialState.RUNNING for trial in trials)
            study.sampler = self.config.sampler(
                self.space, self.base["trainer"], existing, f"{platform.node()} {os.getpid()}" if others else ""
            )
        self._check_study(study, environment)
        log.info("study %r in %s", self.config.name, self.url)
        log.info("%s", self._plan(existing))
        score = FitTrials(
            self.server,
            self.configs,
            self.directory,
            self.monitors,
            self.slices,
            self.ranks,
            folds=self._folds(),
            silence=self.config.silence,
            limit=self.config.limit,
        )
        files = StudyFiles(
            study, self.configs, self.directory, self.monitors, self.record(), self.url, self._expected_trials()
        )
        with self._noting_failure(lambda: files.write(final=False)):
            with files:
                search(
                    study,
                    self.space,
                    score,
                    trials=given.trials,
                    epochs=given.epochs,
                    timeout=self.config.timeout,
                    workers=given.workers,
                    enqueue=self._first(),
                    directory_of=directory_of,
                    on_change=files.changed,
                )
            files.write()
            metrics, opened = self._results(files)
        self._finish(metrics, opened, self.artefacts)

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for all who join the study, besides its space."""
        run = {key: value for key, value in flatten(self.base).items() if key not in _LOCAL}
        return {"monitors": self.monitors, "folds": self.given.folds, "run": run}

    def _folds(self) -> int | None:
        """Over how many folds a trial is the mean."""
        folds: int | None = self.given.folds
        return folds

    def _results(self, files: StudyFiles) -> tuple[dict[str, float], int]:
        """What the best trial came to, and if asked for its retrained runs; and how often these open the test split."""
        best = files.best()
        metrics: dict[str, float] = {}
        if best and len(self.monitors) == 1:
            metrics = {self.monitors[0]: best[0].values[0]}
        if not self.given.retrain or not best:
            return metrics, 0
        found = retrain(
            self.server,
            files.config_of(best[0]),
            self.directory,
            range(self.given.seed, self.given.seed + self.given.retrain),
            self.slices,
            self.ranks,
            trial=best[0].number,
            silence=self.config.silence,
        )
        metrics |= {name: value["mean"] for name, value in found["metrics"].items()}
        before = int((read_json(self.directory / "summary.json") or {}).get("test_opened", 0))
        return metrics, times_opened(self.directory) - before

    def _expected_trials(self) -> int | None:
        trials: int | None = self.given.trials
        if isinstance(self.sampler, PopulationSampler) and trials is None:
            return self.sampler.population * self.sampler.total // self.sampler.ready
        return trials

    def record(self) -> dict[str, Any]:
        """What ``study.json`` says of the search."""
        return self._resolved() | {"enqueued_default": self.given.enqueue is None and bool(self._first())}

    def _first(self) -> list[dict[str, Any]]:
        """The values to try first."""
        if self.given.enqueue is None:
            # A grid comes to it by itself.
            left_out = self.config.is_sampler(GridSampler) or self.config.is_sampler(BruteForceSampler)
            return [] if left_out or self.unchanged is None else [self.unchanged]
        default = self.space.values_in(self.base)
        return [self.space.encode(values) if values else default for values in map(plain, self.given.enqueue)]

    def _plan(self, existing: int) -> str:
        given = self.given
        limits = [f"{given[key]} {key}" for key in ("trials", "epochs") if given[key]]
        limits += [f"{given.timeout} of time"] if self.config.timeout else []
        told = (
            f"{' or '.join(limits) or 'all of the space'}; {counted(given.workers, 'trial')} at once, of "
            f"{counted(self.ranks, 'process', 'processes')} with {counted(self.slices[0].threads, 'thread')} each"
        )
        return f"{told}; {counted(existing, 'trial')} before" if existing else told

    def _show(self) -> None:
        study = optuna.create_study(sampler=self.sampler if not self.config.is_sampler(PopulationSampler) else None)
        for number in range(3):
            values = self.space.suggest(study.ask())
            print(f"# config {number}: {', '.join(f'{name}={value}' for name, value in values.items())}")
            for key, (_, value) in differences(self.configs.trained({}, {}), self.configs.trained(values, {})).items():
                print(f"{key}: {yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}")
            print()


def _check_paths(base: Mapping[str, Any], space: Space) -> None:
    """Refuse a path that leads nowhere in the run; arguments of classes are left to the parser, which knows them."""
    for name, parameter in space.parameters.items():
        place: Any = base
        for key in parameter.keys:
            if not isinstance(place, Mapping):
                break  # an element of a list, or within a value that another one replaces
            wrong = key not in ("class_path", "init_args", "dict_kwargs") if "class_path" in place else place is base
            if key not in place and wrong:
                keys = list(flatten(base))
                last = parameter.path.rsplit(".", 1)[-1]
                near = [each for each in keys if each.endswith(f".{last}")] or get_close_matches(
                    parameter.path, keys, 2
                )
                hint = f"; did you mean {' or '.join(near[:2])}?" if near else ""
                without = "; a name without path: is the path itself" if name == parameter.path else ""
                raise UserError(f"space: {parameter.path} is no key of the run{hint}{without}")
            place = place.get(key)


def covering(space: Space, draws: int = 300) -> list[dict[str, Any]]:
    """Few sampled values in which every name and choice of the space occurs, as far as so many draws find them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: set[tuple[str, Any]] = set()
    found = []
    for _ in range(draws):
        values = space.suggest(study.ask())
        # A number of a range stands for all, a choice for itself.
        now = {(name, repr(value) if isinstance(value, str | bool | None) else "") for name, value in values.items()}
        if not now <= seen:
            seen |= now
            found.append(values)
    return found


def run(arguments: list[str]) -> int:
    """Run the command and return its exit status: 0 done, 1 it failed, 2 a mistake in what was given."""
    see_working_directory()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # CmaEsSampler warns at each conditional parameter

    def act() -> None:
        with messages() as log_to, contextlib.ExitStack() as held:
            config = SearchConfig(arguments[1:], held)
            kind: Callable[..., SearchCommand] = Search
            if config.method is not None:  # policies are made of tensors, and other searches do without torch
                from lightning_automl.policy_searching import command_of

                kind = command_of(config.method)
            kind(config, held.enter_context(TrialServer(RANK)), held)(log_to)

    return exit_status(act)
