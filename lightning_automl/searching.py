"""The command ``search``: a study over a fit config, whose trials are runs of their own.

Lightning is not imported here. Runs, and all that only LightningCLI knows of configs, are the business of the trial
server and ``trial.py``.
"""

import contextlib
import logging
import os
import platform
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

import jsonargparse
import optuna
import yaml
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, QMCSampler, TPESampler
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
from lightning_automl.search.pruners import check_pruner, hyperband_sentence
from lightning_automl.search.samplers import GroupwiseSampler, PopulationSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import open_storage
from lightning_automl.search.study import StudyFailed, derived_seed, identifier, open_study, search
from lightning_automl.search.trials import TrialServer
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

#: Keys of a run by which the search gives trials their processes and devices.
_NOT_SEARCHED = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator")

#: What the sampler is told by the search, and so does not have to be given.
_FILLED = {"search_space", "total"}


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="lightning-automl search",
        description="Search over a fit config. Keys of the run itself are given as --run.<dotted key>; --dry-run shows "
        "three sampled configs and trains nothing.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    time = str | float | None
    # Without types of its values: jsonargparse would import what a class_path in a dict[str, Any] names, and fill in
    # the arguments that are left out.
    plain: Any = dict
    keys: dict[str, tuple[Any, Any, str]] = {
        "dir": (str | None, None, "Where everything goes; a new runs/NAME-N by default."),
        "run": (str | plain | None, None, "The fit config that is varied: a file, or the config itself."),
        "monitor": (
            str | list[str] | None,
            None,
            "What to search for: metrics, parameters, flops, latency (ms); the run's monitor by default.",
        ),
        "direction": (str | list[str] | None, None, "minimize or maximize, one a monitor; by their names by default."),
        "trials": (int | None, None, "Trials in all, over all machines."),
        "epochs": (int | None, None, "Epochs in all, over all machines."),
        "timeout": (time, None, "Time for this command, as 90s, 30m or 2h."),
        "space": (plain | str | None, None, "What is varied, by name or dotted path; or a file that says it."),
        "enqueue": (
            list[plain] | None,
            None,
            "Values to try first, by name; {} is the unchanged run, which is the default. [] for none.",
        ),
        "folds": (int | None, None, "A trial is the mean over so many folds, and is pruned after a fold."),
        "seed": (int, 0, "Of the sampler."),
        "name": (str | None, None, "Of the study; that of the config file by default."),
        "storage": (
            str | None,
            None,
            "URL: postgresql://..., grpc://HOST:PORT, journal:FILE, sqlite:///FILE; by default DIR/study.db.",
        ),
        "workers": (int, 1, "Trials at once on this machine."),
        "retrain": (int, 0, "Train the best config on train and val with so many seeds, and open the test split."),
        "hang_timeout": (time, "10m", "A trial of which a process gives no sign of life for so long is killed."),
        "trial_timeout": (time, None, "A trial that takes longer is killed."),
    }
    parser.add_argument("--config", action="config", help="A search config.")
    for key, (kind, default, text) in keys.items():
        parser.add_argument(f"--{key}", type=kind, default=default, help=text)
    parser.add_subclass_arguments(
        BaseSampler, "sampler", skip=_FILLED, required=False, help="Any of Optuna's or ours; TPESampler by default."
    )
    parser.add_subclass_arguments(BasePruner, "pruner", required=False, help="Any of Optuna's; none by default.")
    return parser


