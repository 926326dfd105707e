"""What every ``search`` command does: hold its directory, resolve the run, look at mistakes first, keep what it is."""

import contextlib
import logging
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results import report
from lightning_automl.rundir import (
    UserError,
    differences,
    lock,
    new_directory,
    remove_partial_files,
    summarise,
    write_text,
)
from lightning_automl.search.devices import slices, visible_gpus
from lightning_automl.search.study import StudyFailed
from lightning_automl.search.trials import TrialServer
from lightning_automl.search_config import METHOD_KEYS, NOT_OF_METHODS, SearchConfig, plain
from lightning_automl.studies.workers import answer_of

log = logging.getLogger("lightning_automl")


class SearchCommand(ABC):
    """One ``search`` command.

    Args:
        config: What was given.
        server: Makes the processes of its runs.
        held: Closes what the command opens.
    """

    #: Keys that may change when a search is continued; those of ``growing`` may only grow.
    changeable: ClassVar[tuple[str, ...]] = (
        "timeout",
        "workers",
        "storage",
        "retrain",
        "hang_timeout",
        "trial_timeout",
    )
    growing: ClassVar[tuple[str, ...]] = ("trials", "epochs")

    def __init__(self, config: SearchConfig, server: TrialServer, held: contextlib.ExitStack) -> None:
        self.config = config
        self.given = config.given
        self.server = server
        self.held = held

    def __call__(self, log_to: Callable[[Path], None]) -> None:
        """Search, and leave in the directory what was found."""
        given = self.given
        scratch = Path(self.held.enter_context(tempfile.TemporaryDirectory()))
        gpus = visible_gpus()
        if given.dir is not None and not self.config.dry:
            self._claim(Path(given.dir), log_to)
        resolved = self._ask(
            do="resolve",
            arguments=self.config.run_arguments,
            before=self._run_before(),
            monitors=self.config.monitors,
            gpus=len(gpus) // given.workers,
            seed=given.seed,
        )
        self.base: dict[str, Any] = resolved["config"]
        self.monitors: list[str] = resolved["monitors"]
        self.directions = self.config.directions(resolved["directions"])
        self.ranks: int = resolved["ranks"]
        on_gpu = self.base["trainer"]["accelerator"] != "cpu"
        self.slices = slices(given.workers, self.ranks, gpus if on_gpu else (), _cores())
        self._check(scratch)
        if self.config.dry:
            self._show()
            print("nothing was trained")
            return
        if given.dir is None:
            self._claim(new_directory(self.config.name), log_to)
        self._settle()
        self._search(resolved["environment"])

    @abstractmethod
    def _check(self, scratch: Path) -> None:
        """Refuse what cannot be searched, before anything is written or trained."""

    @abstractmethod
    def _show(self) -> None:
        """Print what would be done."""

    @abstractmethod
    def _search(self, environment: Mapping[str, Any]) -> None:
        """Search; the directory is ours, and says what the search is."""

    def _ask(self, **payload: Any) -> dict[str, Any]:
        """Let a process of the trial server answer; its mistakes are the user's."""
        return answer_of(self.server, payload)

    def _claim(self, directory: Path, log_to: Callable[[Path], None]) -> None:
        """Hold the directory for this command."""
        saved = directory / "config.yaml"
        if saved.exists() and not {"space", "method"} & (yaml.safe_load(saved.read_text()) or {}).keys():
            raise UserError(f"{directory} is the directory of a run, not of a search; give another --dir")
        strange = {path.name for path in directory.glob("[!.]*")} - {"log.txt", "study.db"}
        if strange and not saved.exists():
            raise UserError(
                f"{directory} is not the directory of a search and not empty (it holds {min(strange)}); "
                "give another --dir"
            )
        self.held.enter_context(lock(directory))
        remove_partial_files(directory)
        self.directory = directory
        log_to(directory / "log.txt")

    def _run_before(self) -> dict[str, Any] | None:
        """The resolved run that the search was started with, if it is continued."""
        saved = None if self.given.dir is None else Path(self.given.dir) / "config.yaml"
        if saved is None or not saved.exists():
            return None
        run: dict[str, Any] | None = (yaml.safe_load(saved.read_text()) or {}).get("run")
        return run

    def _resolved(self) -> dict[str, Any]:
        """The search as it is kept: with the whole run, without the directory."""
        left_out = {"config", "dir", *(NOT_OF_METHODS if self.config.method else METHOD_KEYS)}
        kept = {key: value for key, value in plain(self.given).items() if key not in left_out}
        return kept | {
            "run": self.base,
            "monitor": self.monitors,
            "direction": self.directions,
            "name": self.config.name,
        }

    def _settle(self) -> None:
        """Write down what the search is, after looking whether the directory takes it."""
        saved = self.directory / "config.yaml"
        now = yaml.safe_load(yaml.safe_dump(self._resolved()))
        if saved.exists():
            for key, (old, new) in differences(yaml.safe_load(saved.read_text()), now).items():
                if key in self.growing and (new is None or (old is not None and new >= old)):
                    continue
                if key in self.growing:
                    raise UserError(
                        f"{self.directory} was started with {key}={old}, now it is {new}; limits can only grow"
                    )
                if key.split(".")[0] not in self.changeable:
                    raise UserError(
                        f"{self.directory} was started with {key}={old}, now it is {new}; give the former value to "
                        "continue it, or another --dir to start anew"
                    )
        write_text(saved, yaml.safe_dump(now, sort_keys=False))

    @contextlib.contextmanager
    def _noting_failure(self, write: Callable[[], Any]) -> Iterator[None]:
        """Leave in the summary why the search did not come to its end, and in the tables how far it came.

        Args:
            write: Writes the tables.
        """
        self.started = time.monotonic()
        try:
            yield
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_sentence(root_cause(error))
            with contextlib.suppress(OSError):  # the disk may be full, which is what is being reported
                summarise(self.directory, "search", "failed", seconds=time.monotonic() - self.started, reason=reason)
            try:
                write()
                if isinstance(error, StudyFailed):
                    report(self.directory)
            except Exception as other:  # the first one is told
                log.debug("the tables were not written: %s", other)
            raise

    def _finish(self, metrics: Mapping[str, float], opened: int, names: tuple[str, ...]) -> None:
        """Write the summary and the report.

        Args:
            metrics: By name.
            opened: How often the test split was opened.
            names: Files that the search may have left.
        """
        names = (*names, "report.html")
        left = {
            f"{Path(name).stem}_picture" if name.endswith(".png") else Path(name).stem: name
            for name in names
            if (self.directory / name).exists() or name == "report.html"
        }
        summarise(
            self.directory,
            "search",
            "finished",
            metrics=metrics,
            seconds=time.monotonic() - self.started,
            opened=opened,
            artefacts=left,
            forget="test_",
        )
        report(self.directory)


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def _cores() -> int:
    return len(os.sched_getaffinity(0))
