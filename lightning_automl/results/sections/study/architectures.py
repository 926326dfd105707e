"""Section about a found genotype beside random ones of the same space, trained at the same budget."""

import math
from typing import Any

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.architecture_search import Cells
from lightning_automl.results.control import FEWEST, Control, TriedGenotype
from lightning_automl.results.page import Folded, Notes, Section, Table, Text, pictures
from lightning_automl.results.sections.architecture import drawing
from lightning_automl.results.sections.policy_words import MINUS
from lightning_automl.results.sections.wording import counted, duration, joined, metric
from lightning_automl.results.study import StudyRecord

#: Tables with more rows are folded, and more genotypes are not drawn.
_ROWS, _DRAWN = 16, 40
#: With fewer random genotypes only large differences can be told.
_SOME = 8
_STATES = {"PRUNED": "pruned", "FAIL": "failed", "REFUSED": "refused", "COMPLETE": "without a number"}


def architectures(record: StudyRecord) -> Section | None:
    """What the found and the random genotypes have reached, and whether the found one is better."""
    control = Control.of(record)
    if control is None:
        return None
    blocks: list[Any] = []
    shown = [each for each in control.genotypes if each.values]
    if shown:
        blocks.append(_strip_plot(control, shown))
    table = _table(control)
    folded = f"All {counted(len(table.rows), 'genotype')}"
    blocks += [table if len(table.rows) <= _ROWS else Folded(folded, table), Text(_how(control))]
    if notes := _notes(control):
        blocks.append(Notes(notes))
    return Section("Architectures", [*blocks, *_drawings(control)])


def _strip_plot(control: Control, shown: list[TriedGenotype]) -> Any:
    from lightning_automl.plots import genotype_values

    kept = shown[:_DRAWN]
    if control.found in shown and control.found not in kept:
        kept = [*kept[:-1], *(each for each in shown if each is control.found)]
    return pictures(
        architectures=genotype_values(
            [each.name for each in kept],
            [each.values for each in kept],
            [(each.mean, each.low, each.high) for each in kept],
            [each.random is None for each in kept],
            metric=control.record.monitors[0],
            maximize=control.record.maximize(),
            expected=control.expected,
        )
    )


def _table(control: Control) -> Table:
    rows = []
    rank = 0
    for place, each in enumerate(control.genotypes, start=1):
        before = control.genotypes[place - 2] if place > 1 else None
        rank = rank if before is not None and math.isclose(before.mean, each.mean) else place
        interval = f"{metric(each.low)} to {metric(each.high)}" if math.isfinite(each.low) else ""
        parameters = control.parameters(each)
        rows.append(
            [
                each.name,
                rank if each.values else "",
                metric(each.mean) if each.values else "none",
                interval,
                _runs(each),
                "" if parameters is None else f"{parameters:,}",
                duration(each.seconds) if math.isfinite(each.seconds) else "",
            ]
        )
    monitor = control.record.monitors[0]
    head = ["genotype", "rank", f"mean {monitor}", "95 % interval over seeds", "runs", "parameters", "time of a run"]
    return Table(head, rows)


def _runs(tried: TriedGenotype) -> str:
    parts = [f"{count} {_STATES.get(state, state.lower())}" for state, count in tried.missing.items()]
    return f"{len(tried.values)}{f' ({joined(parts)})' if parts else ''}"


def control_verdict(control: Control) -> list[str]:
    """Whether the found genotype is better than random ones, in a sentence or two."""
    monitor, found, random = control.record.monitors[0], control.found, control.random
    there = f"{counted(len(random), 'random genotype')}"
    if found is None:
        return [
            "The genotype that a search has found is not among those of this study, so that nothing is said of it; "
            "null among the values of random stands for it."
        ]
    if not found.values:
        return ["No run of the found genotype is complete, so that it cannot be compared with random ones yet."]
    seeds = counted(len(found.values), "seed")
    begin = f"The found genotype has a {'mean ' if len(found.values) > 1 else ''}{monitor} of {metric(found.mean)}"
    if not random:
        return [f"{begin} over {seeds}; no random genotype has a value yet to compare it with."]
    place = f"it is {_ordinal(control.rank or 1)} of {len(random) + 1}"
    if control.tied:
        place += f", with {counted(control.tied, 'other')}"
    gap = control.difference
    if gap is None:
        return [
            f"{begin} over {seeds}; {place}. {there[0].upper()}{there[1:]} {'is' if len(random) == 1 else 'are'} too "
            f"few to say whether it is better than chance: at least {FEWEST} are needed, better {_SOME} or more."
        ]
    centre = metric(found.mean - gap.difference)
    said = f"{begin} over {seeds}, {there} have {centre} on average: a difference of {_signed(gap.difference)}"
    if not math.isfinite(gap.low):
        return [f"{said}, without an interval, since the random ones are all equal; {place}."]
    interval = f"95 % interval {_signed(gap.low)} to {_signed(gap.high)}"
    better = gap.low > 0 if control.record.maximize() else gap.high < 0
    if better and len(found.values) < 2:
        became = "better than drawing at random gives; but one seed is luck as well: train with two or more"
    elif better:
        became = "better than drawing at random gives"
    elif gap.excludes_zero:
        became = "worse than random ones by more than chance"
    else:
        became = "did not outperform random genotypes by more than chance"
    return [f"{said} ({interval}); {place}, and {became}."]


