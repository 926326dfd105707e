"""What a search config says: its keys, what is wrong with them, and the sampler and pruner that they name."""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
import yaml
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, QMCSampler, TPESampler

from lightning_automl.durations import seconds_of
from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.rundir import UserError
from lightning_automl.search.pruners import check_pruner
from lightning_automl.search.samplers import GroupwiseSampler, PopulationSampler
from lightning_automl.search.spaces import Space
from lightning_automl.search.storages import allowing_experiments
from lightning_automl.search.study import derived_seed
from lightning_automl.studies.runs import COSTS

if TYPE_CHECKING:
    from lightning_automl.search.policies import PolicyMethod

#: Keys of a run by which the search gives trials their processes and devices.
_NOT_SEARCHED = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator")

#: What the sampler is told by the search, and so does not have to be given.
_FILLED = {"search_space", "total"}

#: Keys of a search for augmentation policies alone, and those that it has no use for.
METHOD_KEYS = ("method", "acceptance")
NOT_OF_METHODS = ("space", "epochs", "enqueue", "retrain")
_NOT_OF_FAST = ("storage", "pruner")


@dataclasses.dataclass
class Acceptance:
    """What a searched policy is compared on.

    Args:
        folds: Of the data, which the search does not see.
        seeds: Of the runs on each.
    """

    folds: int = 2
    seeds: int = 3


