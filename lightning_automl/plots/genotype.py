"""A genotype as a picture: its cells as graphs, left to right."""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from lightning_automl.plots.names import shorten
from lightning_automl.rundir import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Cells(Protocol):
    """What is drawn of a `models.Genotype`: for each intermediate node its operations and the nodes they start from."""

    @property
    def normal(self) -> Sequence[Sequence[tuple[str, int]]]: ...  # noqa: D102
    @property
    def normal_concat(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def reduce(self) -> Sequence[Sequence[tuple[str, int]]]: ...  # noqa: D102
    @property
    def reduce_concat(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def inputs(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Kind:
    """How operations of one kind look: colour and, for print without colours, dashes of lines; fill of labels."""

    colour: str
    dashes: Any
    fill: str


#: Colours that colour-blind readers can tell apart (Okabe and Ito), on fills light enough for dark text.
KINDS = {
    "separable convolution": Kind("#0072B2", "-", "#DCEBF5"),
    "dilated convolution": Kind("#009E73", (0, (6, 1.2)), "#DDF3EC"),
    "convolution": Kind("#56B4E9", "-", "#E6F4FC"),
    "pooling": Kind("#D55E00", (0, (3, 1.2)), "#FBE6D9"),
    "skip connection": Kind("#CC79A7", (0, (1.2, 0.9)), "#F8EAF2"),
    "attention": Kind("#E69F00", "-", "#FCF1D9"),
    "none": Kind("#8C8C8C", (0, (1, 2.2)), "#F2F2F2"),
    "own operation": Kind("#303030", (0, (5, 1.2, 1, 1.2)), "#E2E2E2"),
}

_FONT = 8.5  # points, of the labels
_WRAP = 9  # characters; longer names take two lines
_LONGEST = 2 * 12  # characters of both lines
_LINE = 1.2 * _FONT / 72  # inches from line to line
_ROW = 0.40  # inches of an operation
_BETWEEN = 0.07  # inches between the rows of two nodes
_RADIUS = 0.13  # inches, of a node
_IN, _OUT = 0.34, 0.15  # inches of the bends before and behind a column of labels
_SIDE = 0.52  # inches, of the boxes of inputs and output
_MARGIN, _TITLE, _APART = 0.09, 0.28, 0.24
_MOST = 2.2  # times: by how much the gaps of a cell grow when the other is wider
_ORDERED = 5  # nodes whose every order is tried


def operation_kind(name: str) -> str:
    """The kind of an operation, a key of `KINDS`, by its name; a name that tells nothing is an own operation."""
    for part, kind in (
        ("pool", "pooling"),
        ("sep_conv", "separable convolution"),
        ("dw_conv", "separable convolution"),
        ("dil_conv", "dilated convolution"),
        ("conv", "convolution"),
        ("skip", "skip connection"),
        ("excitation", "attention"),
        ("attention", "attention"),
    ):
        if part in name:
            return kind
    return "none" if name == "none" else "own operation"


def genotype_figure(genotype: Cells) -> "Figure":
    """Draw the cells of a genotype as graphs from left to right.

    Inputs are on the left (``c_{k-2}``, ``c_{k-1}``: the two cells before; with one input the cell before), the
    intermediate nodes carry the numbers that they have in `Genotype`, and the bar on the right joins the nodes of
    ``concat``. Each operation stands on the line from its source to its node, in the colour of its kind. Every node has
    lines of labels of its own, so that nothing lies on a label; nodes are in the order, from top to bottom, with the
    fewest crossings (up to 5 nodes; more stand in the order of their depth).

    Args:
        genotype: The `models.Genotype`, or anything with ``normal``, ``normal_concat``, ``reduce``, ``reduce_concat``
            and ``inputs``; a cell without nodes is left out.

    Returns:
        The figure: about 5 inches wide for cells of depth 3, so that it can be read at the width of a phone.
    """
    from matplotlib.figure import Figure

    given = [("normal cell", genotype.normal, genotype.normal_concat)]
    given.append(("reduction cell", genotype.reduce, genotype.reduce_concat))
    cells = [
        _Cell.of(title if genotype.reduce else "cell", nodes, concat, genotype.inputs)
        for title, nodes, concat in given
        if nodes
    ]
    kinds = {operation_kind(label.name) for cell in cells for label in cell.labels}
    shown = [kind for kind in KINDS if kind in kinds]
    width = max([cell.width(1.0) for cell in cells], default=3.0)
    columns = max(1, min(len(shown), int(width / 1.75)))
    below = 0.21 * math.ceil(len(shown) / columns)
    height = _MARGIN + below + sum(_TITLE + cell.height + _APART for cell in cells)
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))  # inches
    axes.set_axis_off()
    top = height - _MARGIN
    for cell in cells:
        style: dict[str, Any] = {"fontsize": 10.5, "fontweight": "bold", "va": "top", "color": "black"}
        axes.text(_MARGIN, top, cell.title, **style)
        top -= _TITLE
        cell.draw(axes, top, cell.stretch(width))
        top -= cell.height + _APART
    _legend(figure, shown, columns)
    return figure


def write_genotype(genotype: Cells, path: FilePath) -> None:
    """Draw a genotype into a file, atomically; equal genotypes give equal bytes, and the text of an SVG is text.

    Args:
        genotype: As for `genotype_figure`.
        path: Ends with ``.svg`` or ``.png``.
    """
    import matplotlib

    form = path.suffix.removeprefix(".")
    metadata: dict[str, Any] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    with (
        matplotlib.rc_context({"svg.hashsalt": "genotype", "svg.fonttype": "none"}),
        warnings.catch_warnings(),
        replacing(path) as partial,
    ):
        warnings.filterwarnings("ignore", message=".*missing from font")  # the reader's font may have it
        genotype_figure(genotype).savefig(partial, format=form, dpi=200, metadata=metadata.get(form))


@dataclass(frozen=True)
class _Label:
    """An operation in the picture: from where, to which node, and in which of the node's rows."""

    name: str
    source: int
    target: int
    row: int


_Placed: TypeAlias = tuple[list[_Label], dict[_Label, float], list[float]]  # labels, their heights, those of nodes


@dataclass
class _Cell:
    """A cell with the place of everything, in inches below its top and, by columns, from the left."""

    title: str
    inputs: int
    concat: tuple[int, ...]
    columns: list[int]  # of each node, inputs too: the longest way from an input
    labels: list[_Label]
    heights: list[float]  # of each node, inputs too
    rows: dict[_Label, float]
    height: float
    label_widths: list[float]  # of each column of labels

    @classmethod
    def of(cls, title: str, nodes: Sequence[Sequence[tuple[str, int]]], concat: Sequence[int], inputs: int) -> "_Cell":
        columns = [0] * inputs
        for edges in nodes:
            columns.append(1 + max((columns[source] for _, source in edges), default=0))
        orders: Any = [sorted(range(len(nodes)), key=lambda node: (columns[inputs + node], node))]
        if len(nodes) <= _ORDERED:
            orders = itertools.permutations(range(len(nodes)))
        placed = min((_place(nodes, order, inputs) for order in orders), key=lambda each: _cost(each, columns))
        labels, rows, heights = placed
        widths = [0.0] * max(columns)
        for label in labels:
            column = columns[label.target] - 1
            widths[column] = max(widths[column], _box_width(label.name))
        return cls(title, inputs, tuple(concat), columns, labels, heights, rows, _height_of(nodes), widths)

    def width(self, stretch: float) -> float:
        """Of the cell with the gaps ``stretch`` times as wide, inches."""
        fixed = 2 * _MARGIN + _SIDE + 0.30 + sum(self.label_widths) + 2 * _RADIUS * len(self.label_widths)
        return fixed + stretch * self._gaps()

    def _gaps(self) -> float:
        return (_IN + _OUT) * len(self.label_widths) + _IN * 0.8

    def stretch(self, width: float) -> float:
        return min(_MOST, (width - self.width(0.0)) / self._gaps())

    def draw(self, axes: "Axes", top: float, stretch: float) -> None:
        from matplotlib.patches import Circle

        into, out = _IN * stretch, _OUT * stretch
        begin = [_MARGIN + _SIDE]  # where the bends behind the nodes of a column begin
        for width in self.label_widths:
            begin.append(begin[-1] + into + width + out + 2 * _RADIUS)
        for label in self.labels:
            kind = KINDS[operation_kind(label.name)]
            column = self.columns[label.target]
            source = (begin[self.columns[label.source]], top - self.heights[label.source])
            row = top - self.rows[label]
            right = begin[column] - 2 * _RADIUS
            target = (right + _RADIUS, top - self.heights[label.target])
            middle = right - out - self.label_widths[column - 1] / 2
            identity = f"{self.title}-{label.source}-{label.target}-{label.name}".replace(" ", "-")
            _line(axes, [source, (source[0] + into, row), (right - out, row), target], kind, f"line-{identity}")
            _box(axes, (middle, row), label.name, kind, f"label-{identity}")
        for node in range(self.inputs, len(self.columns)):
            place = (begin[self.columns[node]] - _RADIUS, top - self.heights[node])
            circle: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.25", "linewidth": 1.1, "zorder": 4}
            axes.add_patch(Circle(place, _RADIUS, **circle))
            text: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 9, "color": "black"}
            axes.text(*place, str(node), zorder=5, **text)
        self._draw_inputs(axes, top)
        self._draw_output(axes, top, begin, begin[-1] + 0.8 * into)

    def _draw_inputs(self, axes: "Axes", top: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        for node in range(self.inputs):
            y = top - self.heights[node]
            style: dict[str, Any] = {"facecolor": "#EDEDED", "edgecolor": "0.25", "linewidth": 1.1, "zorder": 4}
            box = "round,pad=0,rounding_size=0.05"
            axes.add_patch(FancyBboxPatch((_MARGIN, y - 0.15), _SIDE, 0.3, boxstyle=box, **style))
            text: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 9.5, "color": "black"}
            name = f"$c_{{k-{self.inputs - node}}}$"
            axes.text(_MARGIN + _SIDE / 2, y, name, zorder=5, **text)

    def _draw_output(self, axes: "Axes", top: float, begin: list[float], left: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        if not self.concat:
            return
        joined = [top - self.heights[node] for node in self.concat]
        name = "concat" if len(joined) > 1 else "output"
        middle = (max(joined) + min(joined)) / 2
        half = max((max(joined) - min(joined)) / 2 + 0.18, 0.40)
        middle = min(max(middle, top - self.height + half), top - half) if 2 * half < self.height else middle
        for node in self.concat:
            y = top - self.heights[node]
            style: dict[str, Any] = {"color": "0.45", "linewidth": 1.3, "solid_capstyle": "butt", "zorder": 1}
            axes.plot([begin[self.columns[node]] - _RADIUS, left], [y, y], **style)
        style = {"facecolor": "#EDEDED", "edgecolor": "0.25", "linewidth": 1.1, "zorder": 4}
        box = "round,pad=0,rounding_size=0.05"
        axes.add_patch(FancyBboxPatch((left, middle - half), 0.30, 2 * half, boxstyle=box, **style))
        text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "rotation": 90, "color": "black"}
        axes.text(left + 0.15, middle, f"{name} $c_k$", zorder=5, **text)


