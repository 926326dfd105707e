"""The plan: what is done with the time that is given. A pure function of what was seen and what was measured."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_automl.auto.arms import ARMS, in_order
from lightning_automl.auto.costs import REDUCTION, Costs, Programme
from lightning_automl.auto.facts import Facts
from lightning_automl.auto.ladder import MOST_SEEDS, POLICIES, Ladder
from lightning_automl.auto.reasons import not_run, sentences, why_not
from lightning_automl.rundir import UserError
from lightning_automl.studies.progress import spoken

#: Share of the budget that is planned for: no measurement is better than the rest.
AIM = 0.9
#: A longer budget takes other epochs, and so trains all anew, if they are at least so many times as many.
_ANEW = 2.0


def make_plan(
    facts: Facts,
    measured: Mapping[str, Any],
    *,
    budget: float,
    spent: float,
    workers: int,
    metric: str,
    former: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Decide which arms, policies, epochs, seeds and searches fit into the budget.

    Folds are those of the facts, whatever the budget.

    Args:
        facts: What was seen of the data.
        measured: How long an epoch of each arm takes on this machine.
        budget: Seconds of wall time for everything.
        spent: Seconds that are gone, with those of a former plan.
        workers: Runs at once.
        metric: By which candidates are judged.
        former: The plan with a smaller budget that this one continues; its runs count as done.

    Returns:
        What ``plan.json`` holds.

    Raises:
        UserError: If not even one epoch of one arm fits, with the time that it would take.
    """
    arms = in_order(measured["arms"])
    order = [name for name in arms if not ARMS[name].only_searched]
    costs = Costs(facts, measured, workers)
    ladder = Ladder(costs, order)
    left = AIM * budget - spent - costs.evaluation(budget)
    programme = ladder.climb(left) if order else None
    gone = spent
    if former is not None and (known := programme_of(former, order)) is not None:
        trained = sum(each["seconds"] for each in former["stages"] if each["name"] != "evaluation")
        # What was trained counts as done: of what is spent the rest alone is lost.
        lost = max(float(former["spent"]), spent - trained)
        longer = ladder.climb(AIM * budget - lost - costs.evaluation(budget), known)
        if longer is not None and longer.compared and not known.compared:
            # The selection is made anew, without the folds that are kept for the comparison.
            lost += next(each["seconds"] for each in former["stages"] if each["name"] == "selection")
            longer = ladder.climb(AIM * budget - lost - costs.evaluation(budget), known)
        if programme is None or not _worth_anew(programme, known):
            programme, gone = longer, lost
    if programme is None:
        raise UserError(_too_small(costs, order, budget, spent))
    return _record(facts, measured, costs, ladder, programme, budget=budget, gone=gone, spent=spent, metric=metric)


def programme_of(plan: Mapping[str, Any], order: list[str]) -> Programme | None:
    """The programme that a plan holds, None if one of its arms cannot be run any more."""
    if not all(arm["name"] in order for arm in plan["arms"]):
        return None
    pairs = [(arm["name"], policy) for policy in POLICIES for arm in plan["arms"] if policy in arm["policies"]]
    cells = plan["architecture_search"] or {}
    return Programme(
        epochs={arm["name"]: arm["epochs"] for arm in plan["arms"]},
        defaults=tuple(pairs),
        folds=len(plan["search_folds"]),
        tuned=tuple(plan["generations"][1:]),
        seeds=plan["final"]["seeds"],
        compared=(plan["comparison"] or {}).get("seeds", 0),
        policies=(plan["policy_search"] or {}).get("trials", 0),
        cells=cells.get("epochs", 0),
        cell_epochs=cells["arm"]["epochs"] if cells else 0,
    )


def _worth_anew(programme: Programme, former: Programme) -> bool:
    """Whether the arms of a former programme would be trained for so much longer that its runs are worth nothing."""
    ratios = [programme.epochs.get(arm, 0) / epochs for arm, epochs in former.epochs.items()]
    return sum(ratios) / len(ratios) >= _ANEW


