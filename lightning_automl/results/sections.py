"""The sections of a report, one function each: evidence in, section out, or None where there is nothing to say."""

import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_automl.results.configuration import differing_settings
from lightning_automl.results.report import (
    Commands,
    Evidence,
    Gallery,
    Notes,
    Section,
    Table,
    Text,
    pictures,
    split_name,
)
from lightning_automl.results.run import Predictions

#: Below so many images a class's recall says little: 10 of 10 leave a lower end of 69 %.
FEW = 10
_SHOWN_IMAGES = 12
_SAMPLES = (10, 4)  # classes, images of each
_DRAWS = 2000
_VALUES_AT_FULL_DRAWS = 20_000  # images times classes; more get fewer draws, so that a report takes no minutes
_FEWEST_DRAWS = 100

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


def verdict(evidence: Evidence) -> tuple[str, str]:
    """What a reader has to know, in two sentences."""
    return _state(evidence), _weakness(evidence)


def _state(evidence: Evidence) -> str:
    run, judged, split = evidence.run, evidence.judged, evidence.split
    reason = (run.summary or {}).get("reason", "not finished")
    beginning = ""
    if run.summary is not None and run.summary["status"] == "pruned":
        beginning = f"This run was pruned ({_epochs(evidence)}); "
    elif not run.finished and reason.startswith("not finished"):  # as an evaluation or larger limits leave it, too
        beginning = f"This run is not finished ({_epochs(evidence)}); "
    elif not run.finished:
        beginning = f"This run failed ({reason}); "
    if judged is None:
        why = evidence.doubts[0].removesuffix(".") if evidence.doubts else "no predictions are there yet"
        sentence = f"{beginning}{why}, so that nothing can be said of its quality."
        return sentence[0].upper() + sentence[1:]
    score = _score("balanced_accuracy", evidence)
    opened = _times_opened(evidence)
    there = sum(run.data.get("counts", {}).get(split, judged.labels.shape))
    part = f"{len(judged.labels):,} of the " * (len(judged.labels) < there)
    where = f"on {part or 'the '}{there:,} {split_name(split)} images"
    if split == "test":
        where += f", opened {'once' if opened == 1 else f'{opened} times'}"
    classes, occurring = len(evidence.class_names), len(np.unique(judged.labels))
    which = f"{classes} classes" if occurring == classes else f"{occurring} of {classes} classes that occur"
    sentence = (
        f"{where}, the mean recall of the {which} is {_percent(score[0])} ({_interval(score)}), where "
        f"guessing would give {_percent(1 / classes)}"
    )
    if split == "val":
        closed = "no test of these weights is there" if _times_opened(evidence) else "the test split is still closed"
        sentence += f"; {closed}, and validation, which chose the epoch, flatters"
    sentence = f"{beginning}{sentence}."
    return sentence[0].upper() + sentence[1:]


def _weakness(evidence: Evidence) -> str:
    judged = evidence.judged
    if judged is None and evidence.doubts:
        return "Look at its learning curves, and try a smaller learning rate."
    if judged is None:
        return "Give the command that started it again: it goes on from the newest checkpoint."
    hits, counts = _recall_counts(judged, len(evidence.class_names))
    units, unit = _units(judged, len(evidence.class_names))
    present = np.flatnonzero(counts)
    rarest = int(present[units[present].argmin()])
    if units[rarest] < FEW:
        return (
            f"That is not conclusive for every class: of {evidence.class_names[rarest]!r} there "
            f"{f'is only 1 {unit}' if units[rarest] == 1 else f'are only {units[rarest]} {unit}s'}, and {FEW} of {FEW} "
            "right would still leave a recall of 69 % possible."
        )
    worst = int(present[(hits[present] / counts[present]).argmin()])
    low, high = _exact(hits[worst], counts[worst])
    how_sure = f"95 % interval {_percent(low)} to {_percent(high)}"
    if judged.groups is not None:  # the interval holds for independent images
        how_sure = f"in {units[worst]} groups"
    return (
        f"The weakest class is {evidence.class_names[worst]!r}: {hits[worst]} of its {counts[worst]} images are "
        f"recognised ({_percent(hits[worst] / counts[worst])}, {how_sure})."
    )


