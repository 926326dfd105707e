"""The plan in sentences, with the numbers that decided, and why something is not in it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_automl.auto.arms import ARMS
from lightning_automl.auto.costs import LEAST, Costs, Programme
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.ladder import (
    CELL_EPOCHS,
    FEWEST_FOR_POLICY,
    PAIRS,
    POLICY_TRIALS,
    SEARCHED_FROM,
    Ladder,
)
from lightning_automl.studies.progress import spoken

#: What is measured for the architecture search: its network, and the search itself.
_CELLS = ("pcdarts", "architecture_search")
_POLICY_NAMES = {"none": "no policy", "trivial_augment": "TrivialAugment"}


def not_run(measured: Mapping[str, Any], ladder: Ladder, programme: Programme, time: float) -> list[dict[str, str]]:
    """Arms that are not in the programme, and why.

    Args:
        measured: ``measured.json``.
        ladder: What the programme was made by.
        programme: What is planned.
        time: Seconds that were planned for, those of evaluation and report not counted.
    """
    found = {}
    for name in ARMS:
        if name in measured["not_run"]:
            found[name] = measured["not_run"][name]
        elif name in measured["arms"] and name in ladder.order and name not in programme.epochs:
            found[name] = _why_no_arm(name, ladder, programme, time)
        elif name in measured["arms"] and name not in ladder.order and not programme.cells:
            found[name] = _why_no_cells(ladder, programme, time)
    return [{"name": name, "title": ARMS[name].title, "why": why} for name, why in found.items()]


def _why_no_arm(name: str, ladder: Ladder, programme: Programme, time: float) -> str:
    costs, limit = ladder.costs, ladder.run_limit(time)
    fewest = max(1, round(ladder.smallest_scale(programme, name) * costs.default[name]))
    if costs.run(name, fewest) > limit:
        return (
            f"a run of {_counted(fewest, 'epoch')} takes {spoken(costs.run(name, fewest))}, and it may take "
            f"{spoken(limit)} in this budget"
        )
    return "arms that are tried before it take the time that there is for the selection"


def why_not(measured: Mapping[str, Any], ladder: Ladder, programme: Programme, time: float) -> dict[str, str]:
    """Why there is no comparison, policy search or architecture search, by name of the stage; see :func:`not_run`."""
    found = {}
    if not programme.compared:
        found["comparison"] = _why_no_comparison(ladder, programme, time)
    if not programme.policies:
        found["policy_search"] = _why_no_policies(ladder, programme, time)
    if not programme.cells:
        missing = next((measured["not_run"][name] for name in _CELLS if name in measured["not_run"]), None)
        found["architecture_search"] = missing or _why_no_cells(ladder, programme, time)
    return found


def _why_no_comparison(ladder: Ladder, programme: Programme, time: float) -> str:
    costs = ladder.costs
    if not costs.facts.comparison_folds:
        return "there are too few images for folds that no choice sees"
    if time < SEARCHED_FROM:
        return (
            f"nothing is tuned or searched, since {spoken(max(0.0, time))} are too few: it begins at "
            f"{spoken(SEARCHED_FROM)}, evaluation and report not counted"
        )
    seeds = math.ceil(PAIRS / len(costs.facts.comparison_folds))
    more = costs.total(replace(programme, compared=seeds, tuned=(max(4, 2 * costs.workers),))) - costs.total(programme)
    return (
        f"nothing is tuned or searched: candidates and the comparison with the simple arm would take {spoken(more)}, "
        f"and {spoken(max(0.0, time - costs.total(programme)))} are left"
    )


def _why_no_policies(ladder: Ladder, programme: Programme, time: float) -> str:
    facts = ladder.costs.facts
    if not ladder.may_search_policies:
        return (
            f"a fold needs {FEWEST_FOR_POLICY} images of each class and another fold beside it; there are "
            f"{_counted(len(facts.search_folds), 'fold')} to search on"
        )
    return _too_long(programme, time, ladder.costs.policy_search(replace(programme, policies=POLICY_TRIALS[0])))


def _why_no_cells(ladder: Ladder, programme: Programme, time: float) -> str:
    if not ladder.may_search_cells:
        return "it was not measured" if len(ladder.costs.facts.search_folds) > 1 else "there is one fold to search on"
    return _too_long(programme, time, ladder.costs.architecture_search(replace(programme, cells=CELL_EPOCHS[0])))


def _too_long(programme: Programme, time: float, seconds: float) -> str:
    if not programme.compared:
        return "what it finds could not be compared with the simple arm"
    return f"it would take {spoken(seconds)} at least, too much of {spoken(time)} beside what is planned"


def sentences(facts: Facts, plan: Mapping[str, Any], costs: Costs) -> list[str]:
    """The plan for a person, one sentence each.

    Args:
        facts: What was seen of the data.
        plan: What ``plan.json`` holds, without the sentences.
        costs: What everything takes.
    """
    seconds = {each["name"]: each["seconds"] for each in plan["stages"]}
    total = sum(seconds.values())
    told = [
        f"Budget: {spoken(plan['budget'])}, of which {spoken(plan['spent'])} are spent and {spoken(total)} are planned "
        f"({spoken(seconds['evaluation'])} for evaluation and report), with {_counted(costs.workers, 'run')} at once.",
        _of_folds(facts, plan),
    ]
    told += [_of_arm(arm) for arm in plan["arms"]]
    told.append(_of_selection(plan, seconds))
    if (wanted := plan["policy_search"]) is not None:
        told.append(
            f"Policy search: Fast AutoAugment on {_counted(wanted['folds'], 'fold')}, {wanted['trials']} policies in "
            f"each of {wanted['rounds']} rounds, {wanted['why']}."
        )
    if (wanted := plan["architecture_search"]) is not None:
        told.append(f"Architecture search: PC-DARTS for {_counted(wanted['epochs'], 'epoch')}, {wanted['why']}.")
    if (wanted := plan["comparison"]) is not None:
        told.append(
            f"Comparison: what was searched best against the simple arm, with {_counted(wanted['seeds'], 'seed')} on "
            f"{_counted(len(plan['comparison_folds']), 'held-out fold')}, about {spoken(seconds['comparison'])}."
        )
    else:
        told.append(f"No comparison: {plan['why_not']['comparison']}.")
    told.append(
        f"Final: {_counted(plan['final']['seeds'], 'seed')} of the chosen candidate, about {spoken(seconds['final'])}"
        f"{', those of the simple arm with them if it is another' if plan['comparison'] else ''}"
        f"{', each without another fold, as there are few images for validation' if facts.final_folds else ''}"
        f"{_up_to(plan['final'])}."
    )
    return [*told, *(f"Not run: {each['title']}, since {each['why']}." for each in plan["not_run"])]


def _up_to(final: Mapping[str, int]) -> str:
    return f"; up to {final['most']} in what is left over by then" if final["most"] > final["seeds"] else ""


def _of_arm(arm: Mapping[str, Any]) -> str:
    policies = " and with ".join(_POLICY_NAMES[policy] for policy in arm["policies"])
    shorter = "" if arm["epochs"] >= arm["default_epochs"] else f" of {arm['default_epochs']} by default"
    return (
        f"Arm: {arm['title']}, {_counted(arm['epochs'], 'epoch')}{shorter}, about {spoken(arm['run_seconds'])} a run, "
        f"with {policies}."
    )


def _of_folds(facts: Facts, plan: Mapping[str, Any]) -> str:
    images = f"{facts.number('train') + facts.number('val'):,} train and validation images"
    number, apart = len(plan["search_folds"]), len(plan["comparison_folds"])
    use = f"choices are made on {number} of them"
    if plan["comparison"] is not None:
        use += f", and {apart} {'is' if apart == 1 else 'are'} kept for the comparison"
    elif sum(plan["generations"]) == 1:
        use = "none is needed, since nothing is chosen"
    return (
        f"Folds: {_counted(plan['folds'], 'fold')} of the {images}; {use}. The test split stays closed until the end."
    )


def _of_selection(plan: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    first, *tuned = plan["generations"]
    if first == 1 and not tuned:
        return "Selection: there is time for one candidate, so nothing is chosen."
    more = f", then {sum(tuned)} with tuned values in {_counted(len(tuned), 'generation')}" if tuned else ""
    stopped = "none is stopped early"
    if (first > LEAST or tuned) and plan["patience"] < len(plan["search_folds"]):
        after = "each" if plan["patience"] == 1 else f"{plan['patience']} folds and after each later one"
        stopped = f"the worse two thirds stop after {after}"
    return (
        f"Selection: {_counted(first, 'candidate')} with default values{more}; fold by fold, {stopped}, about "
        f"{spoken(seconds['selection'])}."
    )


def _counted(number: int, one: str) -> str:
    return f"{number} {one}{'' if number == 1 else 's'}"
