"""One HTML page about a run, a search or a strategy that needs nothing beside itself."""

import logging
from collections.abc import Sequence
from pathlib import Path

from lightning_automl.results.ensemble import is_of_auto
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Section, write_page
from lightning_automl.results.policy_search import PolicySearchRecord, is_policy_search
from lightning_automl.results.run import Run
from lightning_automl.results.sections import SECTIONS, verdict
from lightning_automl.results.sections import policy_search as of_policies
from lightning_automl.results.sections import strategy as of_strategy
from lightning_automl.results.sections import study as of_study
from lightning_automl.results.strategy import StrategyRecord
from lightning_automl.results.study import StudyRecord, is_study
from lightning_automl.rundir import check_target

log = logging.getLogger("lightning_automl")


def report(directory: str | Path) -> Path:
    """Write ``report.html`` into the directory of a run, a search or `auto`, finished or not, and return its path.

    The page needs no network: pictures and styles are inside. Nothing is trained or evaluated for it, and the test
    split stays as often opened as it was: it reads what the run or the search has written, and of a run's data a few
    images to show.

    Args:
        directory: Of a run, of a study, of a search for a policy, or of `auto`.

    Raises:
        UserError: If it is none of these.
    """
    directory = Path(directory)
    if is_of_auto(directory):
        sentences, sections = _of_strategy(directory)
    elif is_policy_search(directory):
        sentences, sections = _of_policy_search(directory)
    else:
        sentences, sections = (_of_study if is_study(directory) else _of_run)(directory)
    path = directory / "report.html"
    write_page(path, directory.resolve().name, sentences, sections)
    log.info("%s: %s", path, " ".join(sentences))
    return path


def _of_run(directory: Path) -> tuple[Sequence[str], list[Section]]:
    evidence = Evidence(Run.read(directory))
    check_target(directory / "report.html")  # before the work
    return verdict(evidence), [section for make in SECTIONS if (section := make(evidence)) is not None]


def _of_study(directory: Path) -> tuple[Sequence[str], list[Section]]:
    record = StudyRecord.read(directory)
    check_target(directory / "report.html")
    return of_study.verdict(record), [section for make in of_study.SECTIONS if (section := make(record)) is not None]


def _of_strategy(directory: Path) -> tuple[Sequence[str], list[Section]]:
    record = StrategyRecord.read(directory)
    check_target(directory / "report.html")
    return of_strategy.page(record)


def _of_policy_search(directory: Path) -> tuple[Sequence[str], list[Section]]:
    record = PolicySearchRecord.read(directory)
    check_target(directory / "report.html")
    if (directory / "study.json").exists():
        return of_policies.page_with_study(record, StudyRecord.read(directory))
    return of_policies.verdict(record), [
        section for make in of_policies.SECTIONS if (section := make(record)) is not None
    ]
