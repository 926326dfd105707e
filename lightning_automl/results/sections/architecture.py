"""Sections about architectures: how a search found one, and the one that a run has trained."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_automl.mistakes import one_sentence, root_cause
from lightning_automl.results.architecture_search import KINDS, ArchitectureRecord, Cells, EpochRecord
from lightning_automl.results.configuration import differing_settings
from lightning_automl.results.evidence import Evidence
from lightning_automl.results.page import Commands, Folded, Notes, Pictures, Section, Table, Text, pictures
from lightning_automl.results.sections.architecture_words import (
    cell_names,
    cell_words,
    node_words,
    verdict_of,
    warnings_of,
)
from lightning_automl.results.sections.wording import counted, number, value_text

#: Tables with more rows are folded.
_ROWS = 8
_RETRAIN = "lightning-automl fit --config configs/nas/retrain_digits.yaml"
_CONTROL = "lightning-automl search --config configs/nas/random_digits.yaml"
_NETWORK = "model.init_args.model"
#: Of a data module: what is of the search alone.
_OF_SEARCH = ("arch_fraction", "arch_augment")


def search_record(evidence: Evidence) -> ArchitectureRecord | None:
    """What an architecture search has written; None if the run is none, or has not done an epoch."""
    return None if genotype_arguments(evidence.run.config) else ArchitectureRecord.read(evidence.run.directory)


def genotype_arguments(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments of a network that is made from a genotype, or None if the run's is not."""
    model = _arguments(config.get("model")).get("model")
    found = _arguments(model)
    return found if "genotype" in found else None


def _arguments(spec: Any) -> Mapping[str, Any]:
    found = spec.get("init_args") if isinstance(spec, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def search_verdict(evidence: Evidence) -> list[str]:
    """What a reader of a search's page has to know first: what was chosen, and what is doubtful in it."""
    record = search_record(evidence)
    return [] if record is None else verdict_of(record, evidence.run.finished)


# ---- a search


def architecture_search(evidence: Evidence) -> Section | None:
    """What an architecture search has found, how it came to it, and how to go on."""
    record = search_record(evidence)
    if record is None:
        return None
    blocks: list[Any] = [Notes([*record.doubts, *warnings_of(record)])]
    if record.genotype is not None:
        blocks += [drawing(genotype=record.genotype), *_choice(record)]
    blocks += _guards(record)
    if record.genotype is not None:
        commands = _commands(evidence, record.genotype)
        blocks += [Text(_GO_ON), Commands(commands)] if commands else [Text(_OWN_SPACE)]
    return Section("Found architecture", blocks)


_GO_ON = (
    "The network of the search is not the one to use. The first line trains the found genotype anew, the second one "
    "also random genotypes of the same space, for the comparison without which nothing is known of the search:"
)
_OWN_SPACE = (
    "The network of the search is not the one to use. This space is one of your own, so build the network of "
    "genotype.json, and networks of random genotypes of the same space, with which to compare it."
)


def drawing(captions: Sequence[str] = (), **cells: Any) -> Pictures:
    """Genotypes as graphs, by the names of the figures."""
    from lightning_automl.plots.genotype import genotype_figure

    drawn = pictures(**{name: genotype_figure(each) for name, each in cells.items()})
    return replace(drawn, captions=captions)


def _choice(record: ArchitectureRecord) -> list[Any]:
    """What the chosen genotype is, in words."""
    assert record.genotype is not None
    rows = [[cell_names(record)[kind], cell_words(record.genotype, kind)] for kind in cell_names(record)]
    each = record.chosen_epoch
    if each is not None:
        rows.insert(0, ["epoch", f"{each.epoch + 1} of {len(record.epochs)}: {record.reason or 'no reason is known'}"])
        rows += _cost_rows(each.cost)
    return [Table(["", ""], rows)]


def _cost_rows(cost: Mapping[str, Any]) -> list[list[str]]:
    unit = str(cost.get("unit") or "")
    found, expected = cost.get("genotype"), cost.get("expected")
    rows = []
    if isinstance(found, int | float):
        rows.append(["its cost", f"{number(float(found))} {unit}".strip()])
    if isinstance(expected, int | float):
        rows.append(["expected cost then", f"{number(float(expected))} {unit}".strip()])
    return rows


def _guards(record: ArchitectureRecord) -> list[Any]:
    rows = []
    for guard in record.guards:
        settings = ", ".join(f"{name} {value_text(value)}" for name, value in guard.settings.items())
        fired = ("yes" if guard.fired else "no") if guard.ends else ""
        rows.append([guard.name, settings, fired, _sentence(guard.sentence)])
    if not rows:
        return []
    head = ["guard", "settings", "fired", ""]
    text = "Against a collapse, in which skip connections push all else aside:"
    return [Text(text), Table(head, rows if any(row[3] for row in rows) else [row[:3] for row in rows])]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].removesuffix(".") + "." if text else ""


