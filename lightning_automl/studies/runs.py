"""Scoring a candidate by a run, or by one run a fold, of processes of the trial server."""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml

from lightning_automl.rundir import write_text
from lightning_automl.search.devices import Slice
from lightning_automl.search.study import Candidate, Infeasible, TrialFailed
from lightning_automl.search.trials import Ending, TrialServer
from lightning_automl.studies.configs import TrialConfigs, of_fold

#: What the trial server calls in each rank; a name, since it stands above this floor.
RANK = "lightning_automl.trial:run"

#: Objectives that a run does not have to be trained for; ``trial.py`` measures them.
COSTS = ("parameters", "flops", "latency")


class FitTrials:
    """Scores a candidate: writes ``trials/N/config.yaml``, trains it as a process group and returns its values.

    Args:
        server: Makes the processes.
        configs: Makes the configs.
        directory: Of the study.
        monitors: What the values are: metrics of the best epoch, or costs.
        slices: Devices and threads of each worker.
        ranks: Processes of a run.
        folds: Train on each of so many folds; the values are means over them, and a report is a fold's value.
        silence: Seconds without a sign of life of a rank after which a trial is killed.
        limit: Seconds that a run may take.
    """

    def __init__(
        self,
        server: TrialServer,
        configs: TrialConfigs,
        directory: Path,
        monitors: Sequence[str],
        slices: Sequence[Slice],
        ranks: int,
        *,
        folds: int | None = None,
        silence: float | None = 600.0,
        limit: float | None = None,
    ) -> None:
        self.server = server
        self.configs = configs
        self.directory = directory
        self.monitors = monitors
        self.slices = slices
        self.ranks = ranks
        self.folds = folds
        self.silence = silence
        self.limit = limit
        #: Called with a trial's number after its first training step.
        self.on_started: Callable[[int], None] | None = None

    def __call__(self, candidate: Candidate) -> list[float]:
        """The candidate's values, one a monitor.

        Raises:
            optuna.TrialPruned: If a report was answered by a stop.
            Infeasible: If the network, the data module or the trainer refuse the values.
            TrialFailed: If the run failed; the reason names its log.
        """
        config = self.configs.of_trial(candidate.values, candidate.attributes)
        place = self.directory / candidate.attributes["directory"]
        if self.folds is None:
            return self._values(self._whole(candidate, config, place), place)
        write_text(place / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        values = []
        for fold in range(self.folds):
            values.append(self._fold(candidate, of_fold(config, fold, self.folds), place / f"fold-{fold}"))
            means = [math.fsum(column) / len(values) for column in zip(*values, strict=True)]
            if candidate.report(fold + 1, values[-1][0], last=fold + 1 == self.folds):
                raise optuna.TrialPruned(f"pruned after fold {fold + 1} of {self.folds}")
        return means

    def _whole(self, candidate: Candidate, config: dict[str, Any], place: Path) -> dict[str, float]:
        """Train one run that is pruned by its epochs; return its metrics."""
        until = candidate.attributes.get("until")  # of population based training: the trial is a segment of a run
        values: list[float] = []

        longest = until or config["trainer"].get("max_epochs") or -1

        def report(step: int, value: float) -> bool:
            values.append(value)
            return candidate.report(step, value, last=step == longest) or step == until

        before, parent = candidate.attributes.get("retry_of"), candidate.attributes.get("parent")
        if before is not None and self.place(before).exists():
            _take_over(self.place(before), place)
        elif parent is not None:
            _take_over(self.place(parent), place, only=("last.ckpt",))
        # What the run that is continued had reported is known of it, but is no part of a segment.
        replay = candidate.replay if parent is None else None
        result = self._run(candidate, config, place, report, replay)
        if until is not None:
            if not values:  # killed after its last epoch
                values = [value for step, value in result["history"] if step == until]
            return {**result["metrics"], self.monitors[0]: values[-1]}
        if result["status"] == "pruned":
            raise optuna.TrialPruned
        metrics: dict[str, float] = result["metrics"]
        return metrics

    def _fold(self, candidate: Candidate, config: dict[str, Any], place: Path) -> list[float]:
        """Train one fold; return its values."""
        before = candidate.attributes.get("retry_of")
        if before is not None and (self.place(before) / place.name).exists():
            _take_over(self.place(before) / place.name, place)
        result = self._run(candidate, config, place, lambda step, value: candidate.trained(value), None)
        if result["status"] == "pruned":
            raise optuna.TrialPruned
        return self._values(result["metrics"], place)

    def place(self, number: int) -> Path:
        """The directory of a trial."""
        return self.directory / directory_of(number)

    def _values(self, metrics: Mapping[str, float], place: Path) -> list[float]:
        missing = [name for name in self.monitors if metrics.get(name) is None]
        if missing:
            known = ", ".join(sorted({*metrics, *COSTS}))
            raise TrialFailed(f"the run has no {' and no '.join(missing)}; known: {known} (see {place / 'log.txt'})")
        return [float(metrics[name]) for name in self.monitors]

    def _run(
        self,
        candidate: Candidate,
        config: dict[str, Any],
        place: Path,
        report: Callable[[int, float], bool],
        replay: Callable[[list[tuple[int, float]]], None] | None,
    ) -> dict[str, Any]:
        """Train one config in its directory.

        Args:
            candidate: Whose worker trains it.
            config: Of the run.
            place: Its directory.
            report: Told each new epoch; answers whether to stop.
            replay: Told the epochs that the run had reported before it was continued.
        """
        write_text(place / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        own = self.slices[candidate.slot]
        started = False

        def answer(message: dict[str, Any]) -> Any:
            nonlocal started
            if "started" in message:
                started = True
                if self.on_started is not None:
                    self.on_started(candidate.number)
            if "report" not in message:
                return None
            if not started:  # of the epochs before the checkpoint that the run goes on from
                if replay is not None:
                    replay([(message["step"], message["report"])])
                return message["step"] == candidate.attributes.get("until")
            return report(message["step"], message["report"])

        ending = self.server.run(
            {
                "do": "fit",
                "directory": str(place.resolve()),
                "watch": self.configs.watch,
                "costs": [name for name in self.monitors if name in COSTS],
            },
            ranks=self.ranks,
            threads=own.threads,
            log=place / "output.txt",
            environment={"CUDA_VISIBLE_DEVICES": ",".join(own.gpus)} if own.gpus else {},
            on_message=answer,
            silence=self.silence,
            timeout=self.limit,
            stop=_Stop(candidate),
        )
        if ending.kind == "done":
            assert ending.result is not None
            if replay is not None and not started:  # it had finished before
                replay([(step, value) for step, value in ending.result["history"]])
            candidate.note(**{name: value for name, value in ending.result["metrics"].items() if value is not None})
            return ending.result
        raise _failure(ending, started, place)


class _Stop:
    """Whether the search has no use for a candidate any more, as the trial server asks for it."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate

    def is_set(self) -> bool:
        return self._candidate.taken or self._candidate.interrupted.is_set()


def directory_of(number: int) -> str:
    """Where a trial's files are, relative to the study's directory."""
    return f"trials/{number:04d}"


def _failure(ending: Ending, started: bool, place: Path) -> Exception:
    """What a failed run means: that its values cannot be built, or a sentence and where to read more."""
    if ending.exception in ("UserError", "MisconfigurationException") and not started:
        return Infeasible(ending.reason)
    memory = ending.exception in ("OutOfMemoryError", "MemoryError") or "out of memory" in ending.reason.lower()
    return TrialFailed(f"{'out of memory: ' if memory else ''}{ending.reason} (see {place / 'output.txt'})")


def _take_over(source: Path, target: Path, only: Sequence[str] | None = None) -> None:
    """Let a run go on from what another one has left.

    Checkpoints are linked, since they are replaced as a whole and never changed; the rest is copied.

    Args:
        source: The directory of the other run.
        target: That of the run.
        only: Names of checkpoints to take; all files when left out.
    """
    (target / "checkpoints").mkdir(parents=True, exist_ok=True)
    if only is not None and not all((source / "checkpoints" / name).exists() for name in only):
        raise TrialFailed(
            f"{source / 'checkpoints'} has no {' and no '.join(only)}: population based training needs the directories "
            "of all its trials; give --dir a place that all machines see"
        )
    for path in sorted((source / "checkpoints").glob("[!.]*")):
        new = target / "checkpoints" / path.name
        if (only is None or path.name in only) and not new.exists():
            try:
                os.link(path, new)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, new)
    if only is None:
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith(".") and path.name != "output.txt":
                shutil.copyfile(path, target / path.name)
