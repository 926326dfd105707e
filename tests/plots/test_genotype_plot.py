import itertools
import random
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyBboxPatch
from PIL import Image

from lightning_automl.models.genotype import PUBLISHED
from lightning_automl.plots import genotype_figure, operation_kind, write_genotype
from lightning_automl.plots.genotype import KINDS

DARTS = ["max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]
NASBENCH201 = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
OWN = [
    "squeeze_excitation",
    "conv_7x1_1x7",
    "a_rather_long_operation_of_a_user",
    "withoutanyunderscoreatall",
    "$x$_$y$",
]


def cells(normal, reduce=(), inputs=2, joined=None):
    count = inputs + len(normal)
    every = tuple(range(inputs, count)) if joined is None else joined
    return SimpleNamespace(
        normal=normal, normal_concat=every, reduce=reduce, reduce_concat=every if reduce else (), inputs=inputs
    )


def darts_v2():
    normal = ((("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),) * 2
    normal += ((("sep_conv_3x3", 1), ("skip_connect", 0)), (("skip_connect", 0), ("dil_conv_3x3", 2)))
    first, later = (("max_pool_3x3", 0), ("max_pool_3x3", 1)), (("skip_connect", 2), ("max_pool_3x3", 1))
    return cells(normal, (first, later, (("max_pool_3x3", 0), ("skip_connect", 2)), later))


def random_cells(nodes, seed, operations=DARTS):
    draw = random.Random(seed)

    def cell():
        return tuple(
            tuple((draw.choice(operations), source) for source in draw.sample(range(2 + node), 2))
            for node in range(nodes)
        )

    return cells(cell(), cell())


def nasbench201(seed):
    draw = random.Random(seed)
    nodes = tuple(tuple((draw.choice(NASBENCH201), source) for source in range(node + 1)) for node in range(3))
    return cells(nodes, inputs=1, joined=(3,))


def chain(nodes):
    """Each node follows the one before it: the widest picture."""
    normal = tuple(((DARTS[node % 7], node + 1), (DARTS[(node + 3) % 7], node)) for node in range(nodes))
    return cells(normal, random_cells(nodes, 0).reduce)


CASES = {
    **PUBLISHED,
    **{f"{nodes} nodes, seed {seed}": random_cells(nodes, seed) for nodes in range(2, 6) for seed in range(4)},
    **{f"nasbench201, seed {seed}": nasbench201(seed) for seed in range(4)},
    **{f"chain of {nodes}": chain(nodes) for nodes in (1, 5, 7)},
    "own operations": random_cells(4, 0, OWN),
    "one node is joined": cells(random_cells(3, 0).normal, joined=(2,)),
}
each_case = pytest.mark.parametrize("genotype", CASES.values(), ids=CASES)


def parts(figure):
    """Texts, frames (boxes and circles) and lines of operations, each with its place in pixels."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (legend,) = figure.legends
    texts = [(text, text.get_window_extent()) for text in [*axes.texts, *legend.texts]]
    frames = [
        (patch, patch.get_window_extent()) for patch in axes.patches if isinstance(patch, Circle | FancyBboxPatch)
    ]
    lines = [patch for patch in axes.patches if patch not in [frame for frame, _ in frames]]
    return texts, frames, lines


def overlap(a, b, least=0.5):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > least and min(a.y1, b.y1) - max(a.y0, b.y0) > least


def through(box, points, inside=1.0):
    """Whether a line has points in a box."""
    x, y = points.T
    within = (x > box.x0 + inside) & (x < box.x1 - inside) & (y > box.y0 + inside) & (y < box.y1 - inside)
    return bool(within.any())


def node_frame(texts, frames, inputs, node, place):
    """The box or circle of a node of the first or second cell, found by the text within."""
    name = f"$c_{{k-{inputs - node}}}$" if node < inputs else str(node)
    (text,) = [box for text, box in texts if text.get_text() == name][place : place + 1]
    (frame,) = [box for _, box in frames if overlap(text, box)]
    return frame


def drawn_points(line):
    path = line.get_path().interpolated(1).transformed(line.get_transform())
    (polygon,) = path.to_polygons(closed_only=False)  # the curves as short straight pieces
    steps = np.linspace(0, 1, 50)[:, None]
    return np.concatenate([a + (b - a) * steps for a, b in itertools.pairwise(polygon)])


@each_case
def test_labels_lie_on_nothing_and_nothing_is_cut_off(genotype):
    figure = genotype_figure(genotype)
    texts, frames, _ = parts(figure)
    for (first, a), (second, b) in itertools.combinations(texts, 2):
        assert not overlap(a, b), (first.get_text(), second.get_text())
    for (first, a), (second, b) in itertools.combinations(frames, 2):
        assert not overlap(a, b), (first, second)
    for text, a in texts:
        around = [b for _, b in frames if overlap(a, b)]
        assert len(around) <= 1, text.get_text()
        for b in around:  # within its own frame
            assert a.x0 >= b.x0, text.get_text()
            assert a.x1 <= b.x1, text.get_text()
            assert a.y0 >= b.y0, text.get_text()
            assert a.y1 <= b.y1, text.get_text()
    width, height = figure.bbox.size
    for part, box in [*texts, *frames]:
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, part


@each_case
def test_lines_run_beside_labels_and_nodes_that_are_not_their_own(genotype):
    texts, frames, lines = parts(genotype_figure(genotype))
    labels = {
        text.get_label().removeprefix("label-"): box for text, box in texts if text.get_label().startswith("label-")
    }
    circles = [box for frame, box in frames if isinstance(frame, Circle)]
    assert lines
    for line in lines:
        points, name = drawn_points(line), line.get_label().removeprefix("line-")
        for other, box in labels.items():
            assert other == name or not through(box, points), f"{name} runs through {other}"
        assert through(labels[name], points)
        assert sum(through(box, points, inside=6.0) for box in circles) <= 1  # its target


@each_case
def test_every_operation_stands_on_a_line_of_its_colour_from_its_source_to_its_node(genotype):
    figure = genotype_figure(genotype)
    titles = ("cell",) if not genotype.reduce else ("normal-cell", "reduction-cell")
    wanted_nodes = [genotype.normal, genotype.reduce]
    wanted = [
        f"{title}-{source}-{genotype.inputs + node}-{name}".replace(" ", "-")
        for title, nodes in zip(titles, (genotype.normal, genotype.reduce), strict=False)
        for node, edges in enumerate(nodes)
        for name, source in edges
    ]
    texts, frames, lines = parts(figure)
    ends = {}  # right edge and centre of each node
    for place, title in enumerate(titles):
        for node in range(genotype.inputs + len(wanted_nodes[place])):
            frame = node_frame(texts, frames, genotype.inputs, node, place)
            ends[(*title.split("-"), str(node))] = (
                np.array([frame.x1, (frame.y0 + frame.y1) / 2]),
                np.array([(frame.x0 + frame.x1) / 2, (frame.y0 + frame.y1) / 2]),
            )
    assert sorted(line.get_label() for line in lines) == sorted(f"line-{name}" for name in wanted)
    labels = [text for text, _ in texts if text.get_label().startswith("label-")]
    assert sorted(text.get_label() for text in labels) == sorted(f"label-{name}" for name in wanted)
    for line in lines:
        kind = operation_kind(line.get_label().split("-")[-1])
        assert to_rgb(line.get_edgecolor()) == to_rgb(KINDS[kind].colour)
        points = drawn_points(line)
        assert (np.diff(points[:, 0]) > -0.01).all()  # left to right
        *title, source, target = line.get_label().split("-")[1:-1]
        assert np.hypot(*(points[0] - ends[(*title, source)][0])) < 1
        assert np.hypot(*(points[-1] - ends[(*title, target)][1])) < 1
    for text in labels:
        name = text.get_label().split("-")[-1]
        if len(name) < 24:
            assert text.get_text().replace("\n", "_") == name or text.get_text().replace("\n", "") == name
    entries = [text.get_text() for text in figure.legends[0].texts]
    assert set(entries) == {operation_kind(name.split("-")[-1]) for name in wanted}
    assert len(set(entries)) == len(entries)


def test_nodes_carry_their_numbers_and_inputs_and_output_their_names():
    texts = [text.get_text() for text in genotype_figure(darts_v2()).axes[0].texts]
    for name in ("normal cell", "reduction cell"):
        assert texts.count(name) == 1
    for name in ("$c_{k-2}$", "$c_{k-1}$", "2", "3", "4", "5", "concat $c_k$"):
        assert texts.count(name) == 2
    texts = [text.get_text() for text in genotype_figure(nasbench201(0)).axes[0].texts]
    assert {"cell", "$c_{k-1}$", "1", "2", "3", "output $c_k$"} <= set(texts)
    assert "$c_{k-2}$" not in texts


def test_nodes_stand_in_the_order_with_the_fewest_crossings():
    # In the order of their numbers the lines 0 -> 3 and 1 -> 2 would cross.
    nodes = ((("skip_connect", 1),), (("skip_connect", 0),))
    texts, _, _ = parts(genotype_figure(cells(nodes, inputs=2)))
    heights = {text.get_text(): box.y0 for text, box in texts}
    assert heights["3"] > heights["2"]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_is_dark_on_light_under_a_users_dark_style():
    with matplotlib.rc_context({"text.color": "white", "figure.facecolor": "black", "savefig.facecolor": "auto"}):
        figure = genotype_figure(random_cells(3, 0))
        texts, _, _ = parts(figure)
        assert {to_rgb(text.get_color()) for text, _ in texts} == {(0.0, 0.0, 0.0)}
        assert to_rgb(figure.get_facecolor()) == (1.0, 1.0, 1.0)
    for kind in KINDS.values():
        assert (luminance(kind.fill) + 0.05) / 0.05 > 7  # contrast of WCAG AAA


def test_kinds_differ_in_colour_and_the_common_ones_also_in_dashes():
    assert len({kind.colour for kind in KINDS.values()}) == len(KINDS)
    common = ["separable convolution", "dilated convolution", "pooling", "skip connection", "none"]
    assert len({str(KINDS[kind].dashes) for kind in common}) == len(common)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("avg_pool_3x3", "pooling"),
        ("sep_conv_7x7", "separable convolution"),
        ("dw_conv_5x5", "separable convolution"),
        ("dil_conv_3x3", "dilated convolution"),
        ("nor_conv_1x1", "convolution"),
        ("conv_7x1_1x7", "convolution"),
        ("skip_connect", "skip connection"),
        ("squeeze_excitation", "attention"),
        ("none", "none"),
        ("mine", "own operation"),
    ],
)
def test_the_kind_of_an_operation_follows_from_its_name(name, kind):
    assert operation_kind(name) == kind


@pytest.mark.parametrize("genotype", PUBLISHED.values(), ids=PUBLISHED)
def test_a_narrow_screen_shows_published_cells_in_letters_that_can_be_read(genotype):
    width = genotype_figure(genotype).get_size_inches()[0]
    assert 8.5 / 72 * 420 / width > 7  # pixels of a line


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_genotype_gives_the_same_bytes(tmp_path, suffix):
    files = [tmp_path / f"{number}.{suffix}" for number in range(3)]
    for file, genotype in zip(files, (darts_v2(), darts_v2(), random_cells(4, 1)), strict=True):
        write_genotype(genotype, file)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert sorted(tmp_path.iterdir()) == files  # nothing else is left


def test_the_text_of_an_svg_is_text_and_it_names_no_date(tmp_path):
    write_genotype(darts_v2(), tmp_path / "genotype.svg")
    svg = (tmp_path / "genotype.svg").read_text()
    texts = re.findall(r">([^<>\n]+)</text>", svg)
    assert texts.count("sep_conv") == 5
    assert {"dil_conv", "3x3", "skip", "connect", "normal cell", "pooling"} <= set(texts)
    assert "date" not in svg.lower().replace("metadata", "")


def test_a_png_is_light_and_as_large_as_the_figure(tmp_path):
    write_genotype(nasbench201(0), tmp_path / "genotype.png")
    width, height = genotype_figure(nasbench201(0)).get_size_inches() * 200
    with Image.open(tmp_path / "genotype.png") as image:
        assert np.abs(np.subtract(image.size, (width, height))).max() <= 1
        assert np.asarray(image.convert("L")).mean() > 200


def test_a_name_in_signs_of_another_script_is_drawn_without_a_warning(tmp_path):
    write_genotype(cells(((("卷积", 0), ("$x$", 1)),)), tmp_path / "genotype.svg")
    svg = (tmp_path / "genotype.svg").read_text()
    assert ">卷积<" in svg
    assert ">$x$<" in svg


def test_two_drawings_can_stand_on_one_page():
    """Nothing in them has a name of its own, so that no name is there twice."""
    figure = genotype_figure(darts_v2())
    assert not [part for part in figure.findobj() if part.get_gid()]