def _height_of(nodes: Sequence[Sequence[tuple[str, int]]]) -> float:
    return sum(_ROW * max(1, len(edges)) for edges in nodes) + _BETWEEN * (len(nodes) - 1)


def _place(nodes: Sequence[Sequence[tuple[str, int]]], order: Sequence[int], inputs: int) -> _Placed:
    """Labels with their heights, and the heights of all nodes, for nodes from top to bottom in ``order``."""
    height = _height_of(nodes)
    heights = [height * (node + 0.5) / inputs for node in range(inputs)] + [0.0] * len(nodes)
    top = 0.0
    tops = {}
    for node in order:
        rows = max(1, len(nodes[node]))
        tops[node] = top
        heights[inputs + node] = top + _ROW * rows / 2
        top += _ROW * rows + _BETWEEN
    labels, at = [], {}
    for node, edges in enumerate(nodes):
        # by the height of the source, so that lines into one node do not cross
        for row, (name, source) in enumerate(sorted(edges, key=lambda edge: (heights[edge[1]], edge[1]))):
            label = _Label(name, source, inputs + node, row)
            labels.append(label)
            at[label] = tops[node] + _ROW * (row + 0.5)
    return labels, at, heights


def _cost(placed: _Placed, columns: Sequence[int]) -> tuple[int, float]:
    """How often lines cross in the gaps behind columns of nodes, where alone they leave their rows; and their way."""
    labels, rows, heights = placed
    crossings = 0
    for gap in range(max(columns)):
        passing = []
        for label in labels:
            if columns[label.source] <= gap < columns[label.target]:
                left = heights[label.source] if columns[label.source] == gap else rows[label]
                passing.append((left, rows[label]))
        for (left, right), (other_left, other_right) in itertools.combinations(passing, 2):
            crossings += (left - other_left) * (right - other_right) < 0
    return crossings, round(sum(abs(heights[label.source] - rows[label]) for label in labels), 6)