def _how(control: Control) -> str:
    """How the interval is made, and why so."""
    text = (
        "The unit is the genotype: each counts once, by its mean over the seeds. The interval is the difference plus "
        "and minus t s \N{SQUARE ROOT}(1 + 1/K), with s the deviation of the K random means and t of Student's "
        "distribution with K \N{MINUS SIGN} 1 degrees of freedom: of genotypes drawn like the random ones, 95 % have "
        "an interval that contains 0. The luck of the seeds is in s, too. To be above the mean of the random ones "
        "alone tells nothing: half of them are."
    )
    if control.rank is not None and control.random:
        many = len(control.random) + 1
        text += f" A genotype drawn like them is the first of {many} with a probability of {100 / many:.0f} %."
    return text


def _notes(control: Control) -> list[str]:
    notes = []
    counts = {len(each.values) for each in control.genotypes}
    if len(counts) > 1:
        notes.append(
            f"Not all genotypes have the same number of complete runs ({min(counts)} to {max(counts)}): the means of "
            "fewer runs vary more, and runs that failed or were pruned may have been the worse ones."
        )
    if any(trial.state == "PRUNED" for each in control.genotypes for trial in each.trials):
        notes.append("Pruned runs do not count: a fair comparison trains all genotypes to the end.")
    if counts and max(counts) < 2:
        notes.append("Each genotype was trained with one seed: how much seeds matter is not known.")
    if control.difference is not None and len(control.random) < _SOME:
        notes.append(
            f"With {len(control.random)} random genotypes only large differences can be told from chance: that the "
            "found one is no better is not shown either."
        )
    sizes = [size for each in control.random if (size := control.parameters(each)) is not None]
    own = None if control.found is None else control.parameters(control.found)
    if own is not None and sizes and not min(sizes) <= own <= max(sizes):
        notes.append(
            f"The network of the found genotype has {own:,} parameters, those of the random ones {min(sizes):,} to "
            f"{max(sizes):,}: a difference may come from size alone."
        )
    if control.others:
        notes.append(
            f"The study also varies {joined(control.others)}: the comparison is fair only if every genotype had the "
            "same values."
        )
    if control.found is not None:
        notes.append(
            "The found genotype is that of one search. Whether the search finds good ones, several searches with other "
            "seeds tell."
        )
    return notes


def _drawings(control: Control) -> list[Any]:
    """The found one, and the best and the worst random one, as graphs."""
    wanted = {"found": control.found}
    if control.random:
        wanted["best_random"] = control.random[0]
    if len(control.random) > 1:
        wanted["worst_random"] = control.random[-1]
    said = {"found": "", "best_random": ", the best", "worst_random": ", the worst"}
    cells, captions = {}, []
    for key, tried in wanted.items():
        if tried is None:
            continue
        try:
            cells[f"drawing_{key}"] = Cells.of(control.genotype(tried).to_dict())
        except Exception as error:  # whatever reading files of the user raises
            reason = one_sentence(root_cause(error)).removesuffix(".")
            return [Text(f"The genotypes cannot be drawn: {reason}.")]
        value = f": {metric(tried.mean)}" if tried.values else ""
        captions.append(f"{tried.name[0].upper()}{tried.name[1:]}{said[key]}{value}")
    return [drawing(captions, **cells)] if cells else []


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else MINUS if value < 0 else ''}{metric(abs(value))}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
