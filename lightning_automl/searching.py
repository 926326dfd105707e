"""The command ``search``: a study over a fit config, whose trials are runs of their own.

Lightning is not imported here. Runs, and all that only LightningCLI knows of configs, are the business of the trial
server and ``trial.py``.
"""

import contextlib
import logging
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import yaml
from optuna.samplers import BruteForceSampler, GridSampler
from optuna.trial import TrialState

from lightning_automl.mistakes import ending, one_sentence, root_cause
from lightning_automl.process import messages, see_working_directory
from lightning_automl.results import report
from lightning_automl.rundir import (
    UserError,
    differences,
    flatten,
    lock,
    new_directory,
    read_json,
    remove_partial_files,
    summarise,
    write_json,
    write_text,
)
from lightning_automl.search.devices import slices, visible_gpus
from lightning_automl.search.pruners import hyperband_sentence
from lightning_automl.search.samplers import PopulationSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import StudyFailed, identifier, open_study, search
from lightning_automl.search.trials import TrialServer
from lightning_automl.search_config import SearchConfig, plain
from lightning_automl.studies.configs import TrialConfigs, of_fold, of_seed
from lightning_automl.studies.files import StudyFiles
from lightning_automl.studies.retrain import retrain, times_opened
from lightning_automl.studies.runs import COSTS, RANK, FitTrials, directory_of

log = logging.getLogger("lightning_automl")

#: Keys that may change when a search is continued; those of ``_GROWING`` may only grow.
_CHANGEABLE = ("timeout", "workers", "storage", "retrain", "hang_timeout", "trial_timeout")
_GROWING = ("trials", "epochs")

#: Keys of a run that may differ between the machines that share a study.
_LOCAL = (
    "data.init_args.path",
    "data.init_args.labels",
    "data.init_args.cache",
    "trainer.accelerator",
    "trainer.enable_progress_bar",
)


