"""What the policies of a search make of images, and what they might at most."""

from typing import Any

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.page import Section, Text
from lightning_automl.results.policy_search import PolicySearchRecord
from lightning_automl.results.sections.policy import drawn, galleries, space_table, sub_policies
from lightning_automl.results.sections.policy_words import space_words

_IMAGES = 3


def policy(record: PolicySearchRecord) -> Section | None:
    """What was adopted and what was found, on images."""
    from lightning_automl.results.policy_pictures import examples, shown_policies

    title = "The policy on images of the train split"
    try:
        found = shown_policies(record)
    except Exception as error:
        return Section(title, [_refused("The policy", error)])
    if not found:
        return None
    shown = examples(record.evidence, _IMAGES)
    blocks: list[Any] = [Text(f"Each original with some draws of the policy. {shown.note}".strip())]
    for said, each in found:
        blocks += [Text(f"{said}."), *drawn(each, shown), *sub_policies(each)]
    return Section(title, blocks)


def space(record: PolicySearchRecord) -> Section | None:
    """Each operation that the search may use, at its strongest."""
    from lightning_automl.results.policy_pictures import SPACE_IMAGES, examples, strongest_rows

    title = "The space at full strength"
    try:
        found = record.open_space()
        if found is None:
            return None
        shown = examples(record.evidence, SPACE_IMAGES)
        rows = strongest_rows(found.caps, shown)
    except Exception as error:
        return Section(title, [_refused("The space", error)])
    text = f"{space_words(found)} Below each is at its strongest: check that every image still is what it was."
    if found.reason:
        text += f" The reason for this space: {found.reason.removesuffix('.')}."
    note = [Text(shown.note)] if shown.note else []
    return Section(title, [Text(text), *note, *galleries(rows), space_table(found)])


def _refused(what: str, error: Exception) -> Text:
    return Text(f"{what} cannot be shown: {one_sentence(root_cause(error)).removesuffix('.')}.")