def _record(
    facts: Facts,
    measured: Mapping[str, Any],
    costs: Costs,
    ladder: Ladder,
    programme: Programme,
    *,
    budget: float,
    gone: float,
    spent: float,
    metric: str,
) -> dict[str, Any]:
    time = AIM * budget - gone - costs.evaluation(budget)
    plan: dict[str, Any] = {
        "version": 1,
        "budget": budget,
        "spent": round(spent, 3),
        "available": round(max(0.0, budget - gone) * costs.workers, 3),
        "metric": metric,
        "direction": "minimize" if metric.endswith("loss") else "maximize",
        "folds": facts.folds,
        "search_folds": list(costs.folds(programme)),
        "comparison_folds": list(facts.comparison_folds),
        "arms": [
            {**_arm(costs, programme, name), "policies": _policies(programme, name)}
            for name in ladder.order
            if name in programme.epochs
        ],
        "not_run": not_run(measured, ladder, programme, time),
        "generations": [len(programme.defaults), *programme.tuned],
        "reduction": REDUCTION,
        "patience": facts.patience,
        "policy_search": None,
        "architecture_search": None,
        "comparison": {"seeds": programme.compared} if programme.compared else None,
        "final": {"seeds": programme.seeds, "most": max(programme.seeds, MOST_SEEDS)},
        "why_not": why_not(measured, ladder, programme, time),
        "stages": _stages(costs, programme, budget),
    }
    if programme.policies:
        plan["policy_search"] = {
            "folds": len(facts.search_folds),
            "trials": programme.policies,
            "rounds": costs.rounds,
            "why": f"about {spoken(costs.policy_search(programme))} of {spoken(time)}",
        }
    if programme.cells:
        plan["architecture_search"] = {
            "epochs": programme.cells,
            "arm": {**_arm(costs, programme, "pcdarts"), "policies": [POLICIES[0]]},
            "why": f"about {spoken(costs.architecture_search(programme))} of {spoken(time)}",
        }
    return plan | {"sentences": sentences(facts, plan, costs)}


def _arm(costs: Costs, programme: Programme, name: str) -> dict[str, Any]:
    epochs = programme.epochs.get(name, programme.cell_epochs)
    kinds = {"search": costs.kind(programme), "comparison": "comparison", "final": "final"}
    seconds = {kind: round(costs.run(name, epochs, own), 3) for kind, own in kinds.items()}
    return {
        "name": name,
        "title": ARMS[name].title,
        "epochs": epochs,
        "default_epochs": costs.default[name],
        "run_seconds": seconds["final"],
        "seconds": seconds,
    }


def _policies(programme: Programme, arm: str) -> list[str]:
    return [policy for policy in POLICIES if (arm, policy) in programme.defaults]


def _stages(costs: Costs, programme: Programme, budget: float) -> list[dict[str, Any]]:
    seconds = {
        "selection": costs.selection(programme),
        "policy_search": costs.policy_search(programme),
        "architecture_search": costs.architecture_search(programme),
        "comparison": costs.comparison(programme),
        "final": costs.final(programme),
        "evaluation": costs.evaluation(budget),
    }
    return [{"name": name, "seconds": round(each, 3)} for name, each in seconds.items()]


def _too_small(costs: Costs, order: list[str], budget: float, spent: float) -> str:
    if not order:
        return "there is no arm that could be measured, so nothing can be planned; log.txt says why"
    arm = min(order, key=lambda name: costs.run(name, 1))
    run = costs.run(arm, 1)
    # b such that AIM b - spent - evaluation(b) = run
    share = costs.evaluation(1.0) - costs.evaluation(0.0)
    least = math.ceil((run + spent + costs.evaluation(0.0)) / (AIM - share) / 10) * 10
    return (
        f"a budget of {budget:g} s is too small for one epoch: of {ARMS[arm].title}, the fastest arm, it takes "
        f"{run:.1f} s on this machine, evaluation and report take about {costs.evaluation(budget):.0f} s and "
        f"{spent:.0f} s are spent; give {least} s or more"
    )