def _commands(evidence: Evidence, genotype: Cells) -> list[str]:
    """What trains the genotype, and its control; nothing for spaces that the package has no networks of."""
    directory = shlex.quote(str(evidence.run.directory))
    # The configs are of DARTS's space, with drop path; one input is what NAS-Bench-201 has.
    if genotype.inputs == 1 and not _space(evidence.run.config).endswith("NasBench201Space"):
        return []
    keys = f" --{_NETWORK} NasBench201Network --trainer.callbacks null" if genotype.inputs == 1 else ""
    keys += f" --{_NETWORK}.init_args.genotype {directory}/genotype.json{_data(evidence.run.config)}"
    return [
        f"{_RETRAIN}{keys} --dir {directory}-retrained",
        f"{_CONTROL}{keys.replace(' --', ' --run.')} --dir {directory}-control",
    ]


def _space(config: Mapping[str, Any]) -> str:
    """The class of the space that was searched."""
    place: Any = config
    for key in (*_NETWORK.split("."), "class_path"):
        place = place.get(key) if isinstance(place, Mapping) else None
    return str(place)


def _data(config: Mapping[str, Any]) -> str:
    """The keys that name the data of the run, in place of the digits."""
    data = config.get("data")
    if not isinstance(data, Mapping) or "class_path" not in data:
        return ""
    name = str(data["class_path"])
    if name.endswith(".DigitsDataModule") or name == "DigitsDataModule":
        return ""
    text = f" --data {shlex.quote(name.removeprefix('lightning_automl.data.'))}"
    for each in differing_settings({"data": data}):
        key = each.key.removeprefix("data.")
        if key not in ("data", *_OF_SEARCH) and isinstance(each.value, str | int | float) and "." not in key:
            text += f" --data.init_args.{key} {shlex.quote(value_text(each.value))}"
    return text


def search_progress(evidence: Evidence) -> Section | None:
    """How an architecture search went, epoch by epoch."""
    record = search_record(evidence)
    if record is None or not record.epochs:
        return None
    warm_up = _arguments(evidence.run.config.get("model")).get("warmup_epochs") or 0
    figures = _histories(record, int(warm_up)) if isinstance(warm_up, int) else _histories(record, 0)
    blocks: list[Any] = [pictures(**figures)] if figures else []
    blocks += [*_strengths(record), *_genotypes(record)]
    return Section("How the search went", blocks) if blocks else None


