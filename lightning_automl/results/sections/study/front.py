"""The Pareto front of a study with several objectives."""

from itertools import combinations

from lightning_automl.results.page import Section, Text, pictures
from lightning_automl.results.study import StudyRecord


def front(record: StudyRecord) -> Section | None:
    """What can be had for what, two objectives in a picture."""
    if not record.several or not record.usable:
        return None
    from lightning_automl.plots.pareto import NUMBERED, pareto_front

    figures = {}
    for first, second in combinations(range(len(record.monitors)), 2):
        figures[f"front{first}_{second}"] = pareto_front(
            [trial.number for trial in record.usable],
            [(trial.values[first], trial.values[second]) for trial in record.usable],
            record.best,
            names=(record.monitors[first], record.monitors[second]),
            maximize=(record.maximize(first), record.maximize(second)),
            joined=len(record.monitors) == 2,
        )
    text = (
        "Of a trial on the front, nothing can be bettered in one objective without losing in another: which to take "
        "is your choice."
    )
    if len(record.best) <= NUMBERED:
        text += " The numbers are those of trials."
    if len(record.monitors) > 2:
        text += " A trial on the front of all objectives may look surpassed where only two of them are drawn."
    return Section("Pareto front", [pictures(**figures), Text(text)])
