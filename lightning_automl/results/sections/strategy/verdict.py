"""What a reader of a strategy's page has to know first, in three sentences."""

import math

from lightning_automl.results.evidence import split_name
from lightning_automl.results.sections.scoring import score_of, times_opened
from lightning_automl.results.sections.strategy.words import (
    difference_words,
    ends,
    is_better,
    kind_words,
    metric_name,
    stage_name,
    time_words,
)
from lightning_automl.results.sections.verdict import weakness
from lightning_automl.results.sections.wording import counted, interval_text, metric, percent
from lightning_automl.results.strategy import CandidateRecord, ModelRecord, StrategyRecord, finite


def verdict(record: StrategyRecord) -> list[str]:
    """What the model can do, whether what was searched helped, and where it is weakest; or how far the command is."""
    if record.evidence is None or record.chosen is None:
        return [_unfinished(record), _so_far(record), _go_on(record)]
    return [_achieved(record, record.chosen), _searched(record), _weakest(record)]


# ---- finished


def _achieved(record: StrategyRecord, chosen: ModelRecord) -> str:
    evidence = record.evidence
    assert evidence is not None
    assert evidence.judged is not None
    names, judged, split = evidence.class_names, evidence.judged, evidence.split
    where = f"On the {len(judged.labels):,} {split_name(split)} images"
    if split == "test":
        opened = times_opened(evidence)
        where += f", opened {'once' if opened == 1 else f'{opened} times'}"
    balanced, auroc = score_of("balanced_accuracy", evidence), score_of("auroc", evidence)
    text = f"{where}, {chosen.title!r}{_averaged(record, chosen)} has a balanced accuracy of {percent(balanced[0])} "
    text += f"({interval_text(balanced)})"
    if math.isfinite(auroc[0]):
        interval = f" (95 % interval {auroc[1]:.3f} to {auroc[2]:.3f})" if math.isfinite(auroc[1]) else ""
        text += f" and an AUROC of {auroc[0]:.3f}{interval}"
    text += f", where guessing would give {percent(1 / max(len(names), 1))}" + " and 0.5" * math.isfinite(auroc[0])
    if split == "val":
        text += "; the test split is still closed, and validation, on which all was chosen, flatters"
    if not record.finished:
        text = f"The command has not come to its end, but its model is there: {text[0].lower()}{text[1:]}"
    return f"{text}."


def _averaged(record: StrategyRecord, chosen: ModelRecord) -> str:
    count = len(chosen.seeds)
    kind = record.model.get("average")
    if count < 2:
        return " (one training)"
    words = {
        "predictions": f"the mean of the predictions of {count} trainings",
        "weights": f"the mean of the weights of {count} trainings",
        "single": f"the best one of {count} trainings",
    }
    return f" ({words[kind]})" if kind in words else f" ({count} trainings)"


def _searched(record: StrategyRecord) -> str:
    """By rule: better only when the interval of the paired difference says so."""
    found = record.comparison
    simple = record.title(record.simple_key) if record.simple_key else "the best default"
    if not math.isfinite(finite(found.get("difference"))):
        why = _kept(str(found.get("sentence") or _why_nothing(record)).strip().removesuffix("."))
        return f"{why[0].upper()}{why[1:]}; the simple arm ({simple!r}) is kept."
    searched = record.title(found.get("searched"))
    runs = len((found.get("values") or {}).get("searched") or ())
    where = f"in {counted(runs, 'paired training')} on folds that no search had seen" if runs else "in the comparison"
    gap = difference_words(found, metric_name(record.metric))
    who = f"What was searched ({kind_words(record)}: {searched!r})"
    if is_better(found, record.maximize):
        end = "" if found.get("adopted") == "searched" else ", yet it was not adopted"
        if record.instead_of is not None:
            end = ", yet none of its final trainings gave a model, so that the simple one is used"
        return f"{who} beat the simple arm ({simple!r}) {where}: {gap}{end}."
    adopted = (
        "so that the simple one was kept" if found.get("adopted") != "searched" else "and was adopted all the same"
    )
    return f"{who} did not outperform the simple arm ({simple!r}) {where} ({gap}), {adopted}."


def _why_nothing(record: StrategyRecord) -> str:
    why = record.plan.get("why_not") or {}
    return str(why.get("comparison") or "nothing was searched")


def _kept(why: str) -> str:
    """A reason without what follows from it, which is said with the name of what is kept."""
    return why.removesuffix("the simple arm is kept").strip().removesuffix(";") or "nothing was searched"


def _weakest(record: StrategyRecord) -> str:
    evidence = record.evidence
    assert evidence is not None
    if evidence.split == "val":
        return "Its weakest point is that no image but those it was chosen by has been asked of it yet."
    return weakness(evidence)


# ---- unfinished


def _unfinished(record: StrategyRecord) -> str:
    reason = str((record.summary or {}).get("reason") or "").strip().removesuffix(".")
    failed = (record.summary or {}).get("status") == "failed" and reason not in ("", "interrupted")
    failed = failed and not reason.startswith("not finished")
    beginning = f"This strategy failed ({reason})" if failed else "This strategy is not finished"
    spent = ""
    if math.isfinite(record.seconds):
        spent = f"; {time_words(record.seconds)} are spent"
        spent += f" of {time_words(record.budget)}" if math.isfinite(record.budget) else ""
    return f"{beginning}: {'; '.join(_steps(record))}{spent}."


def _steps(record: StrategyRecord) -> list[str]:
    """What has been done, the newest of it in detail."""
    if not record.look:
        return ["the data have not been looked at yet"]
    steps = [
        f"the data are looked at ({record.look.get('images', 0):,} images in "
        f"{len(record.look.get('class_names') or ())} classes)"
    ]
    if not record.plan:
        return [*steps, "there is no plan yet" if not record.measured else "trainings are measured"]
    if not record.candidates:
        return [*steps, "the plan is made", "no candidate is judged yet"]
    wanted = max(sum(record.plan.get("generations") or ()), len(record.candidates))
    complete = sum(each.state == "COMPLETE" for each in record.candidates)
    steps.append(f"{len(record.candidates)} of {wanted} candidates are judged, {complete} of them on all folds")
    if record.comparison:
        steps.append("what was searched is compared with the simple arm")
    finals = len(list(record.directory.glob("runs/*/final-*/summary.json")))
    if finals:
        steps.append(f"{counted(finals, 'final training')} {'is' if finals == 1 else 'are'} done, and none is tested")
    return steps


def _so_far(record: StrategyRecord) -> str:
    leader = record.candidate(record.leader) or _best(record)
    if leader is None or not math.isfinite(leader.mean):
        return "Nothing can be said of any model yet, and the test split is closed."
    interval = f", 95 % interval {ends(leader.low, leader.high)}" if math.isfinite(leader.low) else ""
    return (
        f"So far {record.title(leader.key)!r} leads with {metric_name(record.metric)} {metric(leader.mean)} over "
        f"{counted(len(leader.folds), 'fold')}{interval}, which being chosen by it flatters, and the test split is "
        "closed."
    )


def _best(record: StrategyRecord) -> CandidateRecord | None:
    known = [each for each in record.candidates if math.isfinite(each.mean)]
    sign = 1 if record.maximize else -1
    return max(known, key=lambda each: (each.state == "COMPLETE", sign * each.mean), default=None)


def _go_on(record: StrategyRecord) -> str:
    last = next(reversed(record.progress.get("stages") or {}), None)
    where = f" in the stage it was in ({stage_name(last)})" if last else " where it stopped"
    return f"Give the same command again: it goes on{where}, and repeats nothing that is done."
