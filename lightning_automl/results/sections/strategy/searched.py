"""What was searched: the found policy and architecture, and which hyper-parameters mattered."""

from pathlib import Path
from typing import Any

from lightning_automl.results.architecture_search import ArchitectureRecord, Cells
from lightning_automl.results.page import Notes, Section, Table, Text
from lightning_automl.results.policy_search import PolicySearchRecord, read_policy
from lightning_automl.results.sections.architecture import architecture as of_run
from lightning_automl.results.sections.architecture import drawing
from lightning_automl.results.sections.architecture_words import cell_names, cell_words, warnings_of
from lightning_automl.results.sections.policy_search.images import policy as pictures_of
from lightning_automl.results.sections.policy_search.kept import kept
from lightning_automl.results.sections.study.space import importances as of_study
from lightning_automl.results.sections.study.space import slices as of_slices
from lightning_automl.results.strategy import StrategyRecord
from lightning_automl.rundir import UserError, read_json

_FOLDER = "architecture_search"
_POLICY_FOLDER = "policy_search"


def policy(record: StrategyRecord) -> Section | None:
    """The policy that was found: its operations, and on images unless it is that of the chosen model."""
    place = record.directory / _POLICY_FOLDER
    if not (place / "policy_search.json").exists():
        return None
    title = "Searched augmentation policy"
    try:
        found = PolicySearchRecord.read(place)
        adopted, searched = (read_policy(path) for path in (record.directory / "policy.json", _found_policy(record)))
    except (UserError, ValueError) as error:
        return Section(title, [Text(f"It cannot be shown: {str(error).removesuffix('.')}.")])
    sentence = str(found.record.get("sentence") or "").strip()
    blocks: list[Any] = [Text(sentence)] if sentence else []
    if searched is not None and adopted == searched:
        blocks.append(Text("It is the policy of the chosen model, shown above."))
    elif searched is not None and (shown := pictures_of(found)) is not None:
        blocks += [Text("It is not that of the chosen model."), *shown.blocks]
    if (operations := kept(found)) is not None:
        blocks += operations.blocks
    return Section(title, blocks) if blocks else None


def _found_policy(record: StrategyRecord) -> Path:
    return record.directory / _POLICY_FOLDER / "searched_policy.json"


def architecture(record: StrategyRecord) -> Section | None:
    """The genotype of the chosen model, or the one that was found and not adopted."""
    if record.evidence is not None and (found := of_run(record.evidence)) is not None:
        return found
    title = "Searched architecture"
    try:
        content = read_json(record.directory / "genotype.json") or read_json(
            record.directory / _FOLDER / "genotype.json"
        )
        if content is None:
            return None
        cells = Cells.of(content)
    except (UserError, ValueError) as error:
        return Section(title, [Text(f"The genotype cannot be shown: {str(error).removesuffix('.')}.")])
    rows = [[name, cell_words(cells, kind)] for kind, name in cell_names(cells).items()]
    said = "It was found by PC-DARTS on the search folds, and is not what was chosen."
    if record.chosen is None:
        said = "It was found by PC-DARTS on the search folds; whether it is any better is not known yet."
    blocks: list[Any] = [Text(said), drawing(genotype=cells), Table(["", ""], rows)]
    search = ArchitectureRecord.read(record.directory / _FOLDER)
    if search is not None:
        blocks.append(Notes([*search.doubts, *warnings_of(search)]))
    return Section(title, blocks)


def importances(record: StrategyRecord) -> Section | None:
    """Which hyper-parameters the values of the candidates hang on."""
    found = None if record.study is None else of_study(record.study)
    if found is None or record.study is None:
        return None
    of = record.study.search.get("importances_of")
    return Section(found.title, [*found.blocks, *([Text(f"Explained are the values on {of}.")] if of else [])])


def slices(record: StrategyRecord) -> Section | None:
    """The values of the candidates against each hyper-parameter."""
    return None if record.study is None or not record.study.importances else of_slices(record.study)
