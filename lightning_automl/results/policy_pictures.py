"""Pictures of policies and of their spaces on the images of a run, for pages and for files of their own."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.plots import ImageRow
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.policy_search import PolicySearchRecord, read_policy
from lightning_automl.results.sections.policy_words import done_words, operation_name, policy_words
from lightning_automl.rundir import UserError, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_automl.augment import ImagePolicy

#: Images that a policy is shown on, and how often on each.
POLICY_IMAGES = 4
DRAWS = 6
#: Images that a space is shown on.
SPACE_IMAGES = 2


@dataclass(frozen=True)
class Examples:
    """Images to show policies on.

    Attributes:
        images: uint8 ``(images, channels, height, width)``, each of another class where there are as many.
        captions: The class of each.
        note: Why these are not the run's images, or "".
    """

    images: NDArray[np.uint8]
    captions: Sequence[str]
    note: str = ""

    def first(self, count: int) -> "Examples":
        """The first of them."""
        return Examples(self.images[:count], self.captions[:count], self.note)


def examples(evidence: Evidence | None, count: int = POLICY_IMAGES) -> Examples:
    """Images of the train split, of as many classes as can be; handwritten digits where the run's cannot be had.

    Args:
        evidence: Of the run whose data they are, or None.
        count: How many.
    """
    why = "There is no run yet whose images could be shown" if evidence is None else ""
    if evidence is not None:
        found = evidence.data if isinstance(evidence.data, str) else _of(evidence.data, evidence.images, count)
        if isinstance(found, Examples):
            return found
        why = found.removesuffix(".")
    from lightning_automl.data import DigitsDataModule

    digits = DigitsDataModule()
    shown = _of(digits, digits.read, count)
    assert isinstance(shown, Examples)
    return Examples(shown.images, shown.captions, f"{why}; these are handwritten digits.")


def _of(data: Any, read: Callable[[NDArray[np.int64]], NDArray[np.uint8] | str], count: int) -> Examples | str:
    """The first image of the train split of each class, then the second ones, until there are enough."""
    train = np.asarray(data.split_rows["train"])
    labels = np.asarray(data.contents.labels)[train]
    place = np.zeros(len(train), int)  # how many of the same class come before
    for label in np.unique(labels):
        own = labels == label
        place[own] = np.arange(int(own.sum()))
    chosen = np.lexsort((labels, place))[:count]
    if not len(chosen):
        return "The train split has no images."
    images = read(train[chosen])
    if isinstance(images, str):
        return images
    return Examples(images, [f"original: {data.class_names[each]}" for each in labels[chosen]])


def policy_rows(policy: Any, shown: Examples, title: str = "", draws: int = DRAWS, seed: int = 0) -> list[ImageRow]:
    """What a policy makes of images: a row for each, the original first.

    Args:
        policy: An `ImagePolicy`, whose captions say what was done, or another function of uint8 batches.
        shown: The images.
        title: Above the first row.
        draws: How often.
        seed: Decides about the draws.

    Raises:
        Exception: Whatever a function that is no `ImagePolicy` raises.
    """
    import torch

    from lightning_automl.augment import ImagePolicy

    images = torch.from_numpy(np.array(shown.images))
    columns: list[list[tuple[NDArray[np.uint8], str]]] = [list(zip(shown.images, shown.captions, strict=True))]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        for number in range(draws):
            if isinstance(policy, ImagePolicy):
                changed, captions = _drawn(policy, images, generator)
            else:
                changed, captions = policy(images), [f"draw {number + 1}"] * len(images)
            columns.append(list(zip(changed.numpy(), captions, strict=True)))
    rows = zip(*columns, strict=True)
    return [ImageRow(title if place == 0 else "", row) for place, row in enumerate(rows)]


def _drawn(policy: "ImagePolicy", images: Any, generator: Any) -> tuple[Any, list[str]]:
    """A batch under a policy, and what was done to each image."""
    from lightning_automl.augment import OPS
    from lightning_automl.augment.engine import apply

    count, channels, height, width = images.shape
    plan = policy.draw(count, channels, (height, width), generator)
    changed = apply(images, plan, interpolation=policy.interpolation, fill=policy.filling(images))
    names = tuple(OPS)
    captions = []
    for operations, strengths in zip(plan.operations.tolist(), plan.strengths.tolist(), strict=True):
        done = [
            done_words(names[operation], strength if OPS[names[operation]].strongest is not None else None, channels)
            for operation, strength in zip(operations, strengths, strict=True)
        ]
        captions.append(", ".join(each for each in done if each) or "unchanged")
    return changed, captions


def strongest_rows(caps: Mapping[str, float | None], shown: Examples, title: str = "", seed: int = 0) -> list[ImageRow]:
    """Operations at their strongest, in both directions where there are two, beside the original.

    Args:
        caps: The strongest of each operation in its unit, None where it has no strength.
        shown: The images; a row for each.
        title: Above the first row.
        seed: Decides about what operations draw, as the place of a cutout.
    """
    import torch

    from lightning_automl.augment import OPS, apply_operation

    images = torch.from_numpy(np.array(shown.images))
    channels, height, width = images.shape[1:]
    columns: list[list[tuple[NDArray[np.uint8], str]]] = [list(zip(shown.images, shown.captions, strict=True))]
    for name, operation in OPS.items():
        if name not in caps or name == "identity" or (name == "quarter_turn" and height != width):
            continue
        cap = caps[name]
        captions = {
            strength: done_words(name, None if cap is None else strength, channels)
            for strength in (0.0 if cap is None else cap, *([-cap] if cap is not None and operation.signed else []))
        }
        if not any(captions.values()):  # as colour of grey images
            captions = {0.0: f"{operation_name(name)}: no change"}
        for strength, caption in captions.items():
            generator = torch.Generator().manual_seed(seed)
            changed = apply_operation(name, images, strength, generator=generator)
            columns.append([(image, caption) for image in changed.numpy()])
    rows = zip(*columns, strict=True)
    return [ImageRow(title if place == 0 else "", row) for place, row in enumerate(rows)]


def draw_pictures(directory: str | Path) -> list[Path]:
    """Write ``policy.png`` and ``space.png`` into the directory of a policy search, and return their paths.

    ``policy.png`` shows the policy that ``policy.json`` names, and the searched one too where it was not adopted;
    ``space.png`` each operation that the search may use, at its strongest. Without a policy yet, only the space is
    drawn.

    Args:
        directory: Of a policy search, finished or not.

    Raises:
        UserError: If it is not one, or a file of it is damaged.
    """
    from lightning_automl.plots import captioned_images

    record = PolicySearchRecord.read(directory)
    shown = examples(record.evidence)
    written = []
    rows = [row for title, policy in shown_policies(record) for row in policy_rows(policy, shown, title)]
    if rows:
        written.append(_write(captioned_images(_noted(rows, shown)), record.directory / "policy.png"))
    if (space := record.open_space()) is not None:
        title = f"Space {space.name}: each allowed operation at its strongest"
        rows = _noted(strongest_rows(space.caps, shown.first(SPACE_IMAGES), title), shown)
        written.append(_write(captioned_images(rows), record.directory / "space.png"))
    return written


def shown_policies(record: PolicySearchRecord) -> list[tuple[str, Any]]:
    """The policies of a search that are worth a picture, with titles: what it has adopted, and what it has found."""
    found = []
    adopted, searched = (read_policy(record.directory / name) for name in ("policy.json", "searched_policy.json"))
    if adopted is not None and searched is not None and adopted == searched:
        found.append((f"The searched policy, which was adopted: {policy_words(searched)}", searched))
        return found
    if adopted is not None and policy_words(adopted) != "no policy":
        found.append((f"policy.json: {policy_words(adopted)}", adopted))
    if searched is not None:
        what = "The searched policy" if adopted is None else "The searched policy, which was not adopted"
        found.append((f"{what}: {policy_words(searched)}", searched))
    return found


def _noted(rows: list[ImageRow], shown: Examples) -> list[ImageRow]:
    if shown.note:
        first = rows[0]
        rows[0] = ImageRow(f"{first.title} ({shown.note.removesuffix('.')})", first.images)
    return rows


def _write(figure: "Figure", path: Path) -> Path:
    if path.is_dir():
        raise UserError(f"no picture can be written at {path}: it is a folder; remove it")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    return path