def _histories(record: ArchitectureRecord, warm_up: int) -> dict[str, Any]:
    """Accuracies, skip connections, entropy, eigenvalue and cost over the epochs, as far as they are known."""
    from lightning_automl.plots import Curve, over_epochs
    from lightning_automl.plots.curves import COLOURS, DASHES

    names = cell_names(record)
    styles = dict(zip(KINDS, ((COLOURS["train"], "-"), (COLOURS["val"], "--")), strict=True))

    def by_kind(key: str) -> list[Curve]:
        return [
            Curve(names[kind], [(each.epoch + 1, getattr(each, key)[kind]) for each in known], *styles[kind])
            for kind in names
            if (known := [each for each in record.epochs if kind in getattr(each, key)])
        ]

    def of_cost(key: str) -> list[tuple[int, float]]:
        points = [(each.epoch + 1, each.cost.get(key)) for each in record.epochs]
        return [(epoch, float(value)) for epoch, value in points if isinstance(value, int | float)]

    streams = {"train": "stream of the weights", "arch": "stream of the architecture", "val": "validation"}
    unit = next((str(each.cost["unit"]) for each in record.epochs if each.cost.get("unit")), "")
    eigenvalues = [(each.epoch + 1, each.eigenvalue) for each in record.epochs if math.isfinite(each.eigenvalue)]
    panels = {
        "accuracies": [
            Curve(label, [(each.epoch + 1, each.accuracies[stage]) for each in known], COLOURS[stage], DASHES[stage])
            for stage, label in streams.items()
            if (known := [each for each in record.epochs if stage in each.accuracies])
        ],
        "skips": by_kind("skips"),
        "entropy": by_kind("entropy"),
        "eigenvalue": [Curve("largest eigenvalue", eigenvalues, COLOURS["train"])] if eigenvalues else [],
        "cost": [
            Curve(label, points, colour, dashes)
            for key, label, colour, dashes in (
                ("expected", "expected", COLOURS["train"], "-"),
                ("genotype", "of the genotype", COLOURS["val"], "--"),
            )
            if (points := of_cost(key))
        ],
    }
    titles = {
        "accuracies": "accuracy",
        "skips": "skip connections of the genotype",
        "entropy": "mean entropy of an edge's strengths",
        "eigenvalue": "largest eigenvalue of the loss's Hessian",
        "cost": f"cost{f' ({unit})' if unit else ''}",
    }
    marks = {} if record.chosen is None else {"chosen epoch": record.chosen + 1}
    marks |= {"end of warm-up": warm_up} if 0 < warm_up < record.epochs[-1].epoch + 1 else {}
    levels = {"entropy": {"all equal": math.log(len(record.operations))}} if record.operations else {}
    return {
        name: over_epochs(curves, title=titles[name], marks=marks, levels=levels.get(name), whole=name == "skips")
        for name, curves in panels.items()
        if curves
    }


def _strengths(record: ArchitectureRecord) -> list[Any]:
    """The strengths over the epochs, a panel an edge."""
    import numpy as np

    from lightning_automl.plots import edge_strengths

    figures = {}
    for kind, edges in record.edges.items():
        known = [each for each in record.epochs if kind in each.strengths]
        if not known:
            continue
        pairs = list(zip(edges.sources, edges.targets, strict=True))
        cells = record.genotype
        figures[f"strengths_{kind}"] = edge_strengths(
            cell_names(record)[kind] if kind in cell_names(record) else kind,
            record.operations,
            pairs,
            [each.epoch for each in known],
            np.stack([each.strengths[kind] for each in known]),
            chosen=[None if cells is None else cells.chosen(kind, *pair) for pair in pairs],
            marked=record.chosen,
            inputs=2 if cells is None else cells.inputs,
        )
    if not figures:
        return []
    text = (
        "How strong each operation was on each edge. White panels are the edges of the chosen genotype, with its "
        "operation as a thick line; grey ones are edges that it does not have."
    )
    if record.chosen is not None:
        text += " The upright line is the chosen epoch."
    if "none" in record.operations and record.genotype is not None and record.genotype.inputs > 1:
        text += " An edge never gets the operation none, however strong it is."
    return [Text(text), pictures(**figures)]