class Search:
    """One ``search`` command.

    Args:
        arguments: The command line behind ``search``.
        held: Closes what the command opens.
    """

    def __init__(self, arguments: Sequence[str], held: contextlib.ExitStack) -> None:
        self.held = held
        self.config = SearchConfig(arguments, held)
        self.given = self.config.given
        self.space = self.config.space

    def __call__(self, log_to: Callable[[Path], None]) -> None:
        """Search, and leave in the directory what was found."""
        given = self.given
        scratch = Path(self.held.enter_context(tempfile.TemporaryDirectory()))
        gpus = visible_gpus()
        self.server = self.held.enter_context(TrialServer(RANK))
        if given.dir is not None and not self.config.dry:
            self._claim(Path(given.dir), log_to)
        resolved = self._ask(
            scratch,
            do="resolve",
            arguments=self.config.run_arguments,
            monitors=self.config.monitors,
            gpus=len(gpus) // given.workers,
            seed=given.seed,
        )
        self.base: dict[str, Any] = resolved["config"]
        self.monitors: list[str] = resolved["monitors"]
        self.directions = self.config.directions(resolved["directions"])
        self.ranks: int = resolved["ranks"]
        watch = next((name for name in self.monitors if name not in COSTS), None)
        self.configs = TrialConfigs(
            self.base,
            self.space,
            watch,
            self.directions[self.monitors.index(watch)] if watch else "maximize",
            scratch if given.dir is None else Path(given.dir),
            scheduled=self.config.is_sampler(PopulationSampler),
        )
        on_gpu = self.base["trainer"]["accelerator"] != "cpu"
        self.slices = slices(given.workers, self.ranks, gpus if on_gpu else (), _cores())
        self.sampler = self.config.sampler(self.base["trainer"])
        self.pruner = self.config.pruner(self.directions, self.sampler)
        if self.pruner is not None and (sentence := hyperband_sentence(self.pruner)):
            log.warning("%s", sentence)
        base = self.configs.of_trial({}, {})
        built = [base if given.folds is None else of_fold(base, 0, given.folds)]
        if given.retrain:
            built.append(of_seed(base, given.seed))
        _check_paths(self.base, self.space)
        unchanged = self.space.values_in(self.base)
        sampled = [self.configs.of_trial(values, {}) for values in (unchanged, *_covering(self.space))]
        found = self._ask(scratch, do="check", file=str(scratch / "check.yaml"), configs=sampled, built=built)
        self.unchanged = self._unchanged(unchanged, differences(base, found["resolved"][0]))
        if self.config.dry:
            self._show()
            return
        if given.dir is None:
            self._claim(new_directory(self.config.name), log_to)
            self.configs.directory = self.directory
        self._settle()
        self._search(resolved["environment"])

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

    def _ask(self, scratch: Path, **payload: Any) -> dict[str, Any]:
        """Let a process of the trial server answer; its mistakes are the user's."""
        log_file = scratch / "server.txt"
        found = self.server.run(payload, ranks=1, threads=1, log=log_file, on_message=lambda message: None)
        if found.kind == "done":
            assert found.result is not None
            return found.result
        if found.exception in ("UserError", "MisconfigurationException"):
            raise UserError(found.reason)
        tail = log_file.read_text(errors="replace")[-2000:] if log_file.exists() else ""
        raise RuntimeError(f"{found.reason}\n{tail}")

    def _claim(self, directory: Path, log_to: Callable[[Path], None]) -> None:
        """Hold the directory for this command, and open the storage."""
        saved = directory / "config.yaml"
        if saved.exists() and "space" not in (yaml.safe_load(saved.read_text()) or {}):
            raise UserError(f"{directory} is the directory of a run, not of a search; give another --dir")
        strange = {path.name for path in directory.glob("[!.]*")} - {"log.txt", "study.db"}
        if strange and not saved.exists():
            raise UserError(
                f"{directory} is not the directory of a search and not empty (it holds {min(strange)}); "
                "give another --dir"
            )
        self.held.enter_context(lock(directory))
        remove_partial_files(directory)
        self.directory = directory
        log_to(directory / "log.txt")
        self.storage, self.url = open_storage(self.given.storage, directory)

    def _resolved(self) -> dict[str, Any]:
        """The search as it is kept: with the whole run, without the directory."""
        kept = {key: value for key, value in plain(self.given).items() if key not in ("config", "dir")}
        if kept["storage"] is not None:
            kept["storage"] = self.url  # without a password
        return kept | {
            "run": self.base,
            "monitor": self.monitors,
            "direction": self.directions,
            "name": self.config.name,
        }

    def _settle(self) -> None:
        """Write down what the search is, after looking whether the directory takes it."""
        saved = self.directory / "config.yaml"
        now = yaml.safe_load(yaml.safe_dump(self._resolved()))
        if saved.exists():
            for key, (old, new) in differences(yaml.safe_load(saved.read_text()), now).items():
                if key in _GROWING and (new is None or (old is not None and new >= old)):
                    continue
                if key in _GROWING:
                    raise UserError(
                        f"{self.directory} was started with {key}={old}, now it is {new}; limits can only grow"
                    )
                if key.split(".")[0] not in _CHANGEABLE:
                    raise UserError(
                        f"{self.directory} was started with {key}={old}, now it is {new}; give the former value to "
                        "continue it, or another --dir to start anew"
                    )
        write_text(saved, yaml.safe_dump(now, sort_keys=False))

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
        started = time.monotonic()
        run = {key: value for key, value in flatten(self.base).items() if key not in _LOCAL}
        study, made = open_study(
            self.config.name,
            self.storage,
            self.directions,
            self.sampler,
            self.pruner,
            space=self.space,
            identity={"monitors": self.monitors, "folds": given.folds, "run": run},
        )
        trials = study.get_trials(deepcopy=False)
        existing = len(trials)
        if not made:
            others = not existing or any(trial.state == TrialState.RUNNING for trial in trials)
            study.sampler = self.config.sampler(
                self.base["trainer"], existing, f"{platform.node()} {os.getpid()}" if others else ""
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
            folds=given.folds,
            silence=self.config.silence,
            limit=self.config.limit,
        )
        files = StudyFiles(
            study, self.configs, self.directory, self.monitors, self.record(), self.url, self._expected_trials()
        )
        try:
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
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_sentence(root_cause(error))
            seconds = time.monotonic() - started
            with contextlib.suppress(OSError):  # the disk may be full, which is what is being reported
                summarise(self.directory, "search", "failed", seconds=seconds, reason=reason)
            try:
                files.write(final=False)
                if isinstance(error, StudyFailed):
                    report(self.directory)
            except Exception as other:  # the first one is told
                log.debug("the tables were not written: %s", other)
            raise
        names = ("best.yaml", "trials.csv", "study.json", "retrain.json", "report.html")
        left = {Path(name).stem: name for name in names if (self.directory / name).exists() or name == "report.html"}
        summarise(
            self.directory,
            "search",
            "finished",
            metrics=metrics,
            seconds=time.monotonic() - started,
            opened=opened,
            artefacts=left,
            forget="test_",
        )
        report(self.directory)

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
            f"{' or '.join(limits) or 'all of the space'}; {_counted(given.workers, 'trial')} at once, of "
            f"{_counted(self.ranks, 'process', 'processes')} with {_counted(self.slices[0].threads, 'thread')} each"
        )
        return f"{told}; {_counted(existing, 'trial')} before" if existing else told

    def _show(self) -> None:
        """Print three configs as they would be tried."""
        study = optuna.create_study(sampler=self.sampler if not self.config.is_sampler(PopulationSampler) else None)
        for number in range(3):
            values = self.space.suggest(study.ask())
            print(f"# config {number}: {', '.join(f'{name}={value}' for name, value in values.items())}")
            for key, (_, value) in differences(self.configs.trained({}, {}), self.configs.trained(values, {})).items():
                print(f"{key}: {yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}")
            print()
        print("nothing was trained")


def _counted(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


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


def _covering(space: Space) -> list[dict[str, Any]]:
    """Few sampled values in which every name and every choice of the space occurs, as far as sampling finds them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: set[tuple[str, Any]] = set()
    found = []
    for _ in range(300):
        values = space.suggest(study.ask())
        # A number of a range stands for all, a choice for itself.
        now = {(name, repr(value) if isinstance(value, str | bool | None) else "") for name, value in values.items()}
        if not now <= seen:
            seen |= now
            found.append(values)
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def run(arguments: list[str]) -> int:
    """Run the command and return its exit status: 0 done, 1 it failed, 2 a mistake in what was given."""
    see_working_directory()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # CmaEsSampler warns at each conditional parameter
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        with messages() as log_to, contextlib.ExitStack() as held:
            Search(arguments[1:], held)(log_to)
    except SystemExit as error:  # --help
        return int(error.code or 0)
    except StudyFailed as error:
        print(f"lightning-automl: {error}", file=sys.stderr)
        return 1
    except BaseException as error:
        status, sentence = ending(error)
        print(sentence, file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
