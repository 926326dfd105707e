"""One sentence about a mistake, out of the many lines that a parser or a library says about it."""

import argparse
import collections.abc
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn, get_args, get_origin

from lightning_automl.rundir import DiskFullError, ToldError, UserError

#: What jsonargparse writes for types, and what a person would.
TYPES = {"NoneType": "null", "bool": "true or false", "str": "a text", "int": "a whole number", "float": "a number"}
TYPES |= {"list": "a list", "collections.abc.Sequence": "a list", "Sequence": "a list"}


class PlainParser(argparse.ArgumentParser):
    """Raises its errors, which are one sentence already."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was given."""
        raise UserError(f"{message}; see {self.prog} --help")


def one_sentence(error: BaseException, parser: Any = None) -> str:
    """Say what was given, what is known and what to do, in one line.

    Args:
        error: Of jsonargparse (whose texts have up to twelve nested lines), of another library or our own.
        parser: The parser of the sub-command, for the keys that it knows.

    Returns:
        A sentence without a line break; of an unknown error its text in one line.
    """
    if isinstance(error, DiskFullError):
        return str(error.strerror or error)
    text = str(error) or type(error).__name__
    if isinstance(error, UserError):
        return text
    # Where several kinds of class would do, the first of them only says that the class is none of it.
    text = re.sub(
        r"^ *- Import path (\S+) does not correspond to a subclass of .+\n(?= *- Problem with given class_path '\1')",
        "",
        text,
        flags=re.MULTILINE,
    )
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    classes = re.findall(r"Problem with given class_path '([^']+)'", text)

    if found := re.search(r"[Uu]nrecognized arguments: --?([\w.-]+)|does not accept option '([^']+)'", text):
        return _unknown(found[1] or found[2], "key", _keys(parser))
    if found := re.search(r"File does not exist: '([^']+)'", text):
        return f"{keys}: the file {found[1]} does not exist"
    if found := re.search(r"Option '([^']+)' is not accepted(?:\. Got value: Namespace\(class_path='([^']+)')?", text):
        if found[2]:  # of a class that is called later, as an optimizer
            classes.append(found[2])
        if not classes:
            return _unknown(found[1], "key", _keys(parser))
        if classes[-1].startswith(("lightning.", "torch.nn.Module")) and found[1].split(".")[0] in _SPECIFICATION:
            return (
                f"{keys} takes class_path and init_args and nothing beside them; look for a misspelt or misplaced key"
            )
        return _unknown(found[1], f"argument of {classes[-1].rsplit('.', 1)[-1]}:", _parameters(classes[-1]))
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return _no_class(found[1], keys, _wanted(classes, keys))
    if found := re.search(r"an instantiatable class, but (\S+) is abstract[\s\S]*?NestedArg\(key='([^']+)'", text):
        names = ", ".join(_names(_wanted(classes, keys)))
        return f"{keys} has no class yet that could take {found[2]!r}; name one before it{names and f': {names}'}"
    if found := re.search(r"Multiple subclasses with name .+?: (.+)\.", text):
        return f"{keys}: several classes have this name; give the full path, one of {found[1]}"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", text):
        names = ", ".join(_names_below(found[2]) or _names(_wanted(classes, keys)))
        return f"{keys}: {found[1]} is not a {found[2]}{names and f'; known: {names}'}"
    if (classes or keys) and (
        found := re.search(r"(No module named '[^']+'|module '\S+' has no attribute '\S+')", text)
    ):
        lacking = re.findall(r"'([^']+)'", found[1])  # a module, or a module and its attribute
        named = classes[-1] if classes and classes[-1].startswith(".".join(lacking)) else ""
        return f"{keys}: {f'class_path {named} ' if named else 'a class '}cannot be imported: {found[1]}"
    if found := re.search(r"arguments are required: (.+)", text):
        whose = f" of {classes[-1].rsplit('.', 1)[-1]}" if classes else ""
        return f"missing: {found[1].removeprefix('fit.')}{whose}; give it in the config or on the command line"
    if found := re.search(r"Expected (.+?)\. Got value: (.*)", text):
        return f"{keys}: {found[2]!r} is not {_type_words([found[1]])}"
    if found := re.search(r"Given value: (.*)", text):
        expected = re.findall(r"^\s*- Expected (.+)$", text, re.MULTILINE)
        return f"{keys}: {found[1]!r} is not {_type_words(expected)}" if expected else _one_line(text)
    return _one_line(text)


def ending(error: BaseException, rank: int = 0) -> tuple[int, str]:
    """The exit status of a command that ended by an exception, and what to tell: 2 for a mistake in what was given.

    The traceback of what is nobody's mistake is printed here, on rank 0.

    Args:
        error: What ended the command; a ``SystemExit`` and the like are raised again.
        rank: Of this process.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command goes on"
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, ToldError):
        return 1, f"lightning-automl: {error}"
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    refused = (UserError,) if lightning is None else (UserError, lightning.MisconfigurationException)
    mistake = error if isinstance(error, refused) else root_cause(error)
    if isinstance(mistake, refused):
        return 2, f"lightning-automl: {one_sentence(mistake)}"
    if isinstance(error, DiskFullError):
        return 1, f"lightning-automl: {error.strerror}"
    if rank == 0:
        traceback.print_exception(error)
    return 1, f"lightning-automl: {one_sentence(error)}"


def root_cause(error: BaseException) -> BaseException:
    """What an exception was raised from, and that from, to the first, or to a mistake of the user that is told."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        if (refusal := _refusal(str(error))) is not None:
            return ValueError(refusal)
        error = error.__cause__
    return error


