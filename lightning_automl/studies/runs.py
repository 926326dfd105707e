"""Scoring a candidate by a run, or by one run a fold, of processes of the trial server."""

import errno
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml

from lightning_automl.rundir import DiskFullError, write_text
from lightning_automl.search.devices import Slice
from lightning_automl.search.study import Candidate, Infeasible, Misconfigured, TrialFailed, Unfinished
from lightning_automl.search.trials import Ending, TrialServer
from lightning_automl.studies.configs import TrialConfigs, of_fold

#: What the trial server calls in each rank; a name, since it stands above this floor.
RANK = "lightning_automl.trial:run"

#: Objectives that are no metric of the network's outputs, the smaller the better; latency in milliseconds.
COSTS = ("parameters", "flops", "latency")

_LAST = Path("checkpoints", "last.ckpt")


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
            Unfinished: If a segment of population based training was stopped by a limit.
            Misconfigured: If nothing logs a monitor, or the directory is of another study.
            DiskFullError: If the run found no space left.
        """
        config = self.configs.of_trial(candidate.values, candidate.attributes)
        place = self.directory / candidate.attributes["directory"]
        if self.folds is None:
            return self._values(self._whole(candidate, config, place), place)
        write_text(place / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        candidate.counts_itself = True  # a report is a fold's
        results: list[dict[str, float]] = []
        for fold in range(self.folds):
            own = of_fold(config, fold, self.folds)
            results.append(self._fold(candidate, own, place / f"fold-{fold}"))
            values = self._values(results[-1], place)
            if candidate.report(fold + 1, values[0], last=fold + 1 == self.folds):
                raise optuna.TrialPruned(f"pruned after fold {fold + 1} of {self.folds}")
        common = [name for name in results[0] if all(name in each for each in results)]
        means = {name: math.fsum(each[name] for each in results) / len(results) for name in common}
        candidate.note(**means)
        return self._values(means, place)

    def _whole(self, candidate: Candidate, config: dict[str, Any], place: Path) -> dict[str, float]:
        """Train one run that is pruned by its epochs; return its metrics."""
        until = candidate.attributes.get("until")  # of population based training: the trial is a segment of a run
        longest = until or config["trainer"].get("max_epochs") or -1

        def report(step: int, value: float) -> bool:
            return candidate.report(step, value, last=step == longest) or step == until

        parent = candidate.attributes.get("parent")
        self._go_on(candidate, place)
        if parent is not None and not (place / _LAST).exists():
            _take_over(self.place(parent), place, only=("last.ckpt",))
        # What the run that is continued had reported is known of it, but is no part of a segment.
        replay = candidate.replay if parent is None else None
        result = self._run(candidate, config, place, report, replay)
        metrics: dict[str, float] = result["metrics"]
        candidate.note(**metrics)
        if until is None:
            if result["status"] == "pruned":
                raise optuna.TrialPruned
            return metrics
        step, value = result["history"][-1] if result["history"] else (0, math.nan)
        if step != until:
            message = f"the run ended after epoch {step} of a segment that goes to {until}"
            raise Unfinished(message) if candidate.stopping else TrialFailed(message)
        return {**metrics, self.monitors[0]: value}

    def _fold(self, candidate: Candidate, config: dict[str, Any], place: Path) -> dict[str, float]:
        """Train one fold; return its metrics."""
        longest = config["trainer"].get("max_epochs")
        self._go_on(candidate, place)
        result = self._run(
            candidate, config, place, lambda step, value: candidate.trained(value) and step != longest, None
        )
        if result["status"] == "pruned":
            raise optuna.TrialPruned
        metrics: dict[str, float] = result["metrics"]
        return metrics

    def _go_on(self, candidate: Candidate, place: Path) -> None:
        """Let a trial that is tried again go on from the newest of those before it that has left a checkpoint."""
        inside = place.relative_to(self.directory / candidate.attributes["directory"])
        if place.exists() and (place / _LAST).exists():
            raise Misconfigured(f"{place} holds a trial of another study; give the former --storage, or another --dir")
        before = candidate.attributes.get("retry_of")
        while before is not None:
            source = self.place(before) / inside
            if (source / _LAST).exists():
                _take_over(source, place)
                return
            before = candidate.trial.study.get_trials(deepcopy=False)[before].user_attrs.get("retry_of")

    def place(self, number: int) -> Path:
        """The directory of a trial."""
        return self.directory / directory_of(number)

    def _values(self, metrics: Mapping[str, float], place: Path) -> list[float]:
        missing = [name for name in self.monitors if metrics.get(name) is None]
        if missing:
            known = ", ".join(sorted({*metrics, *COSTS}))
            raise Misconfigured(f"the run has no {' and no '.join(missing)}; known: {known}")
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
            environment=own.environment,
            on_message=answer,
            silence=self.silence,
            timeout=self.limit,
            stop=_Stop(candidate),
        )
        if ending.kind == "done":
            assert ending.result is not None
            if replay is not None and not started:  # it had finished before
                replay([(step, value) for step, value in ending.result["history"]])
            found = ending.result["metrics"]
            return {**ending.result, "metrics": {name: value for name, value in found.items() if value is not None}}
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
    if ending.exception == "DiskFullError":
        return DiskFullError(errno.ENOSPC, ending.reason)
    if ending.exception == "UnknownMetricError":
        return Misconfigured(ending.reason)
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
        only: Names of checkpoints to take, beside what a run keeps of frozen weights; all files when left out.
    """
    (target / "checkpoints").mkdir(parents=True, exist_ok=True)
    if only is not None and not all((source / "checkpoints" / name).exists() for name in only):
        raise TrialFailed(
            f"{source / 'checkpoints'} has no {' and no '.join(only)}: population based training needs the directories "
            "of all its trials; give --dir a place that all machines see"
        )
    for path in sorted((source / "checkpoints").glob("[!.]*")):
        new = target / "checkpoints" / path.name
        if (only is None or path.name in (*only, "base.safetensors")) and not new.exists():
            try:
                os.link(path, new)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, new)
    if only is None:
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith(".") and path.name != "output.txt":
                shutil.copyfile(path, target / path.name)
