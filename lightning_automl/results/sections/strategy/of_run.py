"""Sections that the page of a run has too, about the chosen model."""

from lightning_automl.results.page import Section, Table, Text, pictures
from lightning_automl.results.sections import images as of_images
from lightning_automl.results.sections import policy as of_policy
from lightning_automl.results.sections import predictions as of_predictions
from lightning_automl.results.sections.data import data as of_data
from lightning_automl.results.sections.training import configuration
from lightning_automl.results.strategy import StrategyRecord


def scores(record: StrategyRecord) -> Section | None:
    """The metrics of test and validation with their intervals."""
    return None if record.evidence is None else of_predictions.score_section(record.evidence)


def confusion(record: StrategyRecord) -> Section | None:
    """What was taken for what."""
    return None if record.evidence is None else of_predictions.confusion(record.evidence)


def recall(record: StrategyRecord) -> Section | None:
    """The recall of each class with its exact interval."""
    return None if record.evidence is None else of_predictions.recall(record.evidence)


def most_wrong(record: StrategyRecord) -> Section | None:
    """The mistakes that the model was surest of."""
    return None if record.evidence is None else of_images.most_wrong(record.evidence)


def least_sure(record: StrategyRecord) -> Section | None:
    """The images on which the first two classes were closest."""
    return None if record.evidence is None else of_images.least_sure(record.evidence)


def data(record: StrategyRecord) -> Section | None:
    """How many images there are of what, some of them, and what the look at them has found."""
    found = None if record.evidence is None else of_data(record.evidence)
    if not record.look:
        return found
    table = Table(["", ""], _seen(record))
    if found is not None:
        return Section("Data", [*found.blocks, table])
    counts, names = record.look.get("counts"), record.look.get("class_names")
    if not counts or not names:
        return Section("Data", [table])
    from lightning_automl.plots import class_counts

    return Section("Data", [pictures(counts=class_counts(names, counts)), table])


def _seen(record: StrategyRecord) -> list[list[str]]:
    look = record.look
    sizes = look.get("sizes") or {}
    shown = ", ".join(f"{name} {size[0]} x {size[1]}" for name, size in sizes.items())
    rows = [["images that can be read", f"{int(look.get('images') or 0):,}"]]
    if shown:
        rows.append(["sizes as found", shown])
    if look.get("image_size"):
        rows.append(["size for the networks", " x ".join(map(str, look["image_size"]))])
    rows.append(["splits that the data bring", ", ".join(look.get("official_splits") or ()) or "none"])
    unit = str(look.get("unit") or "image")
    if look.get("units"):
        per_class = ", ".join(map(str, look["units"][:12])) + (" …" if len(look["units"]) > 12 else "")
        rows.append([f"{unit}s of each class in train and validation", per_class])
    if look.get("imbalance"):
        rows.append(["largest to smallest class in training", f"{float(look['imbalance']):.2g}"])
    if look.get("folds"):
        searched, compared = (len(look.get(name) or ()) for name in ("search_folds", "comparison_folds"))
        rows.append(["folds", f"{look['folds']}: {searched} for every choice, {compared} for the comparison alone"])
    rows += [
        [f"{what} images in different splits", f"{int(look.get(f'{key}_count') or 0):,}"]
        for key, what in (("exact_duplicate", "equal"), ("near_duplicate", "nearly equal"))
    ]
    rows.append(["files that cannot be read", f"{len(look.get('broken') or ()):,}"])
    rows.append(["modality", str(look.get("modality") or "")])
    return rows


def augmentation(record: StrategyRecord) -> Section | None:
    """What the training images of the chosen model look like."""
    if record.evidence is None:
        return None
    found = of_policy.augmentation(record.evidence)
    return found or Section("Augmentation", [Text("The chosen model was trained without an augmentation policy.")])


def differing(record: StrategyRecord) -> Section | None:
    """How the chosen model was set otherwise than by default."""
    if record.evidence is None:
        return None
    found = configuration(record.evidence)
    return Section("Configuration of the chosen model that differs from the defaults", found.blocks)