def _wrapped(name: str) -> list[str]:
    """A name in one or two lines, parted at the underscore that is nearest to its middle."""
    short = shorten(name, _LONGEST)
    cuts = [place for place, letter in enumerate(short) if letter in "_ " and 0 < place < len(short) - 1]
    if len(short) <= _WRAP:
        return [short]
    if not cuts:
        middle = (len(short) + 1) // 2
        return [short] if len(short) <= _LONGEST // 2 else [short[:middle], short[middle:]]
    cut = min(cuts, key=lambda place: (max(place, len(short) - place - 1), -place))
    return [short[:cut], short[cut + 1 :]]


def _text_width(text: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font")
        width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=_FONT), ismath=False)
    return float(width) / 72


def _box_width(name: str) -> float:
    return max(0.45, 0.12 + max(_text_width(line) for line in _wrapped(name)))


def _box(axes: "Axes", place: tuple[float, float], name: str, kind: Kind, identity: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    width, height = _box_width(name), _ROW - 0.05
    style: dict[str, Any] = {"facecolor": kind.fill, "edgecolor": kind.colour, "linewidth": 1.2, "zorder": 3}
    box = "round,pad=0,rounding_size=0.07"
    corner = (place[0] - width / 2, place[1] - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=box, **style))
    text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _FONT, "color": "black", "parse_math": False}
    axes.text(*place, "\n".join(_wrapped(name)), linespacing=1.05, zorder=5, label=identity, **text)


def _line(axes: "Axes", points: Sequence[tuple[float, float]], kind: Kind, identity: str) -> None:
    """A bend, a straight piece and a bend; all ends are horizontal."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (x0, y0), (x1, y1), (x2, _), (x3, y3) = points
    first, second = (x0 + x1) / 2, (x2 + x3) / 2
    vertices = [(x0, y0), (first, y0), (first, y1), (x1, y1), (x2, y1), (second, y1), (second, y3), (x3, y3)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3]
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": kind.colour, "linewidth": 1.7, "linestyle": kind.dashes}
    axes.add_patch(PathPatch(Path(vertices, codes), zorder=2, capstyle="butt", label=identity, **style))


def _legend(figure: "Figure", kinds: Sequence[str], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=KINDS[kind].colour, linestyle=KINDS[kind].dashes, linewidth=2.4, label=kind)
        for kind in kinds
    ]
    if handles:
        style: dict[str, Any] = {
            "frameon": False,
            "fontsize": 8.5,
            "labelcolor": "black",
            "handlelength": 2.2,
            "columnspacing": 1.2,
        }
        figure.legend(handles=handles, loc="lower center", ncols=columns, borderaxespad=0.3, **style)
