"""From the values of a trial to the config of its run, and back to the config that a user trains."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_automl.rundir import UserError
from lightning_automl.search.spaces import Space

SCHEDULE = "lightning_automl.callbacks.hyperparameter_schedule.HyperparameterSchedule"
_OPTIMIZER = "model.init_args.optimizer.init_args."


class TrialConfigs:
    """Makes the config of a run from the values of a trial.

    Args:
        base: The resolved config that the study varies.
        space: What of it is varied.
        watch: Metric whose best epoch is the run's, or None when only costs are to be small.
        direction: ``minimize`` or ``maximize`` for it.
        directory: Of the study; large sets of image files are decoded once for all trials below it.
        scheduled: Whether values may change while a run trains (population based training).

    Raises:
        UserError: If values that change while a run trains are no arguments of its optimizer.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        space: Space,
        watch: str | None,
        direction: str,
        directory: Path,
        scheduled: bool = False,
    ) -> None:
        self.base = base
        self.space = space
        self.watch = watch
        self.mode = direction.removesuffix("imize")
        self.directory = directory
        self.scheduled = scheduled
        if scheduled:
            for name, parameter in space.parameters.items():
                if not parameter.path.startswith(_OPTIMIZER) or "." in parameter.path.removeprefix(_OPTIMIZER):
                    raise UserError(
                        f"{name} is not an argument of the optimizer ({_OPTIMIZER}…): population based training "
                        "changes values while a run trains, and this one is built into it; use another sampler"
                    )

    def trained(self, values: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The config to train with these values, otherwise that of the study's run.

        Args:
            values: By name of the space.
            attributes: Of the trial; ``schedule`` is a list of values by the epoch from which they hold.
        """
        schedule = attributes.get("schedule") if self.scheduled else None
        config = self.space.apply(self.base, schedule[0]["values"] if schedule else values)
        if schedule:
            segments = [
                {"from_epoch": each["from_epoch"], "values": self._optimizer_values(each["values"])}
                for each in schedule
            ]
            callback = {"class_path": SCHEDULE, "init_args": {"segments": segments}}
            config["trainer"]["callbacks"] = [*_callbacks(config), callback]
        if self.watch is not None:
            config |= {"monitor": self.watch, "mode": self.mode}
        return config

    def of_trial(self, values: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the trial's run: the same, but the test split stays closed."""
        return closed(self.trained(values, attributes), self.directory)

    def _optimizer_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self.space.parameters[name].path.removeprefix(_OPTIMIZER): value for name, value in values.items()}


def shared_cache(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The config with images that are decoded once for all runs of a study, if they are kept on disk."""
    changed = copy.deepcopy(dict(config))
    arguments = (changed.get("data") or {}).get("init_args") or {}
    if arguments.get("cache") == "auto":
        arguments["cache"] = str(directory.resolve() / "cache")
    return changed


def of_fold(config: Mapping[str, Any], fold: int, folds: int, without: Sequence[int] = ()) -> dict[str, Any]:
    """The config of a run on one fold; it does without the images of other folds."""
    return _with_data(config, fold=fold, folds=folds, **({"without_folds": list(without)} if without else {}))


def with_policy(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The config of a run that is trained with the policy in a file.

    A file and not the policy itself: as arguments of a class it would come back in other words from the parser, and a
    run that goes on would be refused.
    """
    return _with_data(config, train_policy=str(file.resolve()))


def of_seed(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The config of a run on train and val together with a seed, which opens the test split once at its end.

    The last epoch counts: there is no split left by which another could be chosen, or training be stopped early.
    """
    final = to_its_end(_with_data(config, train_on_val=True))
    final |= {"seed_everything": seed, "test_after_fit": True}
    final["trainer"]["limit_val_batches"] = 0
    return final


def to_its_end(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run of which the last epoch counts: nothing stops it early."""
    whole = copy.deepcopy(dict(config))
    whole["trainer"]["callbacks"] = [
        each for each in _callbacks(whole) if not each["class_path"].endswith(".EarlyStopping")
    ]
    return whole


def closed(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The config of a run of a search: the test split stays closed, and images are decoded once for all runs."""
    changed = shared_cache(config, directory)
    changed["test_after_fit"] = False
    changed["trainer"]["enable_progress_bar"] = False
    return changed


def _callbacks(config: Mapping[str, Any]) -> list[Any]:
    found = config["trainer"].get("callbacks") or []
    return found if isinstance(found, list) else [found]


def _with_data(config: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    if not changed.get("data"):
        raise UserError(
            f"the run has no data module, so that {', '.join(arguments)} cannot be set; give it one as data"
        )
    changed["data"]["init_args"] = {**(changed["data"].get("init_args") or {}), **arguments}
    return changed
