"""How a policy search went, and what each of its stages cost."""

from typing import Any

from lightning_automl.results.page import Section, Table, Text, pictures
from lightning_automl.results.policy_search import PolicySearchRecord, failed
from lightning_automl.results.sections.wording import counted, duration, hardware_text

#: Of more folds the first ones are drawn.
_FOLDS = 12


def history(record: PolicySearchRecord) -> Section | None:
    """The best value by trial, for each fold and round."""
    if not record.by_density or not any(record.values.values()):
        return None
    from lightning_automl.plots import density_history

    clean = record.clean
    folds = sorted({fold for fold, _ in record.values})
    drawn = {
        f"density{fold}": density_history(
            f"fold {fold}",
            {number: values for (own, number), values in record.values.items() if own == fold},
            clean.get(fold),
            name=record.objective,
        )
        for fold in folds[:_FOLDS]
    }
    text = (
        "Points: policies that were scored, small triangles those beyond the picture; lines: the best one so far of "
        "each round."
    )
    if clean:
        text += " A policy at the dotted line is as easy for the network as unchanged images are."
    if len(folds) > _FOLDS:
        text += f" {counted(len(folds) - _FOLDS, 'more fold')} are left out."
    return Section("How the best policies were found", [pictures(**drawn), Text(text)])


def failures(record: PolicySearchRecord) -> Section | None:
    """Where policies gave no value."""
    folds = sorted({fold for fold, _ in record.values})
    rows: list[list[Any]] = []
    for fold in folds:
        own = [values for (each, _), values in record.values.items() if each == fold]
        if any(map(failed, own)):
            rows.append([f"fold {fold}", f"{sum(map(failed, own))} of {sum(map(len, own))}"])
    if not rows:
        return None
    text = "Their values were no numbers; they were never kept. The reasons are in trials.csv."
    return Section("Policies that gave no value", [Table(["", "policies"], rows), Text(text)])


def cost(record: PolicySearchRecord) -> Section | None:
    """Epochs and seconds of each stage."""
    seconds, epochs = record.record.get("seconds") or {}, record.record.get("epochs") or {}
    scored = int(record.record.get("evaluations") or 0)
    runs = 0 if record.acceptance is None else sum(len(arm.values) for arm in record.acceptance.arms)
    stages = {
        "folds": ("training the folds' networks", counted(record.folds, "run")),
        "density": ("scoring policies", _policies(scored)),
        "trials": ("training with each policy", _policies(scored)),
        "acceptance": ("comparing with simple policies", counted(runs, "run")),
    }
    rows: list[list[Any]] = []
    for key, (name, what) in stages.items():
        if seconds.get(key) or epochs.get(key):
            rows.append([name, what, _epochs(epochs.get(key)), duration(float(seconds.get(key) or 0))])
    if not rows:
        return None
    if len(rows) > 1:
        total = [sum(float(each or 0) for each in own.values()) for own in (epochs, seconds)]
        rows.append(["all, added up over workers", "", f"{total[0]:,.0f}", duration(total[1])])
    blocks: list[Any] = [Table(["", "", "epochs", "time"], rows)]
    if seconds.get("density") and scored:
        rate = scored / float(seconds["density"])
        blocks.append(Text(f"{rate:.3g} policies were scored a second of a worker's time."))
    if record.environment.get("hardware"):
        blocks.append(Text(f"On {hardware_text(record.environment['hardware'])}."))
    return Section("Cost", blocks)


def _epochs(number: Any) -> str:
    return f"{int(number):,}" if number else "0"


def _policies(number: int) -> str:
    return f"{number:,} {'policy' if number == 1 else 'policies'}"
