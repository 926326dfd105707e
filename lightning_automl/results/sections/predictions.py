"""Sections about what the network predicted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.results.evidence import Evidence, split_name
from lightning_automl.results.page import Section, Table, Text, pictures
from lightning_automl.results.run import Predictions
from lightning_automl.results.sections.scoring import draws, exact, recall_counts, score_of
from lightning_automl.results.sections.wording import percent, with_interval

_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy (mean recall)",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1 (mean of classes)",
    "calibration_error": "calibration error (ECE)",
    "brier_score": "Brier score",
    "negative_log_likelihood": "negative log-likelihood",
}


def scores(evidence: Evidence) -> Section | None:
    """The metrics of test and validation with their intervals; for two classes predictive values too."""
    section = score_section(evidence)
    if section is None or len(evidence.class_names) != 2:
        return section
    assert evidence.judged is not None
    return Section(section.title, [*section.blocks, *_two_classes(evidence, evidence.judged)])


def score_section(evidence: Evidence) -> Section | None:
    """The metrics of test and validation with their intervals."""
    splits = [split for split in ("test", "val") if evidence.predictions(split) is not None]
    if not splits:
        return None
    from lightning_automl.metrics import SCORES

    columns = [{name: score_of(name, evidence, split) for name in SCORES} for split in splits]
    rows = [[_NAMES.get(name, name), *(with_interval(column[name]) for column in columns)] for name in SCORES]
    head = ["", *(f"{split_name(split)} (95 % interval)" for split in splits)]
    judged = evidence.judged
    assert judged is not None
    if judged.groups is None:
        how = (
            "exact for the accuracy (Clopper-Pearson), from intervals of the classes for the balanced accuracy "
            f"(Zou et al. 2009), else by bootstrap over images with {draws(judged):,} draws"
        )
    else:
        how = f"by bootstrap over groups with {draws(judged):,} draws"
    blocks: list[Any] = [
        Table(head, rows),
        Text(
            f"{_precision(evidence)}Intervals: {how}. The calibration error has none, since resampling images makes it "
            "larger, nor has a score that is the same in all draws. AUROC and average precision are means of one class "
            "against the rest."
        ),
    ]
    return Section("Metrics", blocks)


def _two_classes(evidence: Evidence, judged: Predictions) -> list[Any]:
    hits, counts = recall_counts(judged, 2)
    if not counts.all():
        return []
    names = evidence.class_names
    specificity, sensitivity = (float(share) for share in hits / counts)
    text = (
        f"With {names[1]!r} as the positive class, sensitivity is {percent(sensitivity)} and specificity "
        f"{percent(specificity)}. How far an answer can be believed depends on how common {names[1]!r} is where the "
        "network is used:"
    )
    share = float(counts[1] / counts.sum())
    return [Text(text), prevalence_table(sensitivity, specificity, share, names, split_name(evidence.split))]


def prevalence_table(sensitivity: float, specificity: float, share: float, names: Sequence[str], split: str) -> Table:
    """What an answer is worth where the second class is rarer, or more common.

    Args:
        sensitivity: Share in [0, 1] of the second class that is found.
        specificity: Share in [0, 1] of the first class that is left alone.
        share: Of the second class in the split, in [0, 1].
        names: Of the two classes.
        split: Name of the split.
    """
    from lightning_automl.metrics import predictive_values

    rows = []
    for prevalence in sorted({0.01, 0.1, 0.5, share}):
        values = predictive_values(sensitivity, specificity, prevalence)
        here = f" (as in {split})" if prevalence == share else ""
        rows.append([f"{percent(prevalence)}{here}", percent(values.positive), percent(values.negative)])
    head = [f"share of {names[1]!r}", f"right when it says {names[1]!r}", f"right when it says {names[0]!r}"]
    return Table(head, rows)


def confusion(evidence: Evidence) -> Section | None:
    """What was taken for what."""
    judged = evidence.judged
    if judged is None:
        return None
    from lightning_automl.plots import confusion_matrix

    classes = len(evidence.class_names)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (judged.labels, judged.predicted), 1)
    wrong = counts * (1 - np.eye(classes, dtype=np.int64))
    blocks: list[Any] = [pictures(confusion=confusion_matrix(counts, evidence.class_names))]
    if classes > 2 and wrong.any():
        order = np.argsort(wrong, axis=None, kind="stable")[::-1][:5]
        pairs = [divmod(int(place), classes) for place in order if wrong.flat[place]]
        names = evidence.class_names
        told = ", ".join(f"{names[true]!r} taken for {names[other]!r} ({wrong[true, other]})" for true, other in pairs)
        blocks.append(Text(f"Most frequent mistakes: {told}."))
    return Section(f"Confusion matrix ({split_name(evidence.split)})", blocks)


def recall(evidence: Evidence) -> Section | None:
    """The recall of each class with its exact interval."""
    judged = evidence.judged
    if judged is None:
        return None
    from lightning_automl.plots import class_recall

    hits, counts = recall_counts(judged, len(evidence.class_names))
    present = np.flatnonzero(counts)
    ends = np.array([exact(hits[each], counts[each]) for each in present])
    figure = class_recall(
        [evidence.class_names[each] for each in present],
        (hits[present] / counts[present]).tolist(),
        ends[:, 0].tolist(),
        ends[:, 1].tolist(),
        counts[present].tolist(),
    )
    text = "Points: share of the images of the class that are recognised. Lines: exact 95 % intervals (Clopper-Pearson)"
    text += "." if judged.groups is None else ", too narrow where a group has several images."
    return Section(f"Recall of each class ({split_name(evidence.split)})", [pictures(recall=figure), Text(text)])


def calibration(evidence: Evidence) -> Section | None:
    """Whether the network is right as often as it says, and what a temperature would change."""
    judged = evidence.judged
    if judged is None:
        return None
    from lightning_automl.metrics import expected_calibration_error, fit_temperature, reliability
    from lightning_automl.plots import reliability_diagram

    table = reliability(judged.probabilities, judged.labels)
    blocks: list[Any] = [pictures(reliability=reliability_diagram(table))]
    text = f"On average the network's confidence is {percent(expected_calibration_error(table))} off (ECE, 15 bins)."
    fitted = evidence.predictions("val")
    if fitted is not None and evidence.split == "test":
        temperature = fit_temperature(_logits(fitted), fitted.labels)
        scaled = np.exp(_logits(judged) / temperature)
        scaled /= scaled.sum(1, keepdims=True)
        after = expected_calibration_error(reliability(scaled, judged.labels))
        text += (
            f" Dividing its logits by the temperature {temperature:.2f}, fitted on validation, would make that "
            f"{percent(after)} on test and change no answer."
        )
    blocks.append(Text(text))
    return Section(f"Calibration ({split_name(evidence.split)})", blocks)


def _precision(evidence: Evidence) -> str:
    """That what was computed with 16 bits differs from what classify and export compute with 32."""
    precision = str(evidence.run.environment.get("precision", "32-true"))
    if precision.startswith(("32", "64")):
        return ""
    return f"Computed in {precision}, as in training; classify and export compute in float32 and differ a little. "


def _logits(predictions: Predictions) -> NDArray[np.float64]:
    """Logarithms of the probabilities, which differ from the logits by a number a row and serve as well."""
    return np.log(np.maximum(predictions.probabilities, 1e-38))
