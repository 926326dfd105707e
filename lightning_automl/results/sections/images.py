"""Sections that show single images: the surest mistakes and the least sure answers."""

import numpy as np
from numpy.typing import NDArray

from lightning_automl.results.evidence import Evidence, split_name
from lightning_automl.results.page import Gallery, Section, Text
from lightning_automl.results.run import Predictions
from lightning_automl.results.sections.wording import percent

_SHOWN_IMAGES = 12


def most_wrong(evidence: Evidence) -> Section | None:
    """The mistakes that the network was surest of."""
    judged = evidence.judged
    if judged is None or judged.rows is None:
        return None
    wrong = np.flatnonzero(judged.predicted != judged.labels)
    order = wrong[np.argsort(-judged.probabilities[wrong].max(1), kind="stable")][:_SHOWN_IMAGES]
    if not len(order):
        return Section(f"Most wrong images ({split_name(evidence.split)})", [Text("No image was classified wrongly.")])
    return Section(f"Most wrong images ({split_name(evidence.split)})", [_gallery(evidence, judged, order)])


def least_sure(evidence: Evidence) -> Section | None:
    """The images on which the first two classes were closest."""
    judged = evidence.judged
    if judged is None or judged.rows is None:
        return None
    best = np.sort(judged.probabilities, axis=1)
    order = np.argsort(best[:, -1] - best[:, -2], kind="stable")[:_SHOWN_IMAGES]
    return Section(f"Least sure images ({split_name(evidence.split)})", [_gallery(evidence, judged, order)])


def _gallery(evidence: Evidence, judged: Predictions, order: NDArray[np.int64]) -> Gallery | Text:
    assert judged.rows is not None
    names = evidence.class_names
    captions = []
    for place in order:
        label, given = int(judged.labels[place]), int(judged.predicted[place])
        sure = f"{names[given]} ({percent(judged.probabilities[place, given])})"
        caption = f"{sure}, is {names[label]}" if label != given else f"{sure}, right"
        captions.append(caption)
    rows = judged.rows[order]
    if not isinstance(evidence.data, str):
        captions = [f"{evidence.data.contents.names[row]}: {each}" for row, each in zip(rows, captions, strict=True)]
    return evidence.thumbnails(rows, captions)