def cautions(evidence: Evidence) -> Section:
    """What limits the numbers of this page."""
    run, judged = evidence.run, evidence.judged
    notes = ["One run with one seed: another seed gives other numbers, which no interval here contains."]
    notes += evidence.doubts
    if judged is not None:
        units, unit = _units(judged, len(evidence.class_names))
        few = [name for name, count in zip(evidence.class_names, units, strict=True) if count < FEW]
        if few:
            notes.append(
                f"{len(few)} of {len(units)} classes have fewer than {FEW} {split_name(evidence.split)} {unit}s "
                f"({_some(few)}): their recall is hardly known."
            )
    if _times_opened(evidence) > 1:
        notes.append(
            f"The test split was opened {_times_opened(evidence)} times: whatever was chosen in between has seen it."
        )
    leaks = run.data.get("leak_count", 0)
    if leaks:
        pairs = ", ".join(f"{first} = {second}" for first, second in run.data["leaks"][:3])
        notes.append(f"{leaks} images of validation or test are also in another split ({pairs}{' …' * (leaks > 3)}).")
    if run.data.get("counts") and run.data.get("groups") is None:
        notes.append(
            "No groups were given: if several images are of one patient or object, they may be in several splits, and "
            "the intervals are too narrow."
        )
    notes.append("The numbers hold for images like these. This program is not a medical device.")
    return Section("To keep in mind", [Notes(notes)])


def scores(evidence: Evidence) -> Section | None:
    """The metrics of test and validation with their intervals; for two classes predictive values too."""
    splits = [split for split in ("test", "val") if evidence.predictions(split) is not None]
    if not splits:
        return None
    from lightning_automl.metrics import SCORES

    columns = [{name: _score(name, evidence, split) for name in SCORES} for split in splits]
    rows = [[_NAMES.get(name, name), *(_with_interval(column[name]) for column in columns)] for name in SCORES]
    head = ["", *(f"{split_name(split)} (95 % interval)" for split in splits)]
    judged = evidence.judged
    assert judged is not None
    if judged.groups is None:
        how = (
            "exact for the accuracy (Clopper-Pearson), from intervals of the classes for the balanced accuracy "
            f"(Zou et al. 2009), else by bootstrap over images with {_draws(judged):,} draws"
        )
    else:
        how = f"by bootstrap over groups with {_draws(judged):,} draws"
    blocks: list[Any] = [
        Table(head, rows),
        Text(
            f"{_precision(evidence)}Intervals: {how}. The calibration error has none, since resampling images makes it "
            "larger, nor has a score that is the same in all draws. AUROC and average precision are means of one class "
            "against the rest."
        ),
    ]
    if len(evidence.class_names) == 2:
        blocks += _two_classes(evidence, judged)
    return Section("Metrics", blocks)


def _two_classes(evidence: Evidence, judged: Predictions) -> list[Any]:
    from lightning_automl.metrics import predictive_values

    hits, counts = _recall_counts(judged, 2)
    if not counts.all():
        return []
    names = evidence.class_names
    specificity, sensitivity = hits / counts
    rows = []
    for prevalence in sorted({0.01, 0.1, 0.5, float(counts[1] / counts.sum())}):
        values = predictive_values(float(sensitivity), float(specificity), prevalence)
        here = f" (as in {split_name(evidence.split)})" if prevalence == counts[1] / counts.sum() else ""
        rows.append([f"{_percent(prevalence)}{here}", _percent(values.positive), _percent(values.negative)])
    text = (
        f"With {names[1]!r} as the positive class, sensitivity is {_percent(sensitivity)} and specificity "
        f"{_percent(specificity)}. How far an answer can be believed depends on how common {names[1]!r} is where the "
        "network is used:"
    )
    head = [f"share of {names[1]!r}", f"right when it says {names[1]!r}", f"right when it says {names[0]!r}"]
    return [Text(text), Table(head, rows)]


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

    hits, counts = _recall_counts(judged, len(evidence.class_names))
    present = np.flatnonzero(counts)
    ends = np.array([_exact(hits[each], counts[each]) for each in present])
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
    text = f"On average the network's confidence is {_percent(expected_calibration_error(table))} off (ECE, 15 bins)."
    fitted = evidence.predictions("val")
    if fitted is not None and evidence.split == "test":
        temperature = fit_temperature(_logits(fitted), fitted.labels)
        scaled = np.exp(_logits(judged) / temperature)
        scaled /= scaled.sum(1, keepdims=True)
        after = expected_calibration_error(reliability(scaled, judged.labels))
        text += (
            f" Dividing its logits by the temperature {temperature:.2f}, fitted on validation, would make that "
            f"{_percent(after)} on test and change no answer."
        )
    blocks.append(Text(text))
    return Section(f"Calibration ({split_name(evidence.split)})", blocks)


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
        sure = f"{names[given]} ({_percent(judged.probabilities[place, given])})"
        caption = f"{sure}, is {names[label]}" if label != given else f"{sure}, right"
        captions.append(caption)
    rows = judged.rows[order]
    if not isinstance(evidence.data, str):
        captions = [f"{evidence.data.contents.names[row]}: {each}" for row, each in zip(rows, captions, strict=True)]
    return evidence.thumbnails(rows, captions)


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
            f"; in training {names[int(shares.argmax())]!r} is the most frequent ({_percent(shares.max())}) and "
            f"{names[int(shares.argmin())]!r} the rarest ({_percent(shares.min())})"
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


