"""How a policy search was made, and how to go on from it."""

import shlex

from lightning_automl.results.page import Commands, Section
from lightning_automl.results.policy_search import PolicySearchRecord
from lightning_automl.results.sections.provenance import version_table
from lightning_automl.results.sections.searches import settings_section


def settings(record: PolicySearchRecord) -> Section | None:
    """All settings of the search, and on a click those of the run that it trains."""
    own = {key: value for key, value in record.config.items() if key != "run"}
    if not own:
        return None
    return settings_section([], own, record.config.get("run"), "The run that is trained")


def versions(record: PolicySearchRecord) -> Section | None:
    """What has to be the same for the same numbers."""
    return version_table(record.environment)


def commands(record: PolicySearchRecord) -> Section:
    """How to train with what was adopted, and to go on."""
    directory = shlex.quote(str(record.directory))
    lines = []
    if not record.finished:
        lines.append(f"lightning-automl search --dir {directory}    # goes on")
    if (record.directory / "best.yaml").exists():
        lines.append(f"lightning-automl fit --config {directory}/best.yaml --dir {directory}-best")
    policy = "lightning-automl fit --config CONFIG.yaml --data.init_args.train_policy"
    if (record.directory / "policy.json").exists():
        lines.append(f"{policy} {directory}/policy.json    # any other run")
    found = record.acceptance
    if found is not None and found.adopted != "searched":
        lines.append(f"{policy} {directory}/searched_policy.json    # the searched policy all the same")
    return Section("Commands", [Commands(lines)])
