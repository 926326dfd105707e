"""Which operations a search has kept, how often and how strong."""

import math
import statistics
from typing import Any

from lightning_automl.results.page import Folded, Section, Table, Text, pictures
from lightning_automl.results.policy_search import PolicySearchRecord
from lightning_automl.results.sections.policy_words import operation_name, strength_words
from lightning_automl.results.sections.wording import counted, joined, metric


def kept(record: PolicySearchRecord) -> Section | None:
    """Frequency, mean probability and mean magnitude of each operation that was searched."""
    steps = [step for each in record.kept for steps in each.sub_policies for step in steps]
    if not steps:
        return None
    from lightning_automl.augment import OPS
    from lightning_automl.plots import KeptOperation, operations_kept

    space = record.open_space()
    names = list(dict.fromkeys(step["operation"] for step in steps))
    names += [name for name in record.searched if name not in names]
    drawn, rows = [], []
    for name in names:
        own = [step for step in steps if step["operation"] == name]
        operation = OPS.get(name)
        cap = None if operation is None else operation.strongest if space is None else _cap(space, name)
        probability = statistics.fmean(step["probability"] for step in own) if own else math.nan
        magnitude = statistics.fmean(step["magnitude"] for step in own) if own and cap is not None else math.nan
        drawn.append(KeptOperation(operation_name(name), len(own), probability, magnitude))
        signed = operation is not None and operation.signed
        strength = strength_words(name, cap * magnitude, signed) if cap is not None and own else ""
        rows.append([operation_name(name), len(own), _two(probability), _two(magnitude), strength])
    order = sorted(range(len(names)), key=lambda place: (-drawn[place].count, names[place]))
    head = ["operation", "steps", "mean probability", "mean magnitude", "that is"]
    table = Table(head, [rows[place] for place in order])
    unused = [drawn[place].name for place in order if not drawn[place].count]
    policies = "1 policy that was" if len(record.kept) == 1 else f"{len(record.kept):,} policies that were"
    text = f"{counted(len(steps), 'step')} in the {policies} kept."
    if unused:
        text += f" Never kept: {joined(unused)}."
    text += " A magnitude of 1 is the strongest that the space allows; some operations have none."
    figure = operations_kept([drawn[place] for place in order])
    blocks: list[Any] = [pictures(kept=figure), Text(text), *_values(record), Folded("The same in numbers", table)]
    return Section("Operations that were kept", blocks)


def _cap(space: Any, name: str) -> float | None:
    cap: float | None = space.cap(name) if space.allows(name) else None
    return cap


def _two(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else ""


def _values(record: PolicySearchRecord) -> list[Text]:
    """How the kept policies' own values lie to those of unchanged images."""
    clean = record.clean
    pairs = [(each.value, clean[each.fold]) for each in record.kept if math.isfinite(clean.get(each.fold, math.nan))]
    if not pairs or not record.by_density:
        return []
    own, unchanged = (statistics.fmean(each) for each in zip(*pairs, strict=True))
    below = sum(value <= limit for value, limit in pairs)
    return [
        Text(
            f"Their mean {record.objective} is {metric(own)}, that of unchanged images {metric(unchanged)}; "
            f"{below} of {len(pairs)} lie at or below that of their fold's."
        )
    ]
