"""LightningCLI's parser with what we want otherwise from jsonargparse."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonargparse
from jsonargparse import _typehints
from lightning.pytorch.cli import LightningArgumentParser

from lightning_automl.models import load_genotype
from lightning_automl.results.ensemble import is_of_auto
from lightning_automl.rundir import UserError

log = logging.getLogger(__name__)


class Parser(LightningArgumentParser):
    """Raises its errors instead of exiting, and takes no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # jsonargparse takes `--trainer.max_epoch` for `--trainer.max_epochs`; a misspelt key must be an error.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False, "exit_on_error": False})

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse; a null for an argument of a class within a class, which jsonargparse (4.53) makes a text, stays one.

        It parses such a value first and then hands ``--name=None`` to the parser of the inner class.
        """
        if isinstance(args, list) and len(args) == 1 and "namespace" in kwargs:
            args = [args[0].removesuffix("=None") + "=null" if args[0].endswith("=None") else args[0]]
        return super().parse_args(args, *rest, **kwargs)


def adapt_jsonargparse() -> None:
    """Change two rules of jsonargparse that have no option; both are guarded by tests on the installed version.

    A class that takes the place of another starts from its own defaults. jsonargparse (4.53) keeps those arguments that
    the new class also accepts, so that SGD after AdamW would silently have AdamW's weight decay.

    A short class name that both this package and another one have means this package's: ``ResNet`` would else be
    ambiguous, since torchmetrics imports torchvision.
    """
    _typehints.discard_init_args_on_class_path_change = _forget_arguments
    _typehints.resolve_class_path_by_name = _resolve


def _forget_arguments(parser_or_action: Any, previous: Any, value: Any) -> None:
    if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
        previous["init_args"] = jsonargparse.Namespace()  # type: ignore[no-untyped-call]


_resolve_or_refuse = _typehints.resolve_class_path_by_name


def _resolve(cls: Any, name: str) -> str:
    try:
        return str(_resolve_or_refuse(cls, name))
    except ValueError:
        paths = _typehints.get_all_subclass_paths(cls)
        ours = [path for path in paths if path.startswith("lightning_automl.") and path.endswith(f".{name}")]
        if len(ours) != 1:
            raise
        return str(ours[0])


def keep_genotypes(config: jsonargparse.Namespace, before: Mapping[str, Any] | None = None) -> None:
    """Let a configuration hold the genotypes of its networks, and not where they came from, which may go or change.

    The content of a file is there already: jsonargparse reads it where the type is a mapping (guarded by a test). This
    is about the directories of searches, and about what is not there any more when a run goes on.

    Args:
        config: Of a sub-command; changed in place.
        before: The configuration that the run was started with, whose genotype takes the place of one that is gone.
    """
    for key, value in list(config.items()):
        if not key.endswith(".init_args.genotype") or not isinstance(value, str):
            continue
        former: Any = before
        for part in key.split("."):
            former = former.get(part) if isinstance(former, Mapping) else None
        if (Path(value) / "genotype.json").is_file():
            config[key] = load_genotype(value).to_dict()
        elif isinstance(former, Mapping) and not Path(value).exists():
            log.info("the genotype %s is not there any more; taking that of the run", value)
            config[key] = dict(former)


def with_saved_config(arguments: list[str]) -> list[str]:
    """Let a command on an existing run directory read the configuration that is kept there.

    Raises:
        UserError: If ``validate``, ``test`` or ``predict`` is given a directory that is no run directory.
    """
    command, *rest = arguments
    if any(argument.split("=")[0] in ("--config", "-c", "-h", "--help") for argument in rest):
        return arguments
    directory = None
    for index, argument in enumerate(rest):
        if argument == "--dir" and index + 1 < len(rest):
            directory = Path(rest[index + 1])
        elif argument.startswith("--dir="):
            directory = Path(argument.removeprefix("--dir="))
    if directory is None:
        if command != "fit":
            raise UserError(f"{command} needs the directory of a run; give --dir")
        return arguments
    config = directory / "config.yaml"
    if is_of_auto(directory):
        raise UserError(
            f"{directory} is the directory of auto, which holds many runs; give {command} the --dir of one of those "
            f"below {directory / 'runs'}"
        )
    if any((directory / name).exists() for name in ("study.json", "density")):
        part = "folds/0" if (directory / "folds").is_dir() else "trials/0000"
        raise UserError(
            f"{directory} is the directory of a search; give {command} the --dir of one of its runs, as "
            f"{directory / part}, or fit its best config by --config {directory / 'best.yaml'}"
        )
    if config.exists():
        return [command, "--config", str(config), *rest]
    if command != "fit":
        raise UserError(f"{directory} is not a run directory: it has no config.yaml; give the --dir of a fit")
    return arguments