def curves(evidence: Evidence) -> Section | None:
    """How loss and accuracy went."""
    epochs = evidence.run.epochs
    if not epochs:
        return None
    from lightning_automl.plots import learning_curves

    monitor = evidence.run.config.get("monitor", "val_accuracy")
    text = f"{_epochs(evidence).capitalize()}."
    best = (evidence.run.summary or {}).get("metrics", {}).get("best_epoch")
    if best is not None:
        text += f" By {monitor} epoch {best + 1:.0f} is the best, and it is the one judged here."
    drawn = {metric: learning_curves(epochs, [metric]) for metric in ("loss", "balanced_accuracy")}
    return Section("Learning curves", [pictures(**drawn), Text(text)])


def configuration(evidence: Evidence) -> Section:
    """What was set otherwise than by default."""
    rows = [[each.key, _value(each.value), _value(each.default)] for each in differing_settings(evidence.run.config)]
    return Section("Configuration that differs from the defaults", [Table(["key", "value", "default"], rows)])


def cost(evidence: Evidence) -> Section | None:
    """Time, size and hardware."""
    run = evidence.run
    rows: list[list[Any]] = []
    network = run.environment.get("network", {})
    if network:
        rows.append(["network", network["class"]])
        rows.append(["parameters", f"{network['parameters']:,}"])
    if network.get("flops"):
        rows.append(["operations an image", f"{network['flops'] / 1e6:,.1f} million (a multiply-add counts as two)"])
    if run.summary:
        rows.append(["time in all", _time(run.summary["seconds"])])
    seconds = [row["seconds"] for row in run.epochs if "seconds" in row]
    if seconds:
        rows.append(["time an epoch (median)", _time(float(np.median(seconds)))])
    hardware = run.environment.get("hardware", {})
    if hardware:
        gpus = hardware.get("gpus") or []
        device = f"{', '.join(gpus)}; " if gpus else ""
        rows.append(
            ["hardware", f"{device}{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory'] / 2**30:.0f} GiB"]
        )
        rows.append(["precision", run.environment.get("precision", "")])
    return Section("Cost", [Table(["", ""], rows)]) if rows else None


def versions(evidence: Evidence) -> Section | None:
    """What has to be the same for the same numbers."""
    environment = evidence.run.environment
    if not environment:
        return None
    rows = [[name, version] for name, version in environment.get("versions", {}).items()]
    rows += [["commit", environment.get("commit") or "unknown"], ["seed", environment.get("seed")]]
    rows += [["started", environment.get("started", "")]]
    blocks: list[Any] = [Table(["", ""], rows)]
    if environment.get("continued"):
        times = len(environment["continued"])
        blocks.append(Text(f"The run was continued {times} time{'s' * (times > 1)}."))
    return Section("Versions", blocks)


def commands(evidence: Evidence) -> Section:
    """How to repeat the run and to use what it left."""
    directory = shlex.quote(str(evidence.run.directory))
    lines = [f"lightning-automl fit --config {directory}/config.yaml --dir {directory}-again"]
    if evidence.run.best_checkpoint.exists():
        lines += [
            f"lightning-automl export {directory} --format onnx",
            f"lightning-automl classify {directory} new_images --out labels.csv",
        ]
    if not evidence.run.finished:
        lines.insert(0, f"lightning-automl fit --dir {directory}    # goes on")
    return Section("Commands", [Commands(lines)])


