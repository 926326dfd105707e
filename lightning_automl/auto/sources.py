"""Where the images come from: what DATA means, and the data module for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.rundir import UserError

_KNOWN = (
    "DATA is digits, a folder with one sub-folder a class or with a labels.csv, an .npz file in the MedMNIST layout, "
    "or a YAML file with a data module"
)
#: Arguments of data modules that belong to training, which the strategy decides.
_OF_TRAINING = (
    *("batch_size", "base_augment", "train_policy", "fold", "folds", "without_folds", "train_on_val", "sampling"),
    *("predict_split", "arch_fraction", "arch_augment"),
)


def find_data(data: str) -> tuple[str, dict[str, Any], list[str]]:
    """Which data module DATA means.

    Args:
        data: See :func:`~lightning_automl.auto.look.look`.

    Returns:
        Its class, its arguments, with absolute paths, and the names of those that are not followed, since they belong
        to training.

    Raises:
        UserError: If there is no such file, or it is of no known kind.
    """
    if data == "digits":
        return "lightning_automl.data.DigitsDataModule", {}, []
    path = Path(data).expanduser()
    if path.is_dir():
        return "lightning_automl.data.FolderDataModule", {"path": str(path.resolve())}, []
    if not path.is_file():
        raise UserError(f"there is no folder or file {data}; {_KNOWN}")
    if path.suffix.lower() in (".yaml", ".yml"):
        return _from_yaml(path)
    if path.suffix.lower() == ".npz":
        return "lightning_automl.data.ArraysDataModule", {"path": str(path.resolve())}, []
    hint = f"give the folder {path.parent} instead; " if path.suffix.lower() == ".csv" else ""
    raise UserError(f"{data} is a file of another kind; {hint}{_KNOWN}")


def _from_yaml(path: Path) -> tuple[str, dict[str, Any], list[str]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct it") from error
    if isinstance(content, Mapping) and "data" in content:
        content = content["data"]
    if isinstance(content, str):
        content = {"class_path": content}
    if not isinstance(content, Mapping) or not isinstance(content.get("class_path"), str):
        raise UserError(f"{path} names no data module; it needs class_path and init_args, or these below the key data")
    given = content.get("init_args") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"init_args in {path} are {given!r}; they are a mapping of names and values")
    arguments = {key: value for key, value in given.items() if key not in _OF_TRAINING}
    for key in ("path", "labels", "cache"):
        value = arguments.get(key)
        if isinstance(value, str) and (key != "cache" or value != "auto"):
            # as a fit config has it, from where the command is given; or else beside the file
            places = (Path(value).expanduser(), path.parent / value)
            found = next((place for place in places if place.exists()), None)
            if found is not None:
                arguments[key] = str(found.resolve())
    return content["class_path"], arguments, sorted(given.keys() - arguments.keys())


def build_data(class_path: str, arguments: Mapping[str, Any]) -> Any:
    """The data module, as a config makes it.

    Raises:
        UserError: If the class or an argument is unknown, or the data module refuses.
    """
    import jsonargparse
    from lightning.pytorch import LightningDataModule

    import lightning_automl.data as ours

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    try:
        parsed = parser.parse_object({"data": {"class_path": class_path, "init_args": dict(arguments)}})
    except jsonargparse.ArgumentError as error:
        raise UserError(one_sentence(error, parser)) from error
    try:
        module = parser.instantiate(parsed).data
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, UserError) or not isinstance(cause, ValueError):
            raise cause from error
        raise UserError(one_sentence(cause, parser)) from error
    if not isinstance(module, ours.ImageDataModule):
        raise UserError(
            f"{class_path} is no ImageDataModule, so that it can be cut into no folds; make it a subclass of that"
        )
    return module


def class_path_of(module: Any) -> str:
    """Where the class can be imported from, as short as possible."""
    import lightning_automl.data as ours

    kind = type(module)
    if getattr(ours, kind.__name__, None) is kind:
        return f"lightning_automl.data.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