def _refusal(text: str) -> str | None:
    """What the class that was chosen says, where several kinds would do and the first of them is another one.

    jsonargparse raises from what the first kind said, which is only that the class is none of it.
    """
    said = re.findall(r"^  - (.+)$", text, re.MULTILINE) if text.startswith("Does not validate against any of") else []
    none = ("Import path", "Expected a", "Does not validate")
    others = [each for each in said if not each.startswith(none)]
    return others[0] if others and said[0].startswith("Import path") else None


_SPECIFICATION = ("class_path", "init_args", "init_arg", "dict_kwargs")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:500]


def _unknown(name: str, kind: str, known: Iterable[str]) -> str:
    """`unknown argument of ResNet: 'widht'; did you mean 'width'? known: depth, width`."""
    names = sorted(set(known))
    names = [each for each in names if each != "params"]  # of an optimizer, which the task fills in
    near = get_close_matches(name, names, 3, 0.6) or [each for each in names if each.rsplit(".", 1)[-1] == name][:3]
    hint = f"; did you mean {' or '.join(repr(each) for each in near)}?" if near else ""
    listed = f"{'' if hint else ';'} known: {', '.join(names)}" if names and len(names) <= 20 else ""
    return f"unknown {kind} {name!r}{hint}{listed}"


def _keys(parser: Any) -> Iterator[str]:
    for action in getattr(parser, "_actions", ()):
        yield from (option.lstrip("-") for option in action.option_strings)


def _parameters(class_path: str) -> Iterator[str]:
    """Names of the constructor's arguments."""
    module, name = class_path.rsplit(".", 1)
    yield from constructor_arguments(getattr(import_module(module), name))


def constructor_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class's constructor by name, the parents' included where it passes on ``**kwargs``."""
    found: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(cls):
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        for name, parameter in parameters.items():
            if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def _wanted(classes: list[str], keys: str) -> tuple[type, ...]:
    """What an argument of the class that was named last may be, as far as it says so."""
    if not classes:
        from lightning.pytorch import Callback, LightningDataModule, LightningModule

        kinds: dict[str, type] = {"model": LightningModule, "data": LightningDataModule, "trainer.callbacks": Callback}
        return (kinds[keys],) if keys in kinds else ()
    module, name = classes[-1].rsplit(".", 1)
    argument = constructor_arguments(getattr(import_module(module), name)).get(keys.rsplit(".", 1)[-1])
    return () if argument is None else tuple(_classes_in(argument.annotation))


def _classes_in(annotation: Any) -> Iterator[type]:
    arguments = get_args(annotation)
    if get_origin(annotation) is collections.abc.Callable:
        arguments = arguments[-1:]  # what it gives
    if isinstance(annotation, type) and not arguments:
        if annotation.__module__ not in ("builtins", "types", "typing", "inspect"):
            yield annotation
    for each in arguments:
        yield from _classes_in(each)


def _names(bases: Iterable[type]) -> list[str]:
    """Short names of the classes of these kinds that can be made."""
    found = {each for base in bases for each in (base, *_below(base)) if not inspect.isabstract(each)}
    return sorted(each.__name__ for each in found if not each.__name__.startswith("_"))


def _no_class(name: str, keys: str, wanted: tuple[type, ...]) -> str:
    names = _names(wanted)
    if name not in (known := list(_class_names(keys))):
        return _unknown(name, f"class for {keys}:", names or known)
    kinds = " or ".join(dict.fromkeys(f"a{'n' * (base.__name__[0] in 'AEIOU')} {base.__name__}" for base in wanted))
    listed = f"; known: {', '.join(names)}" if names and len(names) <= 20 else ""
    return f"{keys}: {name} is not {kinds or 'of the kind that is wanted here'}{listed}"


def _class_names(key: str) -> Iterator[str]:
    """Short names of every imported class that a YAML file may want at a key."""
    bases: tuple[type, ...]
    if key.rsplit(".", 1)[-1] in ("sampler", "pruner"):
        from optuna.pruners import BasePruner
        from optuna.samplers import BaseSampler

        bases = (BasePruner,) if key.endswith("pruner") else (BaseSampler,)
    elif key == "method":
        bases = (sys.modules["lightning_automl.search.policies"].PolicyMethod,)  # above this floor
    else:
        from lightning.pytorch import Callback, LightningDataModule
        from torch import nn
        from torch.optim import Optimizer
        from torch.optim.lr_scheduler import LRScheduler

        bases = (nn.Module, LightningDataModule, Callback, Optimizer, LRScheduler)
    for base in bases:
        yield from (found.__name__ for found in _below(base) if not found.__name__.startswith("_"))


def _names_below(name: str) -> list[str]:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

    bases: dict[str, type] = {base.__name__: base for base in (Callback, LightningDataModule, LightningModule)}
    return sorted(each.__name__ for each in _below(bases[name])) if name in bases else []


def _below(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _below(subclass)


def _type_words(expected: list[str]) -> str:
    """`a whole number or null` for what jsonargparse calls `<class 'int'>` and `<class 'NoneType'>`."""
    words = []
    for each in expected:
        each = re.sub(r"^an? ", "", each)
        if found := re.fullmatch(r"<class '([\w.]+)'>", each):
            words.append(TYPES.get(found[1], f"a {found[1]}"))
        elif found := re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", each):
            words.append(f"one of {found[1]}")
        else:
            words.append(each)
    return " or ".join(dict.fromkeys(words))
