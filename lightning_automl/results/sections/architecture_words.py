"""What is said of genotypes and of the search that found them."""

import math
from collections import Counter
from collections.abc import Sequence

from lightning_automl.results.architecture_search import KINDS, ArchitectureRecord, Cells
from lightning_automl.results.sections.wording import counted, joined, percent

#: From this share of a cell's edges on skip connections are many: published cells have up to 3 of 8.
MANY_SKIPS = 0.5
#: From this share of the entropy of equal strengths on the search has decided little.
NEARLY_EQUAL = 0.98
#: A genotype that changed in this share of the epochs before the end has not settled.
LATE = 0.1

_TITLES = {"normal": "normal cell", "reduce": "reduction cell"}
_KINDS = {
    "skip": "skip connection",
    "pool": "pooling",
    "conv": "convolution",
    "none": "edge left out",
    "other": "other operation",
}
_PLURALS = {"edge left out": "edges left out"}


def cell_names(record: ArchitectureRecord | Cells) -> dict[str, str]:
    """What the kinds of cells that there are are called."""
    cells = record if isinstance(record, Cells) else record.genotype
    edges = {} if isinstance(record, Cells) else record.edges
    there = [kind for kind in KINDS if (cells is not None and cells.nodes(kind)) or kind in edges]
    return {"normal": "cell"} if there == ["normal"] else {kind: _TITLES[kind] for kind in there}


def short_name(operation: str) -> str:
    """An operation in a table: ``sep 3x3`` for ``sep_conv_3x3``, ``skip`` for ``skip_connect``."""
    return operation.replace("_connect", "").replace("_conv_", "_").replace("_", " ").strip() or operation


def node_name(node: int, inputs: int) -> str:
    """A node as the drawing has it: the outputs of earlier cells by their place, others by their number."""
    subscripts = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    return f"cₖ₋{str(inputs - node).translate(subscripts)}" if node < inputs else str(node)


def node_words(edges: Sequence[tuple[str, int]], inputs: int) -> str:
    """What goes into a node: ``sep 3x3 (2), skip (cₖ₋₁)``, the earliest source first."""
    parts = [f"{short_name(name)} ({node_name(source, inputs)})" for name, source in sorted(edges, key=lambda e: e[1])]
    return ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def cell_words(cells: Cells, kind: str) -> str:
    """How many operations of which kind a cell has, the most frequent first."""
    counts = Counter(_kind(name) for name in cells.operations(kind))
    parts = [_counted(count, _KINDS[name]) for name, count in sorted(counts.items(), key=lambda each: -each[1])]
    return joined(parts) if parts else "no edges"


def _counted(count: int, noun: str) -> str:
    return f"{count} {_PLURALS[noun]}" if noun in _PLURALS and count != 1 else counted(count, noun)


def _kind(operation: str) -> str:
    return next(
        (kind for kind in ("skip", "pool", "conv") if kind in operation), "none" if operation == "none" else "other"
    )


def verdict_of(record: ArchitectureRecord, finished: bool) -> list[str]:
    """What was chosen and why, and the gravest doubt about it.

    Args:
        record: Of the search.
        finished: Whether the run has come to its end.
    """
    if record.genotype is None:
        return ["This architecture search has left no genotype that can be read."]
    names = cell_names(record)
    its = "its " if len(names) > 1 else "the "
    content = ", ".join(f"{its}{name} has {cell_words(record.genotype, kind)}" for kind, name in names.items())
    epoch = record.chosen
    if epoch is None:
        sentence = f"The search has found a genotype: {content}."
    else:
        beginning = "The search chose" if finished else "So far the search would choose"
        why = f" ({record.reason})" if record.reason else ""
        sentence = f"{beginning} the genotype of epoch {epoch + 1} of {len(record.epochs)}{why}: {content}."
    grave = _doubts(record)
    if grave:
        return [sentence, grave[0]]
    return [
        sentence,
        "Whether it is better than random genotypes of the same space only training both can tell: see the commands "
        "below.",
    ]


def warnings_of(record: ArchitectureRecord) -> list[str]:
    """What is doubtful in what a search has found, the gravest first."""
    return [
        *_doubts(record),
        *_milder(record),
        "The accuracy of the search network does not predict that of the found one: the authors of DARTS warn of it. "
        "Only training the found one tells.",
        "One search is one sample: another seed finds another genotype. Compare it with random ones of the same space, "
        "trained as long.",
    ]


def _doubts(record: ArchitectureRecord) -> list[str]:
    found = []
    for kind, name in cell_names(record).items():
        operations = [] if record.genotype is None else record.genotype.operations(kind)
        skips = operations.count("skip_connect")
        if kind == "normal" and operations and skips >= MANY_SKIPS * len(operations):
            found.append(
                f"Skip connections dominate: they are {skips} of the {len(operations)} edges of the {name}, as when "
                "the search has collapsed. Guards against it are SkipStop, EigenvalueStop, max_skips and a warm-up."
            )
        elif kind == "normal" and operations and not any(_kind(each) in ("conv", "other") for each in operations):
            found.append(f"No edge of the {name} has weights to learn: all are skip connections, poolings or left out.")
    equal = _equal(record)
    return [*found, equal] if equal else found


def _equal(record: ArchitectureRecord) -> str:
    """Whether the strengths hardly differ."""
    each = record.chosen_epoch or record.newest
    if each is None or len(record.operations) < 2:
        return ""
    limit = math.log(len(record.operations))
    names = cell_names(record)
    near = {kind: value for kind, value in each.entropy.items() if kind in names and value >= NEARLY_EQUAL * limit}
    if not near:
        return ""
    where = joined([f"{percent(value / limit)} in the {names[kind]}" for kind, value in near.items()])
    return (
        f"The strengths are still nearly equal: their entropy is, of that of equal ones, {where}. "
        "The choice hangs on small differences; search for more epochs, or with a larger learning rate of the "
        "architecture."
    )


def _milder(record: ArchitectureRecord) -> list[str]:
    found = []
    since, newest = record.same_since(), record.newest
    if since and newest is not None and len(record.epochs) > 2:
        done = newest.epoch + 1
        if done - since <= max(1, LATE * done):
            found.append(f"The genotype has not settled: it still changed in epoch {since + 1} of {done}.")
    if record.epochs and not record.watching:
        found.append("No guard that could end the search watched for a collapse.")
    return found
