"""A space: the values of a ``fit`` config that a search may change, read from YAML and put back into a config."""

import contextlib
import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from numbers import Real
from typing import Any, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from lightning_automl.rundir import UserError

#: What an entry may say besides ``class_path`` and ``init_args`` of an Optuna distribution.
SHORT_FORMS = ("int", "float", "log_int", "log_float", "choice")
#: Columns of ``trials.csv`` that a parameter cannot have beside them; nor can it be called ``value_…``.
RESERVED = ("number", "state", "value", "seconds", "reason", "epochs", "directory", "retry_of")

_DISTRIBUTIONS = {"FloatDistribution": "float", "IntDistribution": "int", "CategoricalDistribution": "choice"}
_ENTRY = (*SHORT_FORMS, "class_path", "init_args", "path", "when")
_EXAMPLE = "such as {log_float: [1.0e-4, 0.1]} or {choice: [max, avg]}"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One value that a search may change.

    Args:
        name: What the study calls it.
        path: Where it is in the config, dotted; a number is a place in a list, counted from 0.
        distribution: What Optuna is asked for. Choices that are lists or mappings are JSON text in it, since storages
            keep only single values.
        choices: The choices as they were written, in the order of the distribution's; empty for a range.
        when: The values, as they were written, that other parameters must have for this one to be asked for.
    """

    name: str
    path: str
    distribution: BaseDistribution
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The parts of the path."""
        return self.path.split(".")

    @property
    def names_class(self) -> bool:
        """Whether the value is the name of a class, whose arguments are in ``init_args`` beside it."""
        return self.keys[-1] == "class_path"

    def encode(self, value: Any) -> Any:
        """The value as the study has it, of one as it was written, or as the study has it already.

        A class is also known by the last part of its name when no other choice ends in it, because a resolved config
        says ``torch.optim.adamw.AdamW`` where a person writes ``AdamW`` or ``torch.optim.AdamW``.

        Raises:
            UserError: If the distribution does not contain it.
        """
        if isinstance(self.distribution, CategoricalDistribution):
            index = self._index(value)
            if index is not None:
                return self.distribution.choices[index]
        elif isinstance(value, Real) and not isinstance(value, bool) and _contains(self.distribution, float(value)):
            return round(float(value)) if isinstance(self.distribution, IntDistribution) else float(value)
        raise UserError(f"{self.name} is {value!r}, but it takes {self._words()}; give one of those")

    def decode(self, value: Any) -> Any:
        """The value as it was written, fit for a config, of one as the study has it."""
        value = self.encode(value)
        index = self._index(value)
        return value if index is None else copy.deepcopy(self.choices[index])

    def read(self, config: Mapping[str, Any]) -> Any:
        """The value that ``config`` has at the path, as the study has it.

        Raises:
            LookupError: If the config has nothing there, or a value that the distribution does not contain.
        """
        try:
            return self.encode(_get(config, self.keys))
        except UserError as error:
            raise LookupError(self.path) from error

    def active(self, values: Mapping[str, Any], parameters: Mapping[str, "Parameter"]) -> bool:
        """Whether ``values``, as the study has them, fulfil every condition."""
        return all(
            name in values and any(_same(parameters[name].decode(values[name]), each) for each in wanted)
            for name, wanted in self.when.items()
        )

    def describe(self) -> dict[str, Any]:
        """The entry of the space as JSON; `Space.parse` reads it back."""
        entry: dict[str, Any] = {}
        if isinstance(self.distribution, FloatDistribution | IntDistribution):
            span: dict[str, Any] = {"low": self.distribution.low, "high": self.distribution.high}
            whole = isinstance(self.distribution, IntDistribution)
            if (step := _step(self.distribution)) is not None:
                span["step"] = step
            if self.distribution.log:
                span["log"] = True
            entry["int" if whole else "float"] = span
        else:
            entry["choice"] = list(self.choices)
        if self.path != self.name:
            entry["path"] = self.path
        if self.when:
            entry["when"] = {name: list(wanted) for name, wanted in self.when.items()}
        # Through JSON, so that it equals what a storage gives back: keys become text and tuples lists.
        described: dict[str, Any] = json.loads(json.dumps(entry))
        return described

    def _index(self, value: Any) -> int | None:
        if not isinstance(self.distribution, CategoricalDistribution):
            return None
        for index, (written, encoded) in enumerate(zip(self.choices, self.distribution.choices, strict=True)):
            if _same(value, written) or _same(value, encoded):
                return index
        if isinstance(value, Mapping) and "class_path" in value:  # a resolved config spells out all arguments
            like = [index for index, choice in enumerate(self.choices) if _is_short_for(choice, value)]
            return like[0] if len(like) == 1 else None
        if self.names_class and isinstance(value, str):
            ends = [str(choice).rsplit(".", 1)[-1] for choice in self.choices]
            if ends.count(end := value.rsplit(".", 1)[-1]) == 1:
                return ends.index(end)
        return None

    def _words(self) -> str:
        if not isinstance(self.distribution, FloatDistribution | IntDistribution):
            return ", ".join(_text(choice) for choice in self.choices)
        kind = "whole numbers" if isinstance(self.distribution, IntDistribution) else "numbers"
        step = _step(self.distribution)
        in_steps = "" if step is None else f" in steps of {step}"
        return f"{kind} from {self.distribution.low} to {self.distribution.high}{in_steps}"