class Search:
    """One ``search`` command.

    Args:
        arguments: The command line behind ``search``.
        held: Closes what the command opens.
    """

    def __init__(self, arguments: Sequence[str], held: contextlib.ExitStack) -> None:
        self.held = held
        own, self.overrides = _split(arguments)
        self.dry = "--dry-run" in own
        own = _with_saved_config([each for each in own if each != "--dry-run"])
        self.parser = _parser()
        try:
            self.given = self.parser.parse_args(own)
        except jsonargparse.ArgumentError as error:
            sentence = one_sentence(error, self.parser)
            if re.match(r"unknown key '(model|data|trainer)\.", sentence):
                sentence = f"this is a fit config ({sentence.split(';')[0]}); name it under run: in a search config"
            raise UserError(sentence) from error
        given = self.given
        files = [Path(str(path)) for path in given.config or []]
        if given.run is None and not files and given.dir is not None:
            raise UserError(f"there is no search in {given.dir}; give a search config by --config")
        if given.run is None:
            raise UserError("a search needs the fit config that it varies; give it as run: in the search config")
        if not given.space:
            raise UserError("the space is empty; name at least one value of the run to vary under space:")
        if given.workers < 1:
            raise UserError(f"workers is {given.workers}; it must be 1 or more")
        if given.folds is not None and given.folds < 2:
            raise UserError(f"folds is {given.folds}; it must be 2 or more")
        if given.retrain < 0:
            raise UserError(f"retrain is {given.retrain}; give the number of seeds, or 0 for none")
        for key in ("trials", "epochs"):
            if given[key] is not None and given[key] < 1:
                raise UserError(f"{key} is {given[key]}; it must be 1 or more")
        for each in _as_list(given.direction):
            if each not in ("minimize", "maximize"):
                raise UserError(f"unknown direction {each!r}; known: minimize, maximize")
        if given.storage is not None and "***" in given.storage:
            raise UserError(f"passwords are not kept, so {given.storage} cannot be opened; give --storage once more")
        self.timeout = seconds_of("timeout", given.timeout)
        self.silence = seconds_of("hang_timeout", given.hang_timeout)
        self.limit = seconds_of("trial_timeout", given.trial_timeout)
        if isinstance(given.space, str):
            given.space = _space_of(_beside(given.space, files, "space"))
        self.space = Space.parse(_plain(given.space))
        for name, parameter in self.space.parameters.items():
            if parameter.path.startswith(_NOT_SEARCHED):
                raise UserError(f"{name}: {parameter.path} cannot be searched, since trials share the devices; fix it")
        if self._is(BruteForceSampler):
            self.space.check_finite()
        for values in _plain(given.enqueue or []):
            self.space.encode(values)  # refuses what is not of the space
        if not self._limited():
            raise UserError("a search needs a limit; give trials, epochs or timeout")
        self.name = given.name or (files[-1].stem if files else "search")
        if "/" in self.name:
            raise UserError(f"name is {self.name!r}; a name of a study has no slash")
        self._check_monitors(_as_list(given.monitor))
        self.run_arguments = self._run_arguments(files)

    def _check_monitors(self, monitors: Sequence[str]) -> None:
        """Refuse what can be seen to be wrong before a run has logged anything."""
        for name in monitors:
            near = get_close_matches(name, COSTS, 1, 0.8)
            if near and name not in COSTS:
                raise UserError(f"unknown monitor {name!r}; did you mean {near[0]!r}?")
            if name.startswith("test_"):
                raise UserError(f"monitor is {name}: a search must not see the test split; take its val_ metric")
        if monitors and all(name in COSTS for name in monitors):
            raise UserError(
                f"monitor is {', '.join(monitors)}; give a metric beside, since a search without one is lost"
            )
        if self._is(PopulationSampler):
            if len(monitors) > 1:
                raise UserError("population based training has one monitor, a metric; leave the others out")
            if self.given.folds is not None:
                raise UserError("population based training and folds exclude each other; leave one of them out")

    def _run_arguments(self, files: Sequence[Path]) -> list[str]:
        """The command line of the run that is varied."""
        run = self.given.run
        if isinstance(run, str):
            found = _beside(run, files, "run")
        else:
            folder = Path(self.held.enter_context(tempfile.TemporaryDirectory()))
            found = folder / "run.yaml"
            found.write_text(yaml.safe_dump(_plain(run), sort_keys=False))
        return ["--config", str(found.resolve()), *self.overrides]

    def __call__(self, log_to: Callable[[Path], None]) -> None:
        """Search, and leave in the directory what was found."""
        given = self.given
        scratch = Path(self.held.enter_context(tempfile.TemporaryDirectory()))
        gpus = visible_gpus()
        self.server = self.held.enter_context(TrialServer(RANK))
        if given.dir is not None and not self.dry:
            self._claim(Path(given.dir), log_to)
        resolved = self._ask(
            scratch,
            do="resolve",
            arguments=self.run_arguments,
            monitors=_as_list(given.monitor),
            gpus=len(gpus) // given.workers,
            seed=given.seed,
        )
        self.base: dict[str, Any] = resolved["config"]
        self.monitors: list[str] = resolved["monitors"]
        self.directions = self._directions(resolved["directions"])
        self.ranks: int = resolved["ranks"]
        watch = next((name for name in self.monitors if name not in COSTS), None)
        self.configs = TrialConfigs(
            self.base,
            self.space,
            watch,
            self.directions[self.monitors.index(watch)] if watch else "maximize",
            scratch if given.dir is None else Path(given.dir),
            scheduled=self._is(PopulationSampler),
        )
        on_gpu = self.base["trainer"]["accelerator"] != "cpu"
        self.slices = slices(given.workers, self.ranks, gpus if on_gpu else (), _cores())
        self.sampler = self._sampler()
        self.pruner = self._pruner()
        base = self.configs.of_trial({}, {})
        built = [base if given.folds is None else of_fold(base, 0, given.folds)]
        if given.retrain:
            built.append(of_seed(base, given.seed))
        _check_paths(self.base, self.space)
        unchanged = self.space.values_in(self.base)
        sampled = [self.configs.of_trial(values, {}) for values in (unchanged, *_covering(self.space))]
        found = self._ask(scratch, do="check", file=str(scratch / "check.yaml"), configs=sampled, built=built)
        self.unchanged = self._unchanged(unchanged, differences(base, found["resolved"][0]))
        if self.dry:
            self._show()
            return
        if given.dir is None:
            self._claim(new_directory(self.name), log_to)
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

    def _is(self, cls: type) -> bool:
        spec = self.given.sampler
        return spec is not None and spec.class_path.rsplit(".", 1)[-1] == cls.__name__

    def _directions(self, by_name: list[str]) -> list[str]:
        given = _as_list(self.given.direction)
        if not given:
            return by_name
        if len(given) != len(self.monitors):
            raise UserError(f"direction has {len(given)} values for {len(self.monitors)} monitors; give one for each")
        return given

    def _sampler(self, existing: int = 0, token: str = "") -> BaseSampler:
        """The sampler of the config, with seeds, the grid and the length of a run filled in.

        The seed decides about the first process of a study; one that comes later must not draw the same values again.
        Samplers whose seed is a part of what they visit keep it.

        Args:
            existing: Trials that the study has already.
            token: Tells apart processes that work on the study at once.
        """
        spec = self.given.sampler
        if any(map(self._is, (GridSampler, PopulationSampler, QMCSampler))):
            existing, token = 0, ""
        with _quietly():
            if spec is None:
                return TPESampler(seed=derived_seed(self.given.seed, existing, token))
            spec = spec.clone()
            _fill_seeds(spec, self.given.seed, lambda seed: derived_seed(seed, existing, token))
            arguments = dict(spec.get("init_args") or {})
            try:
                if self._is(GridSampler):
                    return GridSampler(self.space.grid(), **arguments)
                if self._is(PopulationSampler):
                    self._check_segments(arguments.get("ready", 1))
                    return PopulationSampler(total=self.base["trainer"]["max_epochs"], **arguments)
                built: BaseSampler = self.parser.instantiate_classes(_namespace(sampler=spec)).sampler
                if isinstance(built, GroupwiseSampler):
                    built.check(list(self.space.parameters))
            except Exception as error:
                raise _refused("sampler", error) from error
            return built

    def _check_segments(self, ready: int) -> None:
        longest, every = (self.base["trainer"][key] for key in ("max_epochs", "check_val_every_n_epoch"))
        if not longest or longest < 1:
            raise UserError("a run without an end cannot be cut into segments; set --run.trainer.max_epochs")
        if every and ready % every:
            raise UserError(
                f"ready is {ready} epochs and the run is validated every {every} epochs; give a multiple of {every}"
            )

    def _pruner(self) -> BasePruner | None:
        spec = self.given.pruner
        if spec is None:
            return None
        with _quietly():
            try:
                pruner: BasePruner = self.parser.instantiate_classes(_namespace(pruner=spec)).pruner
            except Exception as error:
                raise _refused("pruner", error) from error
        check_pruner(pruner, self.directions, self.sampler)
        if sentence := hyperband_sentence(pruner):
            log.warning("%s", sentence)
        return pruner

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
        kept = {key: value for key, value in _plain(self.given).items() if key not in ("config", "dir")}
        if kept["storage"] is not None:
            kept["storage"] = self.url  # without a password
        return kept | {"run": self.base, "monitor": self.monitors, "direction": self.directions, "name": self.name}

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
                f"{self.directory} holds trials of another study than {self.name!r} in {self.url}; give the former "
                "--storage, or another --dir"
            )

    def _search(self, environment: Mapping[str, Any]) -> None:
        given = self.given
        started = time.monotonic()
        run = {key: value for key, value in flatten(self.base).items() if key not in _LOCAL}
        study, made = open_study(
            self.name,
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
            study.sampler = self._sampler(existing, f"{platform.node()} {os.getpid()}" if others else "")
        self._check_study(study, environment)
        log.info("study %r in %s", self.name, self.url)
        log.info("%s", self._plan(existing))
        score = FitTrials(
            self.server,
            self.configs,
            self.directory,
            self.monitors,
            self.slices,
            self.ranks,
            folds=given.folds,
            silence=self.silence,
            limit=self.limit,
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
                    timeout=self.timeout,
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
            silence=self.silence,
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

    def _limited(self) -> bool:
        given = self.given
        ends = any(map(self._is, (GridSampler, BruteForceSampler, PopulationSampler)))
        return ends or any(limit is not None for limit in (given.trials, given.epochs, self.timeout))

    def _first(self) -> list[dict[str, Any]]:
        """The values to try first."""
        if self.given.enqueue is None:
            # A grid comes to it by itself.
            left_out = self._is(GridSampler) or self._is(BruteForceSampler)
            return [] if left_out or self.unchanged is None else [self.unchanged]
        default = self.space.values_in(self.base)
        return [self.space.encode(values) if values else default for values in map(_plain, self.given.enqueue)]

    def _plan(self, existing: int) -> str:
        given = self.given
        limits = [f"{given[key]} {key}" for key in ("trials", "epochs") if given[key]]
        limits += [f"{given.timeout} of time"] if self.timeout else []
        told = (
            f"{' or '.join(limits) or 'all of the space'}; {_counted(given.workers, 'trial')} at once, of "
            f"{_counted(self.ranks, 'process', 'processes')} with {_counted(self.slices[0].threads, 'thread')} each"
        )
        return f"{told}; {_counted(existing, 'trial')} before" if existing else told

    def _show(self) -> None:
        """Print three configs as they would be tried."""
        study = optuna.create_study(sampler=self.sampler if not self._is(PopulationSampler) else None)
        for number in range(3):
            values = self.space.suggest(study.ask())
            print(f"# config {number}: {', '.join(f'{name}={value}' for name, value in values.items())}")
            for key, (_, value) in differences(self.configs.trained({}, {}), self.configs.trained(values, {})).items():
                print(f"{key}: {yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}")
            print()
        print("nothing was trained")


def seconds_of(key: str, text: str | float | None) -> float | None:
    """Seconds of ``90``, ``90s``, ``30m`` or ``2h``.

    Raises:
        UserError: If it is no time above zero.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(text))
    value = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if value <= 0:
        raise UserError(f"{key} is {text!r}; give a time above zero as 90s, 30m or 2h")
    return value


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


def _beside(name: str, files: Sequence[Path], key: str) -> Path:
    """A file that a config names: from the folder of the config, or from here."""
    for place in [*(file.parent / name for file in reversed(files)), Path(name)]:
        if place.is_file():
            return place
    raise UserError(f"{key}: the file {name} does not exist, from here or from the folder of the search config")


def _space_of(path: Path) -> Any:
    """The space in a file, which may be another search's config."""
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"space: {path} is not YAML; give a file with a space or a search config") from error
    return found["space"] if isinstance(found, dict) and "run" in found and "space" in found else found


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The search's own arguments, and those of the run without their ``--run.``."""
    own: list[str] = []
    of_run: list[str] = []
    rest = list(arguments)
    while rest:
        each = rest.pop(0)
        if not each.startswith("--run."):
            own.append(each)
            continue
        of_run.append("--" + each.removeprefix("--run."))
        if "=" not in each:
            if not rest:
                raise UserError(f"{each} has no value; give one behind it")
            of_run.append(rest.pop(0))
    return own, of_run


def _with_saved_config(arguments: list[str]) -> list[str]:
    """Let a search on an existing directory read the config that is kept there."""
    names = [each.split("=")[0] for each in arguments]
    if "--config" in names or "-h" in names or "--help" in names or "--dir" not in names:
        return arguments
    place = names.index("--dir")
    directory = arguments[place].partition("=")[2] or "".join(arguments[place + 1 : place + 2])
    saved = Path(directory) / "config.yaml"
    return ["--config", str(saved), *arguments] if saved.exists() else arguments


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


def _fill_seeds(spec: Any, seed: int, derived: Callable[[int], int]) -> None:
    """Give a seed to every class within that takes one: derived from its own, or from ``seed`` if it was given none."""
    if not isinstance(spec, jsonargparse.Namespace | dict):
        return
    keys = list(vars(spec) if isinstance(spec, jsonargparse.Namespace) else spec)
    for key in keys:
        if key == "seed" and "sampler" in keys and spec["sampler"] is not None:
            continue  # of the sampler within
        if key == "seed":
            spec[key] = derived(seed if spec[key] is None else spec[key])
        else:
            _fill_seeds(spec[key], seed, derived)


def _namespace(**values: Any) -> jsonargparse.Namespace:
    return jsonargparse.Namespace(**values)  # type: ignore[no-untyped-call]


def _refused(what: str, error: Exception) -> UserError:
    cause = root_cause(error)
    return UserError(f"the {what} cannot be made: {one_sentence(cause)}")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Optuna's remarks that what was asked for is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _plain(value: Any) -> Any:
    """Dictionaries and lists instead of jsonargparse's namespaces."""
    if isinstance(value, jsonargparse.Namespace):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


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