def _genotypes(record: ArchitectureRecord) -> list[Any]:
    """The genotype at each epoch: a row for each that differs from the one before."""
    known = [each for each in record.epochs if each.cells is not None]
    blocks: list[Any] = []
    names = cell_names(record)
    for kind in names:
        spans = _spans(known, kind)
        if not spans:
            continue
        first = spans[0][2]
        head = ["epochs", *(f"node {first.inputs + at}" for at in range(len(first.nodes(kind))))]
        rows = []
        before: Cells | None = None
        for begin, end, cells in spans:
            old = None if before is None else before.nodes(kind)
            nodes = [
                node_words(edges, cells.inputs)
                + "\N{NO-BREAK SPACE}*" * (old is not None and set(old[at]) != set(edges))
                for at, edges in enumerate(cells.nodes(kind))
            ]
            rows.append([str(begin) if begin == end else f"{begin} to {end}", *nodes])
            before = cells
        changes = len(spans) - 1
        done = known[-1].epoch + 1
        said = f"{names[kind][0].upper()}{names[kind][1:]}: {counted(changes, 'change')} in {counted(done, 'epoch')}"
        said += f", the last one in epoch {spans[-1][0]}" if changes else ""
        table = Table(head, rows)
        if len(rows) > _ROWS:
            blocks.append(Folded(f"{said} (* changed)", table))
        else:
            blocks += [Text(f"{said}{'. * Changed' if changes else ''}."), table]
    return blocks


def _spans(known: Sequence[EpochRecord], kind: str) -> list[tuple[int, int, Cells]]:
    """Of cells that are the same for some epochs: the first and the last of these, from 1."""
    spans: list[tuple[int, int, Cells]] = []
    for each in known:
        assert each.cells is not None
        if not each.cells.nodes(kind):
            continue
        if spans and spans[-1][2].same_as(each.cells, kind):
            spans[-1] = (spans[-1][0], each.epoch + 1, spans[-1][2])
        else:
            spans.append((each.epoch + 1, each.epoch + 1, each.cells))
    return spans


# ---- a run with a genotype


def architecture(evidence: Evidence) -> Section | None:
    """The genotype that a run has trained."""
    given = genotype_arguments(evidence.run.config)
    if given is None:
        return None
    try:
        genotype = run_genotype(evidence, given)
    except Exception as error:  # whatever reading a file of the user raises
        reason = one_sentence(root_cause(error)).removesuffix(".")
        return Section("Architecture", [Text(f"The genotype of this run cannot be shown: {reason}.")])
    rows: list[list[Any]] = [["genotype", _origin(given, genotype)]]
    network = evidence.run.environment.get("network", {})
    if network.get("parameters"):
        rows.append(["parameters", f"{network['parameters']:,}"])
    cells = Cells.of(genotype.to_dict())
    rows += [[name, cell_words(cells, kind)] for kind, name in cell_names(cells).items()]
    rows.append(["digest", genotype.digest()])
    return Section("Architecture", [drawing(genotype=cells), Table(["", ""], rows)])


def run_genotype(evidence: Evidence, given: Mapping[str, Any]) -> Any:
    """The `models.Genotype` of a run: of its own directory, else as its config says.

    Raises:
        UserError: If it is not there any more.
    """
    from lightning_automl.models.genotype import load_genotype, random_genotype

    path = evidence.run.directory / "genotype.json"
    found = load_genotype(path if path.exists() else given["genotype"])
    random = given.get("random")
    return found if random is None or path.exists() else random_genotype(found, random)


def _origin(given: Mapping[str, Any], genotype: Any) -> str:
    from lightning_automl.models.genotype import PUBLISHED

    random = given.get("random")
    if random is not None:
        return f"drawn at random with the seed {random}, as a control"
    same = next((name for name, each in PUBLISHED.items() if each.digest() == genotype.digest()), None)
    if same is not None:
        return f"{same}, which is published"
    return given["genotype"] if isinstance(given["genotype"], str) else "that of config.yaml"