def _parser(policies: bool) -> jsonargparse.ArgumentParser:
    """The parser of search configs.

    Args:
        policies: Whether the search may be one for augmentation policies, the classes of which need torch.
    """
    parser = jsonargparse.ArgumentParser(
        prog="lightning-automl search",
        description="Search over a fit config. Keys of the run itself are given as --run.<dotted key>; --dry-run shows "
        "three sampled configs, or what a method would do, and trains nothing.",
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
        "trials": (int | None, None, "Trials in all, over all machines; of Fast AutoAugment for each fold and round."),
        "epochs": (int | None, None, "Epochs in all, over all machines."),
        "timeout": (time, None, "Time for this command, as 90s, 30m or 2h."),
        "space": (plain | str | None, None, "What is varied, by name or dotted path; or a file that says it."),
        "enqueue": (
            list[plain] | None,
            None,
            "Values to try first, by name; {} is the unchanged run, which is the default. [] for none.",
        ),
        "folds": (
            int | None,
            None,
            "A trial is the mean over so many folds, and is pruned after a fold. With a method: the folds that "
            "policies are searched on, 5 by default.",
        ),
        "acceptance": (
            Acceptance | None,
            Acceptance(),
            "With a method: on how many folds that the search does not see, and with how many seeds on each, its "
            "policy is compared with none and TrivialAugment; null for no comparison.",
        ),
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
    if policies:
        from lightning_automl.search import autoaugment, fast_autoaugment  # noqa: F401  # so that their names are known
        from lightning_automl.search.policies import PolicyMethod

        words = "In place of space: how augmentation policies are searched, FastAutoAugmentSearch or AutoAugmentSearch."
        parser.add_subclass_arguments(PolicyMethod, "method", required=False, help=words)
    else:
        parser.add_argument("--method", type=plain | None, default=None)
    return parser


def _names_method(arguments: Sequence[str]) -> bool:
    """Whether a command line, or a config that it names, may have a ``method``, or asks for help."""
    if any(re.match(r"-h$|--(help|method)\b", each) for each in arguments):
        return True
    before = ["", *arguments[:-1]]
    files = [each for key, each in zip(before, arguments, strict=True) if key == "--config"]
    files += [each.removeprefix("--config=") for each in arguments if each.startswith("--config=")]
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # which the parser tells
            if re.search(r"^ *[\"']?method\b", Path(file).read_text(), re.MULTILINE):
                return True
    return False


class SearchConfig:
    """A search as the user gave it, checked as far as it can be without the run that is varied.

    Args:
        arguments: The command line behind ``search``.
        held: Closes what is opened.

    Attributes:
        given: All keys, as jsonargparse has them.
        dry: Whether three sampled configs are to be shown and nothing trained.
        space: What is varied, without a method.
        method: How augmentation policies are searched, in place of a space; None for a study over a space.
        name: Of the study.
        monitors: Those that were given.
        run_arguments: The command line of the run that is varied.
        timeout: Seconds for the command, or None.
        silence: Seconds without a sign of life after which a trial is killed.
        limit: Seconds after which a trial is killed, or None.

    Raises:
        UserError: If a key cannot be.
    """

    def __init__(self, arguments: Sequence[str], held: contextlib.ExitStack) -> None:
        own, overrides = _split(arguments)
        self.dry = "--dry-run" in own
        own = _with_saved_config([each for each in own if each != "--dry-run"])
        self._parser = _parser(_names_method(own))
        try:
            self.given = self._parser.parse_args(own)
        except jsonargparse.ArgumentError as error:
            sentence = one_sentence(error, self._parser)
            if re.match(r"unknown key '(model|data|trainer)\.", sentence):
                sentence = f"this is a fit config ({sentence.split(';')[0]}); name it under run: in a search config"
            raise UserError(sentence) from error
        given = self.given
        files = [Path(str(path)) for path in given.config or []]
        if given.run is None and not files and given.dir is not None:
            raise UserError(f"there is no search in {given.dir}; give a search config by --config")
        if given.run is None:
            raise UserError("a search needs the fit config that it varies; give it as run: in the search config")
        self.method = None if given.method is None else self._method()
        if self.method is None and plain(given.acceptance) != dataclasses.asdict(Acceptance()):
            raise UserError(
                "acceptance says how a searched policy is compared, and no policy is searched; leave it out, "
                "or give a method in place of the space"
            )
        if not given.space and self.method is None:
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
        if self.method is None:
            self.space = self._space(files)
        if not self._limited():
            raise UserError("a search needs a limit; give trials, epochs or timeout")
        self.name = given.name or (files[-1].stem if files else "search")
        if "/" in self.name:
            raise UserError(f"name is {self.name!r}; a name of a study has no slash")
        self.monitors: list[str] = _as_list(given.monitor)
        self._check_monitors()
        self.run_arguments = ["--config", str(self._run_file(files, held).resolve()), *overrides]

    def _space(self, files: Sequence[Path]) -> Space:
        given = self.given
        if isinstance(given.space, str):
            given.space = _space_of(_beside(given.space, files, "space"))
        space = Space.parse(plain(given.space))
        for name, parameter in space.parameters.items():
            if parameter.path.startswith(_NOT_SEARCHED):
                raise UserError(f"{name}: {parameter.path} cannot be searched, since trials share the devices; fix it")
        if self.is_sampler(BruteForceSampler):
            space.check_finite()
        for values in plain(given.enqueue or []):
            space.encode(values)  # refuses what is not of the space
        return space

    def _method(self) -> "PolicyMethod":
        """How policies are searched; what the search leaves open is filled in."""
        given = self.given
        with allowing_experiments():
            try:
                method: PolicyMethod = self._parser.instantiate_classes(_namespace(method=given.method)).method
            except Exception as error:
                raise _refused("method", error) from error
        name = type(method).__name__
        useless = (*NOT_OF_METHODS, *(_NOT_OF_FAST if name == "FastAutoAugmentSearch" else ()))
        for key in useless:
            if given[key] != self._parser.get_default(key):
                raise UserError(f"method is {name}, and {key} says nothing to it; leave one of the two out")
        if given.trials is None:
            given.trials = 200
        if given.folds is None:
            given.folds = 5
        self._check_acceptance()
        return method

    def _check_acceptance(self) -> None:
        wanted = self.given.acceptance
        if wanted is None:
            return
        for key, value in plain(wanted).items():
            if value < 1:
                raise UserError(f"acceptance.{key} is {value}; give 1 or more, or acceptance: null for no comparison")
        if wanted.folds * wanted.seeds < 2:
            raise UserError("acceptance has one fold and one seed, of which no interval can be told; give more of one")

    def _check_monitors(self) -> None:
        """Refuse what can be seen to be wrong before a run has logged anything."""
        for name in self.monitors:
            near = get_close_matches(name, COSTS, 1, 0.8)
            if near and name not in COSTS:
                raise UserError(f"unknown monitor {name!r}; did you mean {near[0]!r}?")
            if name.startswith("test_"):
                raise UserError(f"monitor is {name}: a search must not see the test split; take its val_ metric")
        if self.monitors and all(name in COSTS for name in self.monitors):
            raise UserError(
                f"monitor is {', '.join(self.monitors)}; give a metric beside, since a search without one is lost"
            )
        if self.method is not None:
            if len(self.monitors) > 1 or any(name in COSTS for name in self.monitors):
                raise UserError(f"monitor is {', '.join(self.monitors)}; policies are compared by one metric of val")
            if self.is_sampler(PopulationSampler):
                raise UserError("population based training searches no policies; leave the sampler out")
            if any(map(self.is_sampler, (GridSampler, BruteForceSampler))):
                raise UserError("there are too many policies to try each; take another sampler than one that does")
        if self.is_sampler(PopulationSampler):
            if len(self.monitors) > 1:
                raise UserError("population based training has one monitor, a metric; leave the others out")
            if self.given.folds is not None:
                raise UserError("population based training and folds exclude each other; leave one of them out")

    def _run_file(self, files: Sequence[Path], held: contextlib.ExitStack) -> Path:
        """The fit config that is varied."""
        if isinstance(self.given.run, str):
            return _beside(self.given.run, files, "run")
        file = Path(held.enter_context(tempfile.TemporaryDirectory())) / "run.yaml"
        file.write_text(yaml.safe_dump(plain(self.given.run), sort_keys=False))
        return file

    def is_sampler(self, cls: type) -> bool:
        """Whether the sampler that was given is of this class."""
        spec = self.given.sampler
        return spec is not None and spec.class_path.rsplit(".", 1)[-1] == cls.__name__

    def sampler_spec(self) -> dict[str, Any] | None:
        """The sampler that was given, as JSON can hold it, for a process that makes it itself."""
        spec: dict[str, Any] | None = plain(self.given.sampler)
        return spec

    def _limited(self) -> bool:
        given = self.given
        ends = any(map(self.is_sampler, (GridSampler, BruteForceSampler, PopulationSampler)))
        return ends or any(limit is not None for limit in (given.trials, given.epochs, self.timeout))

    def directions(self, by_name: list[str]) -> list[str]:
        """Minimize or maximize, one for each monitor.

        Args:
            by_name: What the names of the monitors say, which holds unless directions were given.

        Raises:
            UserError: If as many were not given as there are monitors.
        """
        given = _as_list(self.given.direction)
        if not given:
            return by_name
        if len(given) != len(by_name):
            raise UserError(f"direction has {len(given)} values for {len(by_name)} monitors; give one for each")
        return given

    def sampler(self, space: Space, trainer: Mapping[str, Any], existing: int = 0, token: str = "") -> BaseSampler:
        """The sampler of the config, with seeds, the grid and the length of a run filled in.

        The seed decides about the first process of a study; one that comes later must not draw the same values again.
        Samplers whose seed is a part of what they visit keep it.

        Args:
            space: What it chooses from.
            trainer: The run's arguments of the trainer.
            existing: Trials that the study has already.
            token: Tells apart processes that work on the study at once.

        Raises:
            UserError: If the sampler refuses its arguments, or the run cannot be cut into segments.
        """
        spec = self.given.sampler
        if any(map(self.is_sampler, (GridSampler, PopulationSampler, QMCSampler))):
            existing, token = 0, ""
        with allowing_experiments():
            if spec is None:
                return TPESampler(seed=derived_seed(self.given.seed, existing, token))
            spec = spec.clone()
            _fill_seeds(spec, self.given.seed, lambda seed: derived_seed(seed, existing, token))
            arguments = dict(spec.get("init_args") or {})
            try:
                if self.is_sampler(GridSampler):
                    return GridSampler(space.grid(), **arguments)
                if self.is_sampler(PopulationSampler):
                    _check_segments(trainer, arguments.get("ready", 1))
                    return PopulationSampler(total=trainer["max_epochs"], **arguments)
                built: BaseSampler = self._parser.instantiate_classes(_namespace(sampler=spec)).sampler
                if isinstance(built, GroupwiseSampler):
                    built.check(list(space.parameters))
            except Exception as error:
                raise _refused("sampler", error) from error
            return built

    def pruner(self, directions: Sequence[str], sampler: BaseSampler) -> BasePruner | None:
        """The pruner of the config; None if it names none.

        Raises:
            UserError: If it refuses its arguments, or cannot work with these directions and this sampler.
        """
        spec = self.given.pruner
        if spec is None:
            return None
        with allowing_experiments():
            try:
                pruner: BasePruner = self._parser.instantiate_classes(_namespace(pruner=spec)).pruner
            except Exception as error:
                raise _refused("pruner", error) from error
        check_pruner(pruner, directions, sampler)
        return pruner


def _check_segments(trainer: Mapping[str, Any], ready: int) -> None:
    longest, every = trainer["max_epochs"], trainer["check_val_every_n_epoch"]
    if not longest or longest < 1:
        raise UserError("a run without an end cannot be cut into segments; set --run.trainer.max_epochs")
    if every and ready % every:
        raise UserError(
            f"ready is {ready} epochs and the run is validated every {every} epochs; give a multiple of {every}"
        )


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


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def plain(value: Any) -> Any:
    """Dictionaries and lists instead of jsonargparse's namespaces."""
    if isinstance(value, jsonargparse.Namespace):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
