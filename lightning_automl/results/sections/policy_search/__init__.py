"""The sections of a policy search's page, one function each: record in, section out, or None if nothing is to be said.

A search that is a study too has its page made from both.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_automl.results.page import Commands, Notes, Section
from lightning_automl.results.policy_search import PolicySearchRecord
from lightning_automl.results.sections import study as of_study
from lightning_automl.results.sections.policy_search.acceptance import acceptance
from lightning_automl.results.sections.policy_search.images import policy, space
from lightning_automl.results.sections.policy_search.kept import kept
from lightning_automl.results.sections.policy_search.progress import cost, failures, history
from lightning_automl.results.sections.policy_search.settings import commands, settings, versions
from lightning_automl.results.sections.policy_search.verdict import cautions, comparison, verdict
from lightning_automl.results.study import StudyRecord

__all__ = ["SECTIONS", "page_with_study", "verdict"]

#: In the order of the page.
SECTIONS: list[Callable[[PolicySearchRecord], Section | None]] = [
    cautions,
    acceptance,
    policy,
    space,
    kept,
    history,
    failures,
    cost,
    settings,
    versions,
    commands,
]
#: What a study says itself.
_BY_STUDY: tuple[Callable[[PolicySearchRecord], Section | None], ...] = (settings, versions, failures)
#: What is said of a study of policies. Its parameters are left out: they are slots that can be exchanged.
_OF_STUDY: list[Callable[[StudyRecord], Section | None]] = [
    of_study.cautions,
    of_study.history,
    of_study.intermediate,
    of_study.failures,
    of_study.cost,
    of_study.settings,
    of_study.versions,
    of_study.commands,
]

_ABOUT_TRIALS = ("--retrain", "The unchanged run")


def page_with_study(record: PolicySearchRecord, study: StudyRecord) -> tuple[Sequence[str], list[Section]]:
    """The sentences and the sections of a policy search that is a study: those of its policies, then the study's."""
    first = [section for make in SECTIONS if make not in _BY_STUDY and (section := make(record)) is not None]
    second = [_without_test(section) for make in _OF_STUDY if (section := make(study)) is not None]
    by_title = {section.title: section for section in second}
    sections = []
    for section in first:
        own = by_title.pop(section.title, None)
        sections.append(section if own is None else _merged(section, own))
    *before, last = sections  # the commands
    sentences = [*of_study.verdict(study), *comparison(record)]
    return sentences, [*before, *(section for section in second if section.title in by_title), last]


def _without_test(section: Section) -> Section:
    """Without advice about the best trial: the merged policy is what counts, and it is compared."""
    blocks: list[Any] = []
    for block in section.blocks:
        if isinstance(block, Notes):
            block = Notes([each for each in block.sentences if not any(word in each for word in _ABOUT_TRIALS)])
        elif isinstance(block, Commands):
            block = Commands([each for each in block.lines if "--retrain" not in each])
        blocks.append(block)
    return Section(section.title, blocks)


def _merged(one: Section, other: Section) -> Section:
    """Two sections of a title; notes and commands become one list."""
    blocks = [*one.blocks, *other.blocks]
    notes = [sentence for block in blocks if isinstance(block, Notes) for sentence in block.sentences]
    lines = [line for block in blocks if isinstance(block, Commands) for line in block.lines]
    rest: list[Any] = [block for block in blocks if not isinstance(block, Notes | Commands)]
    if notes:
        rest.append(Notes(list(dict.fromkeys(notes))))
    if lines:
        rest.append(Commands(list(dict.fromkeys(lines))))
    return Section(one.title, rest)
