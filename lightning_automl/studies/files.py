"""What a search keeps of its study in its directory while it goes on, and what it tells of it."""

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import optuna
import yaml
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from lightning_automl.rundir import write_text
from lightning_automl.search.records import best_trials, write_records
from lightning_automl.search.workers import counts
from lightning_automl.studies.configs import TrialConfigs
from lightning_automl.studies.progress import bar

log = logging.getLogger("lightning_automl")

#: Writing takes longer with each trial; between two times this much longer passes than the last one took.
_REST = 20.0


class StudyFiles:
    """Keeps ``best.yaml``, ``trials.csv`` and ``study.json`` up to date, and tells how each trial has ended.

    A context manager: within it a terminal shows how far the search is.

    Args:
        study: The study.
        configs: Make the config of the best trial.
        directory: Of the study.
        monitors: What the values are.
        search: The resolved search config, for ``study.json``.
        storage: URL to show, without a password.
        trials: How many there will be, if that is known.
    """

    def __init__(
        self,
        study: optuna.Study,
        configs: TrialConfigs,
        directory: Path,
        monitors: Sequence[str],
        search: Mapping[str, Any],
        storage: str,
        trials: int | None,
    ) -> None:
        self.study = study
        self.configs = configs
        self.directory = directory
        self.monitors = monitors
        self.search = search
        self.storage = storage
        self.trials = trials
        self._due = 0.0
        self._best: int | None = None
        self._held = contextlib.ExitStack()
        self._advance: Callable[[int, str], None] = lambda done, best: None

    def __enter__(self) -> Self:
        self._advance = self._held.enter_context(bar("trials", self.trials))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.close()

    def changed(self, trial: FrozenTrial) -> None:
        """Take notice of a trial that has ended."""
        best = self.best()
        done = sum(counts(each) and each.state.is_finished() for each in self.study.get_trials(deepcopy=False))
        top = ""
        if len(best) == 1:
            top = f"best {best[0].values[0]:.4g} (trial {best[0].number})"
        elif best:
            top = f"{len(best)} on the front"
        parts = [f"trial {trial.number} {trial.state.name}", self._values(trial, 4), trial.user_attrs.get("reason")]
        log.info(
            "%d%s: %s (%.0f s)%s",
            done,
            f"/{self.trials}" if self.trials else "",
            ", ".join(part for part in parts if part),
            trial.user_attrs.get("seconds", 0.0),
            f"; {top}" if top else "",
        )
        self._advance(done, top)
        if best and best[0].number != self._best:
            self._write_best(best[0])
        if time.monotonic() >= self._due:
            self.write(final=False)

    def write(self, final: bool = True) -> None:
        """Write the tables; the importances that take long only at the end."""
        start = time.monotonic()
        if best := self.best():
            self._write_best(best[0])
        write_records(
            self.study,
            self.configs.space,
            self.directory,
            monitors=self.monitors,
            search=self.search,
            storage=self.storage,
            fanova=final,
        )
        self._due = time.monotonic() + max(2.0, _REST * (time.monotonic() - start))

    def best(self) -> list[FrozenTrial]:
        """The best trial; with several objectives the Pareto front, the best by the first monitor first."""
        sign = 1 if self.study.directions[0] == StudyDirection.MINIMIZE else -1
        return sorted(best_trials(self.study), key=lambda trial: (sign * trial.values[0], trial.number))

    def config_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """What ``best.yaml`` would hold if this trial were the best."""
        return self.configs.trained(trial.params, trial.user_attrs)

    def _values(self, trial: FrozenTrial, digits: int) -> str:
        values = trial.values or ()
        return ", ".join(f"{name} {_number(value, digits)}" for name, value in zip(self.monitors, values, strict=False))

    def _write_best(self, trial: FrozenTrial) -> None:
        path = self.directory / "best.yaml"
        command = f"lightning-automl fit --config {shlex.quote(str(path))}"
        about = f"Trial {trial.number} of study {self.study.study_name}: {self._values(trial, 6)}"
        if len(self.monitors) > 1:
            about += f"; the best {self.monitors[0]} on the Pareto front"
        config = yaml.safe_dump(self.config_of(trial), sort_keys=False, allow_unicode=True)
        write_text(path, f"# {command}\n# {about}\n{config}")
        self._best = trial.number


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.{digits}g}"
