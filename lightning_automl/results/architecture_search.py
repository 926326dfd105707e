"""What an architecture search has written of itself, read back: ``architecture.json`` and ``genotype.json``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_automl.rundir import UserError, read_json

#: Of ``architecture.json`` and ``genotype.json``; files of a later one may mean something else.
VERSION = 1
#: Guards that are no callbacks.
SETTINGS = ("warm-up", "max_skips")
#: In the order of a page.
KINDS = ("normal", "reduce")


@dataclass(frozen=True)
class Cells:
    """A genotype as it is drawn and told; unlike `models.Genotype` it may have operations of somebody's own.

    Attributes:
        normal: For each intermediate node its operations with the nodes they start from.
        normal_concat: Nodes that make the output.
        reduce: The same of the reduction cell, or empty.
        reduce_concat: Likewise.
        inputs: Number of input nodes.
    """

    normal: tuple[tuple[tuple[str, int], ...], ...]
    normal_concat: tuple[int, ...] = ()
    reduce: tuple[tuple[tuple[str, int], ...], ...] = ()
    reduce_concat: tuple[int, ...] = ()
    inputs: int = 2

    @classmethod
    def of(cls, content: Any) -> Self:
        """Read what ``genotype.json`` holds.

        Raises:
            ValueError: If it is of a later version, or no genotype.
        """
        if not isinstance(content, Mapping):
            raise ValueError("it is no mapping")
        _check_version(content)
        try:
            cells = cls(
                _nodes(content["normal"]),
                tuple(int(node) for node in content.get("normal_concat") or ()),
                _nodes(content.get("reduce") or ()),
                tuple(int(node) for node in content.get("reduce_concat") or ()),
                int(content.get("inputs", 2)),
            )
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error
        except TypeError as error:
            raise ValueError("its cells are no lists of operations and nodes") from error
        for kind in KINDS:
            for node, edges in enumerate(cells.nodes(kind), start=cells.inputs):
                if any(not 0 <= source < node for _, source in edges):
                    raise ValueError(f"an edge of node {node} starts from no node before it")
        return cells

    def nodes(self, kind: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        """Of a kind of cell, the edges of each intermediate node."""
        return self.normal if kind == "normal" else self.reduce

    def operations(self, kind: str) -> list[str]:
        """The operations of a kind of cell, edge by edge."""
        return [name for edges in self.nodes(kind) for name, _ in edges]

    def same_as(self, other: "Cells", kind: str) -> bool:
        """Whether a kind of cell is the same in both, whatever the order of the edges of a node."""
        return [set(edges) for edges in self.nodes(kind)] == [set(edges) for edges in other.nodes(kind)]

    def chosen(self, kind: str, source: int, target: int) -> str | None:
        """The operation on an edge, or None where there is none."""
        place = target - self.inputs
        edges = self.nodes(kind)[place] if 0 <= place < len(self.nodes(kind)) else ()
        return next((name for name, own in edges if own == source), None)


def _nodes(content: Sequence[Any]) -> tuple[tuple[tuple[str, int], ...], ...]:
    return tuple(tuple((str(name), int(source)) for name, source in edges) for edges in content)


def _check_version(content: Mapping[str, Any]) -> None:
    version = content.get("version", VERSION)
    if version != VERSION:
        raise ValueError(f"it is of version {version}, and this program knows version {VERSION}")


@dataclass(frozen=True)
class CellEdges:
    """The edges of a kind of cell in the order of the strengths: node ``sources[e]`` to node ``targets[e]``."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class EpochRecord:
    """An epoch of a search; what is not known is left out, or NaN.

    Attributes:
        epoch: From 0.
        strengths: By kind of cell float64 ``(edges, operations)``.
        cells: The genotype as it would have been derived.
        skips: Number of skip connections by kind of cell.
        entropy: Mean entropy of the strengths of an edge by kind of cell, in nats.
        eigenvalue: The largest one of the Hessian of the loss by the architecture.
        cost: ``expected`` and ``genotype``, and ``unit``.
        accuracies: By stage, in [0, 1].
    """

    epoch: int
    strengths: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    cells: Cells | None = None
    skips: Mapping[str, int] = field(default_factory=dict)
    entropy: Mapping[str, float] = field(default_factory=dict)
    eigenvalue: float = math.nan
    cost: Mapping[str, Any] = field(default_factory=dict)
    accuracies: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Guard:
    """What watches for a collapse.

    Attributes:
        name: Of its class.
        settings: Its arguments.
        fired: Whether it has ended the search.
        sentence: What it says of the run, or "".
    """

    name: str
    settings: Mapping[str, Any]
    fired: bool
    sentence: str

    @property
    def ends(self) -> bool:
        """Whether it could end a search; settings of the space and of the task only change it."""
        return self.name not in SETTINGS


