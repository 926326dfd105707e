"""What an architecture search finds: the edges of a cell and their operations, as data."""

import ast
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from math import comb
from pathlib import Path
from typing import Any, Literal, Self

from lightning_automl.models.ops import DARTS_OPERATIONS, NASBENCH201_OPERATIONS, operation
from lightning_automl.rundir import UserError, write_json

#: An operation and the node that it takes its input from.
Edge = tuple[str, int]
Kind = Literal["normal", "reduce"]

_KEYS = ("version", "normal", "normal_concat", "reduce", "reduce_concat", "inputs", "operations")


@dataclass(frozen=True)
class Genotype:
    """The cells of a found architecture.

    Liu, Simonyan and Yang, *DARTS*, ICLR 2019, https://arxiv.org/abs/1806.09055 (section 2.1): a cell is a graph whose
    nodes are sums over their edges, and each edge is an operation on an earlier node. Nodes below ``inputs`` are inputs
    of the cell (0 the output of the cell before the previous one, 1 that of the previous one), the others are computed
    in the order of their numbers.

    Args:
        normal: For each computed node its edges, the strongest first; each is an operation and its source.
        normal_concat: The computed nodes whose channels are put together as the output of the cell.
        reduce: The same of the cell that halves the image; empty where the space searches none.
        reduce_concat: Likewise.
        inputs: Input nodes of a cell: 2 in DARTS, 1 in NAS-Bench-201, where the last node is the output.
        operations: What could have been chosen.

    Raises:
        UserError: If an operation is unknown, or nodes and edges make no cell; the message says which.
    """

    normal: tuple[tuple[Edge, ...], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[Edge, ...], ...] = ()
    reduce_concat: tuple[int, ...] = ()
    inputs: int = 2
    operations: tuple[str, ...] = DARTS_OPERATIONS

    def __post_init__(self) -> None:
        if not _is_count(self.inputs) or self.inputs < 1:
            raise UserError(f"inputs of a genotype is {self.inputs!r}; give the number of a cell's input nodes, 1 or 2")
        names = _sequence("operations of a genotype", self.operations)
        for name in names:
            operation(name)
        set_ = object.__setattr__  # of a frozen dataclass: lists, as in JSON, are taken too
        set_(self, "operations", tuple(names))
        for kind in ("normal", "reduce"):
            cell, concat = getattr(self, kind), getattr(self, f"{kind}_concat")
            set_(self, kind, _checked_cell(kind, cell, self.inputs, self.operations))
            set_(self, f"{kind}_concat", _checked_concat(kind, concat, self.inputs, len(getattr(self, kind))))

    def nodes(self, kind: Kind = "normal") -> tuple[tuple[Edge, ...], ...]:
        """The nodes of a kind of cell."""
        return self.normal if kind == "normal" else self.reduce

    def skips(self, kind: Kind = "normal") -> int:
        """How many edges of a kind of cell are ``skip_connect``."""
        return sum(name == "skip_connect" for node in self.nodes(kind) for name, _ in node)

    def digest(self) -> str:
        """Name the architecture in 16 hex digits: the same for edges in another order, whatever else was possible."""
        cells = [[sorted(node) for node in self.normal], sorted(self.normal_concat)]
        cells += [[sorted(node) for node in self.reduce], sorted(self.reduce_concat), self.inputs]
        return blake2b(json.dumps(cells).encode(), digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "version": 1,
            "normal": [[list(edge) for edge in node] for node in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [[list(edge) for edge in node] for node in self.reduce],
            "reduce_concat": list(self.reduce_concat),
            "inputs": self.inputs,
            "operations": list(self.operations),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """From JSON, also in the form of the authors' code, where a cell is a flat list with two edges a node.

        Raises:
            UserError: If keys are missing or unknown, or the content is no genotype.
        """
        for key in content:
            if key not in _KEYS:
                close = get_close_matches(str(key), _KEYS, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise UserError(f"a genotype has the unknown key {key!r}; {hint}known: {', '.join(_KEYS)}")
        if missing := [key for key in ("normal", "normal_concat") if key not in content]:
            raise UserError(f"a genotype lacks {' and '.join(missing)}; give at least normal and normal_concat")
        if content.get("version", 1) != 1:
            raise UserError(
                f"a genotype has the version {content['version']!r}, and this release reads version 1; use a newer one"
            )
        given = {key: value for key, value in content.items() if key != "version"}
        for kind in ("normal", "reduce"):
            if kind in given:
                given[kind] = _by_node(kind, given[kind])
        if "operations" not in given:
            given["operations"] = _with_chosen(DARTS_OPERATIONS, [*given["normal"], *given.get("reduce", ())])
        return cls(**given)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    def __str__(self) -> str:
        lines = []
        for kind, cell, concat in (
            ("normal", self.normal, self.normal_concat),
            ("reduce", self.reduce, self.reduce_concat),
        ):
            if cell:
                sums = [
                    f"{number} = {' + '.join(f'{name}({source})' for name, source in node)}"
                    for number, node in enumerate(cell, self.inputs)
                ]
                lines.append(f"{kind}: {', '.join(sums)}, out {' '.join(map(str, concat))}")
        return "\n".join(lines)


def load_genotype(source: Genotype | Mapping[str, Any] | str | Path) -> Genotype:
    """Get a genotype from wherever it is.

    Args:
        source: A genotype, its content as a mapping, the name of a published one (:data:`PUBLISHED`), a
            ``genotype.json``, a run directory that has one, a text ``Genotype(normal=[('sep_conv_3x3', 0), …], …)`` as
            the code of DARTS prints and keeps it (nothing of it is run), or an architecture in the notation of
            NAS-Bench-201, such as ``|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|nor_conv_1x1~2|``.

    Raises:
        UserError: If there is nothing of this name, or it is no genotype.
    """
    if isinstance(source, Genotype):
        return source
    if isinstance(source, Mapping):
        return Genotype.from_dict(source)
    if hasattr(source, "_asdict"):  # the named tuple of the authors' code
        return Genotype.from_dict(source._asdict())
    if not isinstance(source, str | Path):
        raise UserError(
            f"{source!r} is no genotype; give a genotype.json, a run directory that has one, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    if str(source) in PUBLISHED:
        return PUBLISHED[str(source)]
    text = str(source).strip()
    if text.startswith("|"):
        return _from_nasbench201(text)
    if text.startswith("Genotype("):
        return Genotype.from_dict(_from_call(text))
    path = Path(source)
    try:
        is_folder = path.is_dir()
        path = path / "genotype.json" if is_folder else path
        is_file = path.is_file()
    except OSError:  # the name is too long, or what is there may not be seen
        is_folder = is_file = False
    if is_folder and not is_file:
        raise UserError(
            f"{path.parent} has no {path.name}; give the run directory of an architecture search that has done an epoch"
        )
    if not is_file:
        close = get_close_matches(text, PUBLISHED, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"no genotype is called {text[:200]!r} and there is no such file; {hint}known: {', '.join(PUBLISHED)}; or "
            "give a genotype.json or a run directory that has one"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of JSON and of UTF-8
        raise UserError(f"{path} cannot be read as JSON ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is no genotype; it needs a mapping with normal and normal_concat")
    try:
        return Genotype.from_dict(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def random_genotype(like: Genotype, seed: int) -> Genotype:
    """Draw a genotype, uniformly, from the space that ``like`` is of.

    It has the nodes of ``like`` with as many edges each, from any of the earlier nodes, and any of its ``operations``
    except ``none``, as what is derived by DARTS. Where a cell has one input and keeps every edge, as in NAS-Bench-201,
    ``none`` is how an edge is left out, and drawn like the others.

    Args:
        like: A genotype of the space.
        seed: At least 0; the same one gives the same genotype, on every platform.

    Raises:
        UserError: If the seed is negative, or there is no operation to draw.
    """
    if seed < 0:
        raise UserError(f"the seed of a random genotype is {seed}; give a number from 0 on")
    # Of the methods of Random only random() is promised to stay the same in other versions of Python.
    uniform = random.Random(seed).random
    names = _drawn_operations(like)

    def cell(nodes: Iterable[Sequence[Edge]]) -> tuple[tuple[Edge, ...], ...]:
        drawn = []
        for number, edges in enumerate(nodes, like.inputs):
            left = list(range(number))
            sources = sorted(left.pop(int(uniform() * len(left))) for _ in edges)
            drawn.append(tuple((names[int(uniform() * len(names))], source) for source in sources))
        return tuple(drawn)

    return Genotype(
        normal=cell(like.normal),
        normal_concat=like.normal_concat,
        reduce=cell(like.reduce),
        reduce_concat=like.reduce_concat,
        inputs=like.inputs,
        operations=like.operations,
    )


def space_size(like: Genotype, kind: Kind = "normal") -> int:
    """How many cells :func:`random_genotype` draws from: 1,037,664,180 for one kind of cell of DARTS.

    Liu, Simonyan and Yang, *DARTS*, ICLR 2019, https://arxiv.org/abs/1806.09055 (section 3.1): about 10^9 a cell.
    """
    size = 1
    for number, edges in enumerate(like.nodes(kind), like.inputs):
        size *= comb(number, len(edges)) * len(_drawn_operations(like)) ** len(edges)
    return size


def _drawn_operations(like: Genotype) -> list[str]:
    complete = all(len(node) == number for number, node in enumerate(like.normal, like.inputs))
    keeps_none = like.inputs == 1 and complete
    names = [name for name in like.operations if keeps_none or name != "none"]
    if not names:
        raise UserError("a genotype whose operations are none has no space to draw from; give its operations")
    return names


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sequence(what: str, value: Any) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise UserError(f"{what} is {value!r}; give a list")
    return list(value)


def _edge(value: Any, where: str) -> Edge:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f"{where} has the edge {value!r}; an edge is an operation and its source, such as ['none', 0]")
    return value[0], value[1]


def _checked_cell(kind: str, cell: Any, inputs: int, names: Sequence[str]) -> tuple[tuple[Edge, ...], ...]:
    nodes = []
    for number, given in enumerate(_sequence(f"{kind} of a genotype", cell), inputs):
        where = f"node {number} of the {kind} cell"
        edges = tuple(_edge(edge, where) for edge in _sequence(where, given))
        if not edges:
            raise UserError(f"{where} has no edge; give each node at least one")
        for name, source in edges:
            operation(name)
            if name not in names:
                raise UserError(f"{where} has {name!r}, which is not among the operations {', '.join(names)}; add it")
            if not _is_count(source) or not 0 <= source < number:
                raise UserError(
                    f"{where} has the source {source!r}; sources are nodes before it, from 0 to {number - 1}"
                )
        if len({source for _, source in edges}) < len(edges):
            raise UserError(f"{where} has two edges from one source; give each source once")
        nodes.append(edges)
    if kind == "normal" and not nodes:
        raise UserError("normal of a genotype is empty; give the edges of at least one node")
    return tuple(nodes)


def _checked_concat(kind: str, concat: Any, inputs: int, nodes: int) -> tuple[int, ...]:
    numbers = tuple(_sequence(f"{kind}_concat of a genotype", concat))
    for number in numbers:
        if not _is_count(number) or not inputs <= number < inputs + nodes:
            known = f"from {inputs} to {inputs + nodes - 1}" if nodes else "none, as there is no such cell"
            raise UserError(f"{kind}_concat of a genotype has {number!r}; the nodes of the {kind} cell are {known}")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{kind}_concat of a genotype is {list(numbers)}; give each node once")
    if nodes and not numbers:
        raise UserError(f"{kind}_concat of a genotype is empty; give the nodes that make the output of the cell")
    return numbers


def _by_node(kind: str, cell: Any) -> list[Any]:
    """A cell as a list of nodes, whether it is given so or flat."""
    entries = _sequence(f"{kind} of a genotype", cell)
    is_flat = bool(entries) and isinstance(entries[0], Sequence) and bool(entries[0]) and isinstance(entries[0][0], str)
    if not is_flat:
        return entries
    if len(entries) % 2:
        raise UserError(
            f"{kind} of a genotype is a flat list of {len(entries)} edges; a flat list has two edges a node, so give "
            "an even number, or a list for each node"
        )
    return [entries[first : first + 2] for first in range(0, len(entries), 2)]


def _with_chosen(names: Sequence[str], nodes: Iterable[Any]) -> list[str]:
    """The operations, and those that were chosen beside them."""
    edges = [_edge(edge, "a genotype") for node in nodes for edge in _sequence("a node of a genotype", node)]
    return list(dict.fromkeys([*names, *(name for name, _ in edges if isinstance(name, str))]))


def _from_call(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("it is no call")
        return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"a genotype beginning with {text[:40]!r} cannot be read ({error}); it needs normal=[…], "
            "normal_concat=[…], reduce=[…] and reduce_concat=[…], of lists, texts and numbers"
        ) from error


def _literal(value: ast.expr) -> Any:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "range":
        return range(*(ast.literal_eval(argument) for argument in value.args))
    return ast.literal_eval(value)


def _from_nasbench201(text: str) -> Genotype:
    nodes = []
    for part in text.split("+"):
        edges = []
        for edge in part.strip().strip("|").split("|"):
            name, separator, source = edge.partition("~")
            if not separator or not source.isdecimal():
                raise UserError(
                    f"{text!r} is no architecture of NAS-Bench-201: {edge!r} is not an operation and its source, such "
                    "as 'skip_connect~0'"
                )
            edges.append((name, int(source)))
        nodes.append(tuple(edges))
    return Genotype(
        normal=tuple(nodes),
        normal_concat=(len(nodes),),
        inputs=1,
        operations=tuple(_with_chosen(NASBENCH201_OPERATIONS, nodes)),
    )


def _published(normal: str, reduce: str) -> Genotype:
    """From the short form of the two cells, in which a word is an operation and its source, two a node."""
    short = {"sep": "sep_conv", "dil": "dil_conv", "max": "max_pool", "avg": "avg_pool"}

    def cell(words: str) -> list[list[Edge]]:
        edges: list[Edge] = []
        for word in words.split():
            name, source = word.split("@")
            size = f"{name[3:]}x{name[3:]}"
            edges.append(("skip_connect" if name == "skip" else f"{short[name[:3]]}_{size}", int(source)))
        return _by_node("a cell", edges)

    content = {"normal": cell(normal), "normal_concat": range(2, 6), "reduce": cell(reduce)}
    return Genotype.from_dict(content | {"reduce_concat": range(2, 6)})


#: Cells found on CIFAR-10 by DARTS of first and second order (Liu et al. 2019, figures 4 to 6, genotypes.py of
#: https://github.com/quark0/darts) and by PC-DARTS on CIFAR-10 and ImageNet (Xu et al., ICLR 2020,
#: https://arxiv.org/abs/1907.05737, genotypes.py of https://github.com/yuhuixu1993/PC-DARTS).
PUBLISHED: dict[str, Genotype] = {
    "darts_v1": _published(
        "sep3@1 sep3@0 skip@0 sep3@1 skip@0 sep3@1 sep3@0 skip@2",
        "max3@0 max3@1 skip@2 max3@0 max3@0 skip@2 skip@2 avg3@0",
    ),
    "darts_v2": _published(
        "sep3@0 sep3@1 sep3@0 sep3@1 sep3@1 skip@0 skip@0 dil3@2",
        "max3@0 max3@1 skip@2 max3@1 max3@0 skip@2 skip@2 max3@1",
    ),
    "pc_darts_cifar": _published(
        "sep3@1 skip@0 sep3@0 dil3@1 sep5@0 sep3@1 avg3@0 dil3@1",
        "sep5@1 max3@0 sep5@1 sep5@2 sep3@0 sep3@3 sep3@1 sep3@2",
    ),
    "pc_darts_imagenet": _published(
        "skip@1 sep3@0 sep3@0 skip@1 sep3@1 sep3@3 sep3@1 dil5@4",
        "sep3@0 skip@1 dil5@2 max3@1 sep3@2 sep3@1 sep5@0 sep3@3",
    ),
}