@dataclasses.dataclass(frozen=True)
class Space:
    """The parameters of a search by name, conditions before what hangs on them. `parse` makes one."""

    parameters: dict[str, Parameter]

    @classmethod
    def parse(cls, entries: Mapping[str, Any]) -> Self:
        """Read a space as it is in YAML.

        Each key is the dotted path of a value of the ``fit`` config, or any name with ``path:`` in its entry, so that
        several parameters may share a path when their conditions exclude each other. An entry is one of
        ``{int: [low, high]}``, ``{int: [low, high, step]}``, ``{float: [low, high]}``, ``{float: [low, high, step]}``,
        ``{log_int: [low, high]}``, ``{log_float: [low, high]}``, ``{choice: [a, b]}``, a range as
        ``{int: {low:, high:, step:, log:}}``, or ``{class_path: optuna.distributions.…, init_args: {…}}``; ends are
        included. ``when: {name: value or list of values}`` beside it makes it conditional.

        Raises:
            UserError: If an entry is not one of these, a range is empty or impossible, a condition names an unknown
                parameter or a value that it cannot have, conditions go round in a circle, or two parameters could set
                one path at once.
        """
        if not isinstance(entries, Mapping) or not entries:
            raise UserError(f"the space is empty; name at least one value of the run, {_EXAMPLE}")
        entries = {str(name): entry for name, entry in entries.items()}
        found = {name: _parse_entry(name, entry) for name, entry in entries.items()}
        for name, entry in entries.items():
            found[name] = dataclasses.replace(found[name], when=_parse_conditions(name, entry.get("when"), found))
        ordered = {name: found[name] for name in _conditions_first(found)}
        _check_paths(ordered)
        return cls(ordered)

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Ask ``trial`` for a value of every active parameter.

        Returns:
            Values by name, as the study has them; parameters whose conditions do not hold are absent.
        """
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.active(values, self.parameters):
                value = _suggest(trial, name, parameter.distribution)
                values[name] = parameter.encode(value)  # an enqueued 1 is 1.0 where floats are asked for
        return values

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values as the study has them, to be enqueued, of values as a person writes them.

        Raises:
            UserError: If a name is unknown, or a distribution does not contain its value.
        """
        for name in values:
            if name not in self.parameters:
                raise UserError(_unknown("parameter", name, self.parameters))
        return {name: self.parameters[name].encode(value) for name, value in values.items()}

    def apply(self, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a ``fit`` config with ``values`` at their paths.

        What lies above a path is made when it is missing; a list grows by its next element. Where a ``class_path``
        becomes another class, the ``init_args`` of the former one are dropped, so that the new one starts from its own
        defaults and from what ``values`` say. A class that is the same by the last part of its name stays as it is.

        Args:
            config: Nested mappings and lists.
            values: As `suggest` gives them, or as they were written.

        Raises:
            UserError: If a name is unknown, a value is outside its range or given though its conditions do not hold,
                a path leads through something that is neither a mapping nor a list, or a list would get a gap.
        """
        values = self.encode(values)
        result: dict[str, Any] = _copy(config)
        for parameter in sorted((self.parameters[name] for name in values), key=_outer_first):
            if not parameter.active(values, self.parameters):
                conditions = _text({name: list(wanted) for name, wanted in parameter.when.items()})
                raise UserError(
                    f"{parameter.name} is {_text(values[parameter.name])}, but it exists only when {conditions}; "
                    "leave it out, or give those values too"
                )
            value = values[parameter.name]
            if parameter.names_class:
                if _has(result, parameter, value):
                    continue
                _drop_arguments(result, parameter.keys[:-1])
            _put(result, parameter.keys, parameter.decode(value), parameter.path)
        return result

    def values_in(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values that ``config`` has already, as the study has them, to enqueue the unchanged run.

        Left out are parameters whose path the config does not have or whose value there is not in the distribution,
        and those whose conditions do not hold, or hang on one that was left out.
        """
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.active(values, self.parameters):
                try:
                    values[name] = parameter.read(config)
                except LookupError:
                    continue
        return values

    def distributions(self) -> dict[str, BaseDistribution]:
        """The distributions by name, those of conditional parameters included."""
        return {name: parameter.distribution for name, parameter in self.parameters.items()}

    def grid(self) -> dict[str, list[Any]]:
        """All values of every parameter, as ``optuna.samplers.GridSampler`` takes them.

        Raises:
            UserError: If a parameter is conditional, or has no end of values.
        """
        return {name: _all_values(parameter) for name, parameter in self.parameters.items()}

    def check_finite(self) -> None:
        """Raise a UserError if a parameter has no end of values, and so cannot be gone through."""
        for parameter in self.parameters.values():
            _all_values(dataclasses.replace(parameter, when={}))

    def describe(self) -> dict[str, Any]:
        """The space as JSON, to be kept with a study and compared by `differences`; `parse` reads it back."""
        return {name: parameter.describe() for name, parameter in self.parameters.items()}


def differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Compare two descriptions of `Space.describe`.

    Returns:
        A sentence with the first parameter that differs and both its forms, or ``None``.
    """
    for name in dict.fromkeys((*own, *stored)):
        before, now = (_text(space[name]) if name in space else "nothing" for space in (stored, own))
        if before != now:
            return (
                f"the study was started with {before} for {name}, now it is {now}; "
                "give the former to continue it, or another directory or name to start anew"
            )
    return None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = get_close_matches(name, names, 1, 0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    listed = f" known: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
    return f"unknown {kind} {name!r}{hint}{listed}"


def _step(distribution: FloatDistribution | IntDistribution) -> float | None:
    """The step, unless it goes without saying."""
    return None if isinstance(distribution, IntDistribution) and distribution.step == 1 else distribution.step


def _contains(distribution: BaseDistribution, value: float) -> bool:
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return abs(steps - round(steps)) < 1e-8  # as exact as Optuna is


def _suggest(trial: BaseTrial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, CategoricalDistribution)
    return trial.suggest_categorical(name, distribution.choices)


def _all_values(parameter: Parameter) -> list[Any]:
    distribution = parameter.distribution
    if parameter.when:
        raise UserError(
            f"{parameter.name} is conditional, and a grid has every parameter in every trial; use BruteForceSampler"
        )
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    if distribution.single():
        return [distribution.low]
    if distribution.step is None:
        raise UserError(
            f"{parameter.name} takes {parameter._words()}, which are without end; "
            "give it a step or a choice, or use a sampler that needs no grid"
        )
    low, high, step = (Decimal(str(each)) for each in (distribution.low, distribution.high, distribution.step))
    return [float(low + index * step) for index in range(int((high - low) / step) + 1)]


# ---- a config and its paths


def _copy(node: Any) -> Any:
    """Mappings as dictionaries, sequences as lists, so that they can be changed and become YAML; the rest as it is."""
    if isinstance(node, Mapping):
        return {key: _copy(each) for key, each in node.items()}
    return [_copy(each) for each in node] if isinstance(node, list | tuple) else node


def _outer_first(parameter: Parameter) -> list[tuple[int, str]]:
    """Order of putting: what contains others first, lists from their start, ``class_path`` before ``init_args``."""
    return [(int(key), "") if key.isdecimal() else (-1, key) for key in parameter.keys]


def _get(node: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if isinstance(node, list) and key.isdecimal():
            node = node[int(key)]
        elif isinstance(node, Mapping):
            node = node[key]
        else:
            raise LookupError(key)
    return node


def _is_short_for(choice: Any, spec: Mapping[str, Any]) -> bool:
    """Whether a choice names the class of a resolved ``spec``, and no argument that differs."""
    if isinstance(choice, str):
        choice = {"class_path": choice}
    if not isinstance(choice, Mapping) or "class_path" not in choice:
        return False
    ends = [str(each["class_path"]).rsplit(".", 1)[-1] for each in (choice, spec)]
    arguments = spec.get("init_args") or {}
    given = choice.get("init_args") or {}
    return ends[0] == ends[1] and all(_same(arguments.get(name), value) for name, value in given.items())


def _has(config: Mapping[str, Any], parameter: Parameter, value: Any) -> bool:
    try:
        return _same(parameter.read(config), value)
    except LookupError:
        return False


def _drop_arguments(config: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Remove the arguments beside a ``class_path``, if there is anything at ``keys``."""
    with contextlib.suppress(LookupError):
        holder = _get(config, keys)
        if isinstance(holder, dict):
            holder.pop("init_args", None)
            holder.pop("dict_kwargs", None)


def _put(node: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    """``node`` with ``value`` at ``keys``; ``path`` is the whole path."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    above = path.removesuffix(".".join(keys)).rstrip(".")
    if node is None:
        node = [] if key.isdecimal() else {}
    if isinstance(node, dict):
        node[key] = _put(node.get(key), rest, value, path)
    elif isinstance(node, list) and key.isdecimal():
        index = int(key)
        if index > len(node):
            raise UserError(
                f"{path} would leave a gap, since {above} has {len(node)} elements; "
                f"give it more of them in the run's config, or {above}.{len(node)} in the space"
            )
        if index == len(node):
            node.append(None)
        node[index] = _put(node[index], rest, value, path)
    else:
        wanted = "a list" if key.isdecimal() else "a mapping"
        raise UserError(f"{path} needs {wanted} at {above}, but the run has {node!r} there; change the run or the path")
    return node


# ---- reading the YAML


def _parse_entry(name: str, entry: Any) -> Parameter:
    if name in RESERVED or name.startswith("value_"):
        raise UserError(f"a parameter is called {name!r}, as a column of trials.csv is; give it another name and path:")
    if not isinstance(entry, Mapping):
        raise UserError(f"{name} is {entry!r} in the space; give a mapping, {_EXAMPLE}")
    for key in entry:
        if key not in _ENTRY:
            raise UserError(f"{name}: {_unknown('key', str(key), _ENTRY)}")
    path = entry.get("path", name)
    if not isinstance(path, str) or not all(path.split(".")):
        raise UserError(f"{name}: the path is {path!r}; give a dotted path such as data.init_args.batch_size")
    forms = [form for form in (*SHORT_FORMS, "class_path") if form in entry]
    if len(forms) != 1:
        raise UserError(f"{name} has {' and '.join(forms) or 'no range'}; give exactly one, {_EXAMPLE}")
    kind, form = forms[0], entry[forms[0]]
    if kind == "class_path":
        known = [f"optuna.distributions.{each}" for each in _DISTRIBUTIONS]
        if form not in [*_DISTRIBUTIONS, *known]:
            raise UserError(f"{name}: {_unknown('distribution', str(form), known)}")
        kind, form = _DISTRIBUTIONS[form.rsplit(".", 1)[-1]], entry.get("init_args")
        if not isinstance(form, Mapping):
            raise UserError(f"{name}: the distribution has init_args {form!r}; give them as a mapping")
        if kind == "choice":
            form = _arguments(name, form, ("choices",))["choices"]
    elif "init_args" in entry:
        raise UserError(f"{name} has init_args beside {kind}; they belong to class_path")
    if kind == "choice":
        choices = _parse_choices(name, form)
        encoded = [choice if _is_single(choice) else _text(choice) for choice in choices]
        return Parameter(name, path, CategoricalDistribution(encoded), tuple(choices))
    return Parameter(name, path, _parse_range(name, kind, form))


def _arguments(name: str, given: Mapping[str, Any], required: Sequence[str], *more: str) -> dict[str, Any]:
    for key in given:
        if key not in (*required, *more):
            raise UserError(f"{name}: {_unknown('argument', str(key), (*required, *more))}")
    if missing := [key for key in required if given.get(key) is None]:
        raise UserError(f"{name} has no {' and no '.join(missing)}; give {'both' if len(missing) > 1 else 'it'}")
    return dict(given)


def _parse_range(name: str, kind: str, form: Any) -> BaseDistribution:
    whole, always_log = kind.endswith("int"), kind.startswith("log_")
    if isinstance(form, Mapping):
        given = _arguments(name, form, ("low", "high"), "step", "log")
    elif isinstance(form, list | tuple) and len(form) in ((2,) if always_log else (2, 3)):
        given = dict(zip(("low", "high", "step"), form, strict=False))
    else:
        third = "" if always_log else " or [low, high, step]"
        raise UserError(f"{name}: {kind} is {form!r}; give [low, high]{third}")
    log = given.get("log", always_log)
    if not isinstance(log, bool) or (always_log and not log):
        raise UserError(f"{name}: log is {log!r}{' in a log_ form' if always_log else ''}; give true or leave it out")
    low, high = _number(name, "low", given["low"], whole), _number(name, "high", given["high"], whole)
    step = None if given.get("step") is None else _number(name, "step", given["step"], whole)
    if low > high:
        raise UserError(f"{name}: low is {low} and high {high}; give a low that is not above high")
    if log and low <= 0:
        raise UserError(f"{name}: low is {low} on a logarithmic scale; give {'1 or more' if whole else 'more than 0'}")
    if step is not None:
        _check_step(name, low, high, step, log, whole)
    if whole:
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(low, high, log=log, step=step)


def _check_step(name: str, low: float, high: float, step: float, log: bool, whole: bool) -> None:
    if log and not (whole and step == 1):
        raise UserError(f"{name} has a step of {step} on a logarithmic scale; leave out the step or log")
    if step <= 0:
        raise UserError(f"{name}: step is {step}; give more than 0")
    # Optuna lowers `high` with a warning: nobody would look for values that the file names and the study never has.
    exact_low, exact_high, exact_step = (Decimal(str(each)) for each in (low, high, step))
    if rest := (exact_high - exact_low) % exact_step:
        raise UserError(
            f"{name}: steps of {step} from {low} do not meet {high}; "
            f"give {exact_high - rest} or {exact_high - rest + exact_step} as high"
        )


def _number(name: str, key: str, value: Any, whole: bool) -> float:
    value = _numbers(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}: {key} is {value!r}; give a {'whole ' if whole else ''}number")
    if whole and value != int(value):
        raise UserError(f"{name}: {key} is {value}, but int is for whole numbers; give one, or use float")
    return int(value) if whole else float(value)


def _numbers(value: Any) -> Any:
    """``value`` with texts such as ``1e-4`` as the numbers that were meant: YAML 1.1 wants ``1.0e-4``."""
    if isinstance(value, Mapping):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value) if math.isfinite(float(value)) else value
    return value


def _is_single(choice: Any) -> bool:
    return choice is None or isinstance(choice, bool | int | float | str)


def _parse_choices(name: str, form: Any) -> list[Any]:
    if not isinstance(form, list | tuple) or not form:
        raise UserError(f"{name}: the choice is {form!r}; give a list of one value or more")
    choices = _numbers(form)
    encoded: list[Any] = []
    for choice in choices:
        try:
            text = _text(choice)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name}: the choice {choice!r} cannot be kept; "
                "give finite numbers, texts, true, false, null, or lists and mappings of them"
            ) from error
        single = choice if _is_single(choice) else text
        if single in encoded:  # by ==, as Optuna looks them up: it takes true for 1 and 1 for 1.0
            raise UserError(
                f"{name}: the choice {text} equals an earlier one, {_text(choices[encoded.index(single)])}; remove one"
            )
        encoded.append(single)
    return list(choices)


def _parse_conditions(name: str, when: Any, parameters: Mapping[str, Parameter]) -> dict[str, tuple[Any, ...]]:
    if when is None:
        return {}
    if not isinstance(when, Mapping):
        raise UserError(f"{name}: when is {when!r}; give a mapping of parameters to values")
    return {str(other): _parse_condition(name, str(other), wanted, parameters) for other, wanted in when.items()}


def _parse_condition(name: str, other: str, wanted: Any, parameters: Mapping[str, Parameter]) -> tuple[Any, ...]:
    if other not in parameters:
        raise UserError(f"{name}: when has an {_unknown('parameter', other, parameters)}")
    parameter, wanted = parameters[other], _numbers(wanted)
    # A list is one value where it is a choice itself, and several values elsewhere.
    several = isinstance(wanted, list) and not any(_same(wanted, choice) for choice in parameter.choices)
    values = wanted if several else [wanted]
    if not values:
        raise UserError(f"{name}: when has no value for {other}; give one or several, or leave it out")
    try:
        return tuple(parameter.decode(value) for value in values)
    except UserError as error:
        raise UserError(f"{name} could not exist: in its when, {error}") from error


def _conditions_first(parameters: Mapping[str, Parameter]) -> list[str]:
    """Names in the order written, but each after those that its conditions name."""
    ordered: list[str] = []

    def visit(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            circle = " -> ".join((*waiting[waiting.index(name) :], name))
            raise UserError(f"the conditions of the space go round in a circle: {circle}; remove one of these when")
        if name not in ordered:
            for other in parameters[name].when:
                visit(other, (*waiting, name))
            ordered.append(name)

    for name in parameters:
        visit(name, ())
    return ordered


def _check_paths(parameters: Mapping[str, Parameter]) -> None:
    """Refuse two parameters that set one path and whose conditions can hold at once."""
    required: dict[str, dict[str, list[Any]]] = {}
    for name, parameter in parameters.items():  # conditions come first, so theirs are known
        required[name] = {}
        for other, wanted in parameter.when.items():
            for each, values in [*required[other].items(), (other, list(wanted))]:
                former = required[name].get(each, values)
                required[name][each] = [value for value in former if value in values]
        for earlier in parameters:
            if earlier == name:
                break
            if parameters[earlier].path == parameter.path and not _exclude(required[earlier], required[name]):
                raise UserError(
                    f"{earlier} and {name} could both set {parameter.path} in one trial; "
                    "give them conditions (when:) that exclude each other"
                )


def _exclude(some: Mapping[str, list[Any]], others: Mapping[str, list[Any]]) -> bool:
    return any(not [value for value in some[name] if value in others[name]] for name in some.keys() & others.keys())