@dataclass(frozen=True)
class ArchitectureRecord:
    """The files of an architecture search, of an unfinished one as far as it has come.

    Attributes:
        operations: Names, in the order of the strengths.
        edges: By kind of cell.
        epochs: The oldest first.
        chosen: The epoch whose genotype was chosen, from 0, or None.
        reason: Why that one, or "".
        guards: Those of the run.
        genotype: Of ``genotype.json``, else of the chosen epoch, or None.
        doubts: Sentences about what cannot be read.
    """

    operations: tuple[str, ...] = ()
    edges: Mapping[str, CellEdges] = field(default_factory=dict)
    epochs: tuple[EpochRecord, ...] = ()
    chosen: int | None = None
    reason: str = ""
    guards: tuple[Guard, ...] = ()
    genotype: Cells | None = None
    doubts: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Read the directory of a run; None if it has neither of the files."""
        if not any((directory / name).exists() for name in ("architecture.json", "genotype.json")):
            return None
        doubts: list[str] = []
        content = _content(directory / "architecture.json", doubts)
        operations = tuple(map(str, _list(content.get("operations"))))
        edges = {kind: own for kind in KINDS if (own := _edges(_mapping(content.get("edges")).get(kind)))}
        epochs = [each for entry in _list(content.get("epochs")) if (each := _epoch(entry, edges, len(operations)))]
        chosen = _mapping(content.get("chosen"))
        epoch = chosen.get("epoch")
        genotype = _genotype(directory / "genotype.json", doubts)
        if genotype is None:
            genotype = next((each.cells for each in epochs if each.epoch == epoch), None)
        return cls(
            operations,
            edges,
            tuple(epochs),
            epoch if isinstance(epoch, int) else None,
            str(chosen.get("reason") or ""),
            tuple(
                Guard(
                    str(each.get("name")),
                    _mapping(each.get("settings")),
                    bool(each.get("fired")),
                    str(each.get("sentence") or ""),
                )
                for each in map(_mapping, _list(content.get("guards")))
                if each
            ),
            genotype,
            tuple(doubts),
        )

    @property
    def chosen_epoch(self) -> EpochRecord | None:
        """What is known of the epoch whose genotype was chosen."""
        return next((each for each in self.epochs if each.epoch == self.chosen), None)

    @property
    def newest(self) -> EpochRecord | None:
        """What is known of the newest epoch."""
        return self.epochs[-1] if self.epochs else None

    @property
    def watching(self) -> list[Guard]:
        """Guards that could end the search."""
        return [guard for guard in self.guards if guard.ends]

    def same_since(self) -> int | None:
        """The first epoch from which on the genotype was that of the newest epoch, from 0; None if it is not known."""
        newest = self.newest
        if newest is None or newest.cells is None:
            return None
        first = newest.epoch
        for each in reversed(self.epochs):
            if each.cells is None or not all(each.cells.same_as(newest.cells, kind) for kind in KINDS):
                break
            first = each.epoch
        return first


def _content(path: Path, doubts: list[str]) -> Mapping[str, Any]:
    try:
        content = read_json(path)
        if content is None:
            return {}
        if not isinstance(content, Mapping):
            raise ValueError("it is no mapping")
        _check_version(content)
    except (UserError, ValueError, OSError) as error:
        what = str(error) if isinstance(error, UserError) else f"{path} cannot be read: {error}"
        doubts.append(f"How the search went cannot be shown: {what.removesuffix('.')}.")
        return {}
    return content


def _genotype(path: Path, doubts: list[str]) -> Cells | None:
    try:
        content = read_json(path)
        return None if content is None else Cells.of(content)
    except (UserError, ValueError, OSError) as error:
        what = str(error) if isinstance(error, UserError) else f"{path} cannot be read: {error}"
        doubts.append(f"The genotype cannot be shown: {what.removesuffix('.')}.")
        return None


def _edges(content: Any) -> CellEdges | None:
    found = _mapping(content)
    try:
        edges = CellEdges(tuple(map(int, found.get("sources") or ())), tuple(map(int, found.get("targets") or ())))
    except (TypeError, ValueError):
        return None
    return edges if edges.sources and len(edges.sources) == len(edges.targets) else None


def _epoch(content: Any, edges: Mapping[str, CellEdges], operations: int) -> EpochRecord | None:
    found = _mapping(content)
    epoch = found.get("epoch")
    if not isinstance(epoch, int):
        return None
    strengths = {}
    for kind, each in edges.items():
        given = _matrix(_mapping(found.get("strengths")).get(kind))
        if given is not None and given.shape == (len(each.sources), operations):
            strengths[kind] = given
    try:
        cells = Cells.of(found["genotype"]) if found.get("genotype") else None
    except ValueError:
        cells = None
    return EpochRecord(
        epoch,
        strengths,
        cells,
        {kind: int(value) for kind, value in _numbers(found.get("skips")).items()},
        _numbers(found.get("entropy")),
        _number(found.get("eigenvalue")),
        _mapping(found.get("cost")),
        {
            stage: value
            for stage in ("train", "arch", "val")
            if math.isfinite(value := _number(found.get(f"{stage}_accuracy")))
        },
    )


def _matrix(content: Any) -> NDArray[np.float64] | None:
    try:
        matrix = np.asarray(content, np.float64)  # null becomes NaN
    except (TypeError, ValueError):
        return None
    return matrix if matrix.ndim == 2 else None


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}


def _list(content: Any) -> Sequence[Any]:
    return content if isinstance(content, list) else []


def _numbers(content: Any) -> dict[str, float]:
    return {str(kind): value for kind, each in _mapping(content).items() if math.isfinite(value := _number(each))}


def _number(content: Any) -> float:
    return float(content) if isinstance(content, int | float) and not isinstance(content, bool) else math.nan
