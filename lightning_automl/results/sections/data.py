"""Section about the images of a run."""

from typing import Any

import numpy as np

from lightning_automl.results.evidence import Evidence, split_name
from lightning_automl.results.page import Gallery, Section, Table, Text, pictures
from lightning_automl.results.sections.wording import percent

_SAMPLES = (10, 4)  # classes, images of each


def data(evidence: Evidence) -> Section | None:
    """How many images there are of what, and some of them."""
    counts = evidence.run.data.get("counts")
    if counts is None:
        return None
    from lightning_automl.plots import class_counts

    about = evidence.run.data
    height, width = about["image_size"]
    channels = {1: "grey", 3: "colour"}.get(about["channels"], f"{about['channels']}-channel")
    totals = {split: sum(numbers) for split, numbers in counts.items()}
    shares = np.array(counts["train"]) / max(1, totals["train"])
    names = about["class_names"]
    text = f"{sum(totals.values()):,} {channels} images of {height} x {width} pixels in {len(names)} classes"
    if shares.max() > shares.min():
        text += (
            f"; in training {names[int(shares.argmax())]!r} is the most frequent ({percent(shares.max())}) and "
            f"{names[int(shares.argmin())]!r} the rarest ({percent(shares.min())})"
        )
    rows: list[list[Any]] = [[split_name(split), f"{total:,}"] for split, total in totals.items()]
    head = ["split", "images"]
    if about.get("groups"):
        head.append("groups")
        rows = [[*row, f"{groups:,}"] for row, groups in zip(rows, about["groups"].values(), strict=True)]
    blocks: list[Any] = [Text(f"{text}."), Table(head, rows), pictures(counts=class_counts(names, counts))]
    samples = _samples(evidence)
    return Section("Data", [*blocks, *([] if samples is None else [samples])])


def _samples(evidence: Evidence) -> Gallery | Text | None:
    if isinstance(evidence.data, str):
        return Text(evidence.data)
    labels, train = evidence.data.contents.labels, evidence.data.split_rows["train"]
    rows, captions = [], []
    generator = np.random.default_rng(0)
    for label, name in enumerate(evidence.class_names[: _SAMPLES[0]]):
        own = train[labels[train] == label]
        chosen = np.sort(generator.permutation(own)[: _SAMPLES[1]])
        rows += chosen.tolist()
        captions += [name] * len(chosen)
    return evidence.thumbnails(np.array(rows), captions)
