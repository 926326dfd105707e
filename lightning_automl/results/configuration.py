"""What of a run's configuration differs from the defaults."""

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from lightning_automl.mistakes import constructor_arguments

#: What `fit` does unless told otherwise, beside the defaults of the classes.
RUN_DEFAULTS: dict[str, Any] = {
    "seed_everything": 0,
    "monitor": "val_accuracy",
    "mode": None,
    "test_after_fit": True,
    "checkpoint_every_n_steps": None,
}
TRAINER_DEFAULTS: dict[str, Any] = {"num_sanity_val_steps": 0, "logger": False, "max_epochs": 20}


class Setting(NamedTuple):
    """A value of a configuration, with the default that it replaces; the default is "" where there is none."""

    key: str
    value: Any
    default: Any


def differing_settings(config: Mapping[str, Any]) -> list[Setting]:
    """The values of a run's ``config.yaml`` that differ from what `fit` would do without them, and all classes chosen.

    Args:
        config: As read from ``config.yaml``; keys of a class that cannot be imported any more all count as differing.
    """
    found: list[Setting] = []
    for key in ("model", "data"):
        if config.get(key):
            found += _of_class(key, config[key])
    found += _of_mapping("trainer", config.get("trainer") or {}, _trainer_defaults())
    top = {key: config[key] for key in RUN_DEFAULTS if key in config}
    return [*found, *_of_mapping("", top, RUN_DEFAULTS)]


def _trainer_defaults() -> dict[str, Any]:
    from lightning.pytorch import Trainer

    # Lightning's defaults that the config spells out as what they mean
    meant = {"enable_autolog_hparams": True}
    return {name: each.default for name, each in constructor_arguments(Trainer).items()} | meant | TRAINER_DEFAULTS


def _of_class(key: str, spec: Any) -> Iterator[Setting]:
    if not (isinstance(spec, Mapping) and "class_path" in spec):
        yield Setting(key, spec, "")
        return
    module, _, name = spec["class_path"].rpartition(".")
    yield Setting(key, name, "")
    try:
        target = getattr(import_module(module), name)
        arguments = constructor_arguments(target) if isinstance(target, type) else {}
    except Exception:  # importing somebody's module may raise anything
        arguments = {}
    defaults = {name: parameter.default for name, parameter in arguments.items()}
    yield from _of_mapping(key, spec.get("init_args") or {}, defaults)


def _of_mapping(prefix: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Setting]:
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping) and "class_path" in value:
            yield from _of_class(key, value)
        elif isinstance(value, list) and any(isinstance(each, Mapping) and "class_path" in each for each in value):
            for index, each in enumerate(value):
                yield from _of_class(f"{key}.{index}", each)
        else:
            default = defaults.get(name, inspect.Parameter.empty)
            if default is inspect.Parameter.empty:
                yield Setting(key, value, "")
            elif _plain(value) != _plain(default):
                yield Setting(key, value, default)


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
