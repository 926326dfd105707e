"""How the final trainings went."""

from lightning_automl.results.page import Section, Text, pictures
from lightning_automl.results.run import Run
from lightning_automl.results.sections.strategy.words import metric_name
from lightning_automl.results.sections.wording import counted
from lightning_automl.results.strategy import StrategyRecord
from lightning_automl.rundir import UserError


def curves(record: StrategyRecord) -> Section | None:
    """Loss, and what decides, of each final training of the chosen model."""
    if record.chosen is None:
        return None
    runs = []
    for each in record.chosen.seeds:
        try:
            runs.append(Run.read(record.directory / each.directory))
        except UserError:  # its directory was removed
            continue
    if not any(run.epochs for run in runs):
        return None
    from lightning_automl.plots import seed_curves

    names = dict.fromkeys(("loss", record.metric.removeprefix("val_")))
    drawn = {f"curve_{name}": seed_curves([run.epochs for run in runs], name, metric_name(name)) for name in names}
    text = f"{counted(len(runs), 'final training')} of the chosen model, a line each."
    last = all(run.config.get("monitor") == "epoch" for run in runs)
    best = f"epoch with the best validation {metric_name(record.metric)}"
    text += (
        " Of each the last epoch is kept: on few images the best is luck." if last else f" Of each the {best} is kept."
    )
    return Section("Learning curves", [pictures(**drawn), Text(text)])