#: In the order of the page.
SECTIONS: list[Callable[[Evidence], Section | None]] = [
    cautions,
    scores,
    confusion,
    recall,
    calibration,
    most_wrong,
    least_sure,
    data,
    curves,
    configuration,
    cost,
    versions,
    commands,
]


def _score(name: str, evidence: Evidence, split: str | None = None) -> tuple[float, float, float]:
    """A score of a split with the ends of its 95 % interval."""
    from lightning_automl.metrics import SCORES, bootstrap_interval, mean_recall_interval

    judged = evidence.predictions(split or evidence.split)
    assert judged is not None
    metric, probabilities, labels = SCORES[name], judged.probabilities, judged.labels
    value = metric(probabilities, labels)
    if name == "accuracy" and judged.groups is None:
        return (value, *_exact(int((judged.predicted == labels).sum()), len(labels)))
    if name == "balanced_accuracy" and judged.groups is None:
        return (value, *mean_recall_interval(*_recall_counts(judged, len(evidence.class_names))))
    units = len(labels) if judged.groups is None else len(np.unique(judged.groups))
    if name == "calibration_error" or units < 2 or not math.isfinite(value):
        return value, math.nan, math.nan
    found = bootstrap_interval(
        lambda rows: metric(probabilities[rows], labels[rows]), len(labels), judged.groups, draws=_draws(judged)
    )
    if found.low == found.high:  # nothing went wrong, so that no resampling shows what might
        return value, math.nan, math.nan
    return value, found.low, found.high


def _precision(evidence: Evidence) -> str:
    """That what was computed with 16 bits differs from what classify and export compute with 32."""
    precision = str(evidence.run.environment.get("precision", "32-true"))
    if precision.startswith(("32", "64")):
        return ""
    return f"Computed in {precision}, as in training; classify and export compute in float32 and differ a little. "


def _draws(judged: Predictions) -> int:
    affordable = _DRAWS * _VALUES_AT_FULL_DRAWS // judged.probabilities.size
    return int(np.clip(affordable, _FEWEST_DRAWS, _DRAWS))


def _recall_counts(judged: Predictions, classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Recognised images and all images ``(classes,)``."""
    hits = np.bincount(judged.labels[judged.predicted == judged.labels], minlength=classes)
    return hits, np.bincount(judged.labels, minlength=classes)


def _units(judged: Predictions, classes: int) -> tuple[NDArray[np.int64], str]:
    """What is independent: the number of images ``(classes,)``, or of groups where there are groups, and its name."""
    if judged.groups is None:
        return np.bincount(judged.labels, minlength=classes), "image"
    pairs = np.unique(np.stack([judged.labels, judged.groups]), axis=1)
    return np.bincount(pairs[0], minlength=classes), "group"


def _exact(hits: int, count: int) -> tuple[float, float]:
    from lightning_automl.metrics import clopper_pearson

    low, high = clopper_pearson(int(hits), int(count))
    return low, high


def _logits(predictions: Predictions) -> NDArray[np.float64]:
    """Logarithms of the probabilities, which differ from the logits by a number a row and serve as well."""
    return np.log(np.maximum(predictions.probabilities, 1e-38))


def _times_opened(evidence: Evidence) -> int:
    opened = int((evidence.run.summary or {}).get("test_opened", 0))
    return max(1, opened) if evidence.split == "test" else opened  # a test may have ended before it was counted


def _epochs(evidence: Evidence) -> str:
    done = len(evidence.run.epochs)
    wanted = evidence.run.config["trainer"].get("max_epochs")
    return f"{done}{f' of {wanted}' if wanted and wanted > 0 else ''} epochs are done"


def _percent(share: float) -> str:
    return "unknown" if not math.isfinite(share) else f"{100 * share:.1f} %"


def _interval(score: tuple[float, float, float]) -> str:
    if not math.isfinite(score[1]):
        return "without an interval, since all resamplings agree"
    return f"95 % interval {_percent(score[1])} to {_percent(score[2])}"


def _with_interval(score: tuple[float, float, float]) -> str:
    value, low, high = score
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if math.isfinite(low) else f"{value:.3f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if callable(value):
        return getattr(value, "__name__", "…")
    return str(value)
