"""Section about how the images of a run were augmented, shown on some of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.evidence import Evidence, gallery
from lightning_automl.results.page import Folded, Gallery, Section, Table, Text
from lightning_automl.results.sections.policy_words import (
    MINUS,
    operation_name,
    policy_words,
    space_words,
    strength_words,
)

if TYPE_CHECKING:
    from lightning_automl.plots import ImageRow
    from lightning_automl.results.policy_pictures import Examples

_BASE = {
    "crop": "First they are shifted by up to an eighth of their size, with zeros from outside, and no more than "
    "the policy's space allows.",
    "crop_flip": "First they are shifted by up to an eighth of their size, with zeros from outside, and no "
    "more than the policy's space allows; half of them are mirrored left to right.",
}
_IMAGES = 3
#: With the original they fill a line of a wide page and two of a narrow one.
_DRAWS = 5
#: Images of operations at their strongest: of more, only those of the first original are shown.
_STRONGEST = 40


def augmentation(evidence: Evidence) -> Section | None:
    """What the training images of a run with a policy look like."""
    arguments = (evidence.run.config.get("data") or {}).get("init_args") or {}
    given = arguments.get("train_policy")
    if not given:
        return None
    try:
        policy = _policy(evidence, given)
    except Exception as error:
        reason = one_sentence(root_cause(error)).removesuffix(".")
        return Section("Augmentation", [Text(f"The policy of this run cannot be shown: {reason}.")])
    if policy is None:
        return Section(
            "Augmentation", [Text("The policy of this run cannot be shown, since its data cannot be opened.")]
        )
    from lightning_automl.augment import ImagePolicy
    from lightning_automl.results.policy_pictures import SPACE_IMAGES, examples

    shown = examples(evidence, _IMAGES)
    said = f"{_sentence(policy, arguments)} Below, each original with some draws of the policy alone. {shown.note}"
    blocks: list[Any] = [Text(said.strip()), *drawn(policy, shown)]
    if isinstance(policy, ImagePolicy) and policy_words(policy) != "no policy":
        blocks += [*sub_policies(policy), *strongest(policy, shown.first(SPACE_IMAGES))]
    return Section("Augmentation", blocks)


def _policy(evidence: Evidence, given: Any) -> Any:
    """What the run was trained with: of its own directory, else as its config says."""
    from lightning_automl.results.policy_search import read_policy

    found = read_policy(evidence.run.directory / "policy.json")
    if found is not None or isinstance(evidence.data, str):
        return found
    return evidence.data.train_policy


def _sentence(policy: Any, arguments: Mapping[str, Any]) -> str:
    name = policy_words(policy) if hasattr(policy, "space") else getattr(policy, "__name__", type(policy).__name__)
    space = getattr(policy, "space", None)
    inside = f" in the space {space.name}" if space is not None else ""
    base = _BASE.get(str(arguments.get("base_augment")), "")
    return f"Training images are augmented by {name}{inside}, each by a draw of its own. {base}".strip()


def drawn(policy: Any, shown: "Examples") -> list[Any]:
    """Blocks with images and draws of a policy for each, or why it cannot be shown."""
    from lightning_automl.results.policy_pictures import policy_rows

    try:
        rows = policy_rows(policy, shown, draws=_DRAWS)
    except Exception as error:  # whatever a function of the user raises
        return [Text(f"The policy cannot be shown: {one_sentence(root_cause(error)).removesuffix('.')}.")]
    return [gallery(row.images) for row in rows]


def galleries(rows: "Sequence[ImageRow]") -> list[Gallery]:
    """Operations at their strongest, on as many images as leave room for other things."""
    first = len(rows[0].images)
    return [gallery(row.images) for row in rows[: max(1, _STRONGEST // first)]]


def sub_policies(policy: Any) -> list[Any]:
    """A block with the steps of each sub-policy, on a click."""
    steps = getattr(policy, "sub_policies", None)
    if not steps:
        return []
    rows = [
        [number, "; then ".join(_step(policy, step) for step in sub_policy)]
        for number, sub_policy in enumerate(steps, start=1)
    ]
    return [Folded(f"The steps of {policy_words(policy)}", Table(["", "steps"], rows))]


def _step(policy: Any, step: Any) -> str:
    from lightning_automl.augment import OPS

    operation = OPS[step.operation]
    strength = strength_words(step.operation, policy.strength(step), operation.signed and not step.sign)
    sign = f" ({'+' if step.sign > 0 else MINUS})" if step.sign else ""
    return f"{operation_name(step.operation)} {strength}".strip() + f"{sign}, probability {step.probability:.2f}"


def strongest(policy: Any, shown: "Examples") -> list[Any]:
    """Blocks with each operation that may happen at its strongest: of the policy's space, or of the policy itself."""
    from lightning_automl.results.policy_pictures import strongest_rows

    space = policy.space
    limits: list[Any] = []
    if space is None:
        caps = {name: strength for name, strength in policy.strongest().items() if strength != 0}
        said = "Without a space, these are the operations of the policy at the strongest that it may draw."
    else:
        caps = space.caps
        said = f"{space_words(space)} Below they are at their strongest: check that each image still is what it was."
        limits = [space_table(space)]
    return [Text(said), *galleries(strongest_rows(caps, shown)), *limits]


def space_table(space: Any) -> Folded:
    """What a space allows, with the names and numbers that a file for another one needs."""
    from lightning_automl.augment import OPS

    rows = []
    for name, listed in space.to_dict()["operations"].items():
        most = strength_words(name, space.cap(name), OPS[name].signed)
        rows.append([operation_name(name), most, f"{name}: {'true' if listed is True else f'{listed:.4g}'}"])
    return Folded("The same in numbers", Table(["operation", "at most", "in the file of a space"], rows))
