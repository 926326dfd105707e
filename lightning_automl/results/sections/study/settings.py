"""How a study was made, and how to go on from it."""

import json
import shlex
from collections.abc import Mapping

from lightning_automl.results.page import Commands, Section
from lightning_automl.results.sections.provenance import version_table
from lightning_automl.results.sections.searches import settings_section
from lightning_automl.results.sections.study.verdict import SEEDS
from lightning_automl.results.study import StudyRecord

#: Trials that a finished search may be given more.
_MORE = 50


def settings(record: StudyRecord) -> Section:
    """All settings of the search, and on a click those of the run that it varies."""
    elsewhere = ("run", "space", "name", "storage", "enqueued_default")
    own = {key: value for key, value in record.search.items() if key not in elsewhere}
    rows = [["study", record.name], ["storage", record.storage or "unknown"]]
    return settings_section(rows, own, record.search.get("run"), "The run that is varied")


def versions(record: StudyRecord) -> Section | None:
    """What has to be the same for the same numbers."""
    return version_table(record.environment)


def commands(record: StudyRecord) -> Section:
    """How to train what was found, to go on, and to look into the study."""
    directory = shlex.quote(str(record.directory))
    lines = []
    if record.best:
        which = f"    # trial {record.best[0]}" if record.several else ""
        lines.append(f"lightning-automl fit --config {directory}/best.yaml --dir {directory}-best{which}")
    for number in record.best[1:3] if record.several else ():
        place = f"{directory}/{record.by_number[number].directory or f'trials/{number:04d}'}"
        lines.append(
            f"lightning-automl fit --config {place}/config.yaml --test_after_fit true --dir {directory}-{number}"
        )
    if not record.finished:
        lines.append(f"lightning-automl search --dir {directory}    # goes on")
    elif not record.population and not _exhaustive(record):
        # Lost ones do not count.
        counted = len(record.of_state("COMPLETE", "PRUNED", "REFUSED", "FAIL"))
        lines.append(f"lightning-automl search --dir {directory} --trials {counted + _MORE}    # {_MORE} more")
    if record.best:
        lines.append(f"lightning-automl search --dir {directory} --retrain {SEEDS}    # opens the test split")
    return Section("Commands", [Commands([*lines, *_looking(record)])])


def _exhaustive(record: StudyRecord) -> bool:
    """Whether the sampler has visited all there is."""
    sampler = record.search.get("sampler")
    name = sampler.get("class_path") if isinstance(sampler, Mapping) else sampler
    return str(name).rsplit(".", 1)[-1] in ("GridSampler", "BruteForceSampler")


def _looking(record: StudyRecord) -> list[str]:
    """Lines for Optuna's dashboard and for Python."""
    url = record.storage
    if not url:
        return []
    password = "    # with the password for ***" if "***" in url else ""
    shown, opened, imports = url, _literal(url), "import optuna"
    if url.startswith("journal:"):
        shown = url.removeprefix("journal:").removeprefix("//")
        opened = f"JournalStorage(JournalFileBackend({_literal(shown)}))"
        imports += (
            "; from optuna.storages import JournalStorage; from optuna.storages.journal import JournalFileBackend"
        )
    elif url.startswith("grpc:"):
        shown = ""
        host, _, port = url.removeprefix("grpc://").rpartition(":")
        opened = f"GrpcStorageProxy(host={_literal(host)}, port={port})"
        imports += "; from optuna.storages import GrpcStorageProxy"
    code = f"{imports}; print(optuna.load_study(study_name={_literal(record.name)}, storage={opened}).best_trials)"
    lines = [f"optuna-dashboard {shlex.quote(shown)}{password}"] if shown else []
    return [*lines, f"python -c {shlex.quote(code)}{password}"]


def _literal(text: str) -> str:
    """A text in Python, in double quotes, since a shell is given the line in single ones."""
    return json.dumps(text, ensure_ascii=False)
