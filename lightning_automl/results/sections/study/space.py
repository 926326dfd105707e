"""Which values the trials had, and what became of them."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_automl.results.page import Section, Table, Text, pictures
from lightning_automl.results.sections.wording import counted, value_text
from lightning_automl.results.study import ParameterRecord, StudyRecord

if TYPE_CHECKING:
    from lightning_automl.plots import Dimension

_SLICES = 12
_AXES = 12
_METHODS = {"ped_anova": "PED-ANOVA", "fanova": "fANOVA"}
#: Complete trials that `search` computes importances from, at least.
_IMPORTANCE_TRIALS = 10


def dimension(parameter: ParameterRecord) -> "Dimension":
    """The axis of a parameter in a figure."""
    from lightning_automl.plots import Dimension

    if parameter.kind == "choice":
        names = [value_text(choice) for choice in parameter.choices]
        ends = [name.rsplit(".", 1)[-1] for name in names]
        if parameter.path.endswith("class_path") and len(set(ends)) == len(ends):
            names = ends
        return Dimension(parameter.label, choices=names)
    low, high = parameter.low or 0.0, parameter.high or 0.0
    return Dimension(parameter.label, low, high, parameter.log and low > 0, parameter.kind == "int")


def choice_text(parameter: ParameterRecord, value: Any) -> str:
    """What a value of a parameter is called in figures and tables."""
    place = parameter.place(value)
    if parameter.kind == "choice" and math.isfinite(place):
        return dimension(parameter).choices[int(place)]
    return value_text(value)


def most_important(record: StudyRecord, monitor: str | None = None) -> list[ParameterRecord]:
    """Parameters that a trial with a value has, the most important first, else in the order of the space."""
    shares = _shares(record, monitor or record.monitors[0])
    some = [name for name in record.parameters if any(name in trial.params for trial in record.trials if trial.values)]
    some.sort(key=lambda name: [-float(shares.get(method, {}).get(name, 0)) for method in _METHODS])
    return [record.parameters[name] for name in some]


def _shares(record: StudyRecord, monitor: str) -> Mapping[str, Any]:
    found = record.importances.get(monitor, {}) if record.several else record.importances
    return found if isinstance(found, Mapping) else {}


def importances(record: StudyRecord) -> Section | None:
    """How much each parameter explains."""
    by = record.search.get("importances_by")  # of something that pruned trials have too
    count = len([trial for trial in record.of_state("COMPLETE", *(["PRUNED"] if by else [])) if trial.values])
    if record.population or not count or not record.parameters:
        return None
    trials = counted(count, "trial" if by else "complete trial")
    source = f"{trials} by {by}" if by else trials
    title = "Which parameters matter"
    figures = {}
    used: set[str] = set()
    for at, monitor in enumerate(record.monitors):
        own = {
            label: {
                record.parameters[name].label if name in record.parameters else name: float(share)
                for name, share in _shares(record, monitor)[method].items()
            }
            for method, label in _METHODS.items()
            if _shares(record, monitor).get(method)
        }
        if own:
            from lightning_automl.plots import parameter_importances

            figures[f"importances{at}"] = parameter_importances(own, monitor if record.several else "")
            used |= own.keys()
    if not figures:
        few = count < _IMPORTANCE_TRIALS
        needed = f"they need {_IMPORTANCE_TRIALS} {'trials' if by else 'complete trials'}"
        why = needed if few else "the values of the trials hardly differ"
        verb = "is" if count == 1 else "are"
        return Section(title, [Text(f"There {verb} {trials}, and no importances: {why}.")])
    said = {
        "PED-ANOVA": "PED-ANOVA compares the values of the best trials with those of all",
        "fANOVA": "fANOVA splits the variance that a random forest predicts, over the parameters that all trials have",
    }
    text = (
        f"From {source}{', which is little' if count < 50 else ''}: the order of the largest "
        f"shares is worth more than their sizes. {'; '.join(said[each] for each in said if each in used)}. Both speak "
        "of the ranges that were searched: a parameter whose values are all good, or all alike, has a small share."
    )
    if any(parameter.when for parameter in record.parameters.values()):
        text += " Of a parameter that few trials have, a share says little."
    return Section(title, [pictures(**figures), Text(text)])


def slices(record: StudyRecord) -> Section | None:
    """The values against each parameter."""
    if record.population:
        return None
    drawn = [trial for trial in record.trials if trial.state in ("COMPLETE", "PRUNED") and trial.values]
    if len(drawn) < 2:
        return None
    from lightning_automl.plots import value_slice

    figures, left = {}, 0
    for at, monitor in enumerate(record.monitors):
        chosen = most_important(record, monitor)
        left = max(left, len(chosen) - _SLICES // len(record.monitors))
        for parameter in chosen[: _SLICES // len(record.monitors)]:
            figures[f"slice{at}_{parameter.name}"] = value_slice(
                dimension(parameter),
                [parameter.place(trial.params.get(parameter.name)) for trial in drawn],
                [trial.values[at] for trial in drawn],
                [trial.state == "COMPLETE" for trial in drawn],
                maximize=record.maximize(at),
                name=monitor,
            )
    if not figures:
        return None
    order = "The most important parameter comes first. " if record.importances else ""
    text = f"{order}Points: complete trials, the best one large."
    if record.of_state("PRUNED"):
        text += " Crosses: pruned trials, at their last value."
    text += " Triangles at the edge: values beyond the picture."
    if left > 0:
        text += f" {counted(left, 'less important parameter')} {'is' if left == 1 else 'are'} left out."
    return Section("Value against each parameter", [pictures(**figures), Text(text)])


def parallel(record: StudyRecord) -> Section | None:
    """All values of all complete trials."""
    if record.population or len(record.usable) < 2:
        return None
    chosen = most_important(record)[:_AXES]
    if not chosen:
        return None
    from lightning_automl.plots import parallel_coordinates

    figure = parallel_coordinates(
        [dimension(parameter) for parameter in chosen],
        [[each.place(trial.params.get(each.name)) for each in chosen] for trial in record.usable],
        [trial.values[0] for trial in record.usable],
        maximize=record.maximize(),
        name=record.monitors[0],
    )
    text = f"One line for each of the {len(record.usable)} complete trials; the best one in red."
    if any(parameter.when for parameter in chosen):
        text += " A line that passes left of an axis has no such parameter."
    return Section("Parallel coordinates", [pictures(parallel=figure), Text(text)])


def space(record: StudyRecord) -> Section | None:
    """What was searched."""
    if not record.parameters:
        return None
    conditional = any(each.when for each in record.parameters.values())
    rows = [
        [each.label, range_text(each), *([_condition(record, each)] * conditional), each.path]
        for each in record.parameters.values()
    ]
    return Section("Space", [Table(["parameter", "values", *(["exists when"] * conditional), "key of the run"], rows)])


def range_text(parameter: ParameterRecord) -> str:
    """The values that a parameter can have."""
    if parameter.kind == "choice":
        return ", ".join(dimension(parameter).choices)
    text = f"{_exact(parameter.low)} to {_exact(parameter.high)}"
    if parameter.step is not None:
        text += f" in steps of {_exact(parameter.step)}"
    kind = "whole, " * (parameter.kind == "int" and parameter.log)
    return f"{text} ({kind}logarithmic)" if parameter.log else text


def _exact(value: float | None) -> str:
    return "" if value is None else f"{value:.12g}"


def _condition(record: StudyRecord, parameter: ParameterRecord) -> str:
    parts = []
    for name, wanted in parameter.when.items():
        other = record.parameters.get(name)
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        texts = [value_text(value) if other is None else choice_text(other, value) for value in values]
        parts.append(f"{name if other is None else other.label} is {' or '.join(texts)}")
    return " and ".join(parts)
