import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_study_plots import outside

from lightning_automl.plots import edge_strengths, genotype_values, over_epochs
from lightning_automl.plots.architecture import COLUMNS, EPOCHS, Curve, operation_styles
from lightning_automl.plots.marks import BEYOND

NAN = math.nan
OPERATIONS = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5")
EDGES = [(source, target) for target in range(2, 6) for source in range(target)]


def strengths(epochs=6, edges=14, operations=5):
    powers = np.exp(np.random.default_rng(0).normal(size=(epochs, edges, operations)))
    return powers / powers.sum(-1, keepdims=True)


def panels(figure):
    return [axes for axes in figure.axes if axes.axison]


# ---- strengths


def test_each_edge_has_a_panel_and_each_operation_its_line():
    values = strengths()
    drawn = panels(edge_strengths("a cell", OPERATIONS, EDGES, range(6), values))
    assert len(drawn) == len(EDGES)
    for place, axes in enumerate(drawn):
        assert len(axes.lines) == len(OPERATIONS)
        for column, line in enumerate(axes.lines):
            assert line.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
            assert line.get_ydata() == pytest.approx(values[:, place, column])
    assert len({axes.get_ylim() for axes in drawn}) == 1
    assert len({axes.get_position().x0.round(4) for axes in drawn}) == COLUMNS


def test_panels_say_which_edge_they_are_and_which_operation_was_chosen():
    chosen = [None] * len(EDGES)
    chosen[EDGES.index((1, 3))] = "sep_conv_5x5"
    drawn = panels(edge_strengths("a cell", OPERATIONS, EDGES, range(6), strengths(), chosen=chosen, marked=3))
    by_edge = dict(zip(EDGES, drawn, strict=True))
    assert by_edge[1, 3].get_title() == "$c_{k-1}$ \N{RIGHTWARDS ARROW} 3: sep_conv_5x5"
    assert by_edge[2, 5].get_title() == "2 \N{RIGHTWARDS ARROW} 5"
    widths = [line.get_linewidth() for line in by_edge[1, 3].lines[: len(OPERATIONS)]]
    assert max(widths) == widths[OPERATIONS.index("sep_conv_5x5")] > 2 * sorted(widths)[-2]
    grey = {edge for edge, axes in by_edge.items() if to_hex(axes.get_facecolor()) != "#ffffff"}
    assert grey == set(EDGES) - {(1, 3)}
    assert all(axes.lines[-1].get_xdata()[0] == 4 for axes in drawn)  # the chosen epoch, from 1


def test_no_panel_is_grey_where_nothing_is_chosen():
    drawn = panels(edge_strengths("a cell", OPERATIONS, EDGES, range(6), strengths(), chosen=[None] * len(EDGES)))
    assert {to_hex(axes.get_facecolor()) for axes in drawn} == {"#ffffff"}


def test_every_operation_looks_unlike_the_others():
    from lightning_automl.models.ops import OPS

    styles = operation_styles(tuple(OPS))
    assert len({(style["color"], str(style["linestyle"])) for style in styles.values()}) == len(OPS)


def test_of_a_long_search_first_and_last_epoch_and_some_between_are_drawn():
    number = 4 * EPOCHS
    figure = edge_strengths("a cell", OPERATIONS, [(0, 2)], range(number), strengths(number, 1))
    across = figure.axes[0].lines[0].get_xdata()
    assert len(across) <= EPOCHS
    assert (across[0], across[-1]) == (1, number)
    assert max(np.diff(across)) <= 5


@pytest.mark.parametrize(
    ("edges", "epochs", "operations"),
    [
        ([(0, 1)], 1, ("none",)),
        (EDGES, 2, ("a name that is much longer than usual", "$\\frac{1}{", "other")),
        ([(source, target) for target in range(1, 4) for source in range(target)], 3, OPERATIONS),
        (EDGES + [(source, target) for target in range(6, 9) for source in range(target)], 60, OPERATIONS * 3),
    ],
    ids=["least", "names", "one input", "many"],
)
def test_titles_and_legend_are_inside_and_no_title_lies_on_another_panel(edges, epochs, operations):
    operations = tuple(f"{name}{at}" if operations.count(name) > 1 else name for at, name in enumerate(operations))
    chosen = [operations[-1]] * len(edges)
    figure = edge_strengths(
        "a cell", operations, edges, range(epochs), strengths(epochs, len(edges), len(operations)), chosen=chosen
    )
    assert outside(figure) == []
    drawn = panels(figure)
    boxes = [axes.get_window_extent() for axes in drawn]
    for axes in drawn:
        title = axes.title.get_window_extent()
        assert not any(title.overlaps(box) for box in boxes)
    titles = [axes.title.get_window_extent() for axes in drawn]
    assert not any(one.overlaps(other) for at, one in enumerate(titles) for other in titles[:at])


def test_strengths_that_are_not_known_are_gaps(tmp_path):
    values = strengths()
    values[2:4] = NAN
    figure = edge_strengths("a cell", OPERATIONS, EDGES, range(6), values)
    figure.savefig(tmp_path / "gap.png")
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, False, True, True, False, False]
    edge_strengths("a cell", OPERATIONS, EDGES, [], np.zeros((0, len(EDGES), len(OPERATIONS)))).savefig(
        tmp_path / "empty.png"
    )


# ---- over the epochs


def test_curves_marks_and_levels_are_drawn_and_named():
    curve = Curve("one", [(1, 0.5), (2, NAN), (3, 0.25)], "red")
    figure = over_epochs([curve], title="accuracy", marks={"chosen epoch": 3}, levels={"all equal": 2.0})
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["one"].get_xydata().tolist() == [[1, 0.5], [3, 0.25]]
    assert lines["chosen epoch"].get_xdata()[0] == 3
    assert lines["all equal"].get_ydata()[0] == 2.0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)


@pytest.mark.parametrize("values", [(2.0794, 2.0793), (2.0, 1.5), (2.0794,)], ids=str)
def test_what_is_near_to_a_level_is_drawn_as_near(values):
    curve = Curve("entropy", list(enumerate(values, start=1)), "red")
    figure = over_epochs([curve], title="entropy", levels={"all equal": math.log(8)})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low <= 0.98 * math.log(8)
    assert low < min(values)
    assert high > math.log(8)
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_an_axis_of_counts_has_whole_numbers_and_begins_below_zero():
    figure = over_epochs([Curve("skips", [(1, 0), (2, 0), (3, 1)], "red")], title="skip connections", whole=True)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_ylim()[0] < 0 < 1 < axes.get_ylim()[1]
    assert all(float(tick).is_integer() for tick in axes.get_yticks())


@pytest.mark.parametrize("points", [[], [(1, NAN)], [(1, 3.0)], [(1, 2e9), (2, 3e9)]], ids=str)
@pytest.mark.parametrize("label", ["short", "a stream of images of the architecture"])
def test_few_and_large_values_can_be_drawn(points, label):
    figure = over_epochs([Curve(label, points, "red")], title="cost", marks={"end of warm-up": 1})
    assert outside(figure) == []


# ---- genotypes

VALUES = [[0.97, 0.98], [0.96, 0.95, 0.97], [0.93]]
MEANS = [(0.975, 0.96, 0.99), (0.96, 0.94, 0.98), (0.93, NAN, NAN)]


def strip(values=VALUES, means=MEANS, found=(True, False, False), **keys):
    names = [f"genotype {at}" for at in range(len(values))]
    return genotype_values(names, values, means, list(found), metric="val_accuracy", maximize=True, **keys)


def points_of(axes, marker, size):
    return {
        (line.get_xdata()[0], round(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_marker() == marker and line.get_markersize() == size
    }


def test_each_seed_is_a_point_in_the_row_of_its_genotype():
    (axes,) = strip().axes
    drawn = points_of(axes, "D", 4) | points_of(axes, "o", 4)
    assert drawn == {(value, row) for row, own in enumerate(VALUES) for value in own}
    assert points_of(axes, "D", 6) == {(0.975, 0)}
    assert points_of(axes, "o", 6) == {(0.96, 1), (0.93, 2)}
    spans = {tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"}
    assert spans == {(0.96, 0.99), (0.94, 0.98)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["genotype 0", "genotype 1", "genotype 2"]


def test_the_found_one_stands_out():
    (axes,) = strip(found=(False, True, False)).axes
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["normal", "bold", "normal"]
    assert points_of(axes, "D", 6) == {(0.96, 1)}


def test_where_another_random_one_would_be_is_shaded():
    (axes,) = strip(expected=(0.95, 0.92, 0.98)).axes
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((0.92, 0.98))
    assert any(line.get_xdata()[0] == 0.95 and line.get_linestyle() == "--" for line in axes.lines)
    assert not strip(expected=(0.95, NAN, NAN)).axes[0].patches


def test_a_run_that_failed_to_learn_does_not_press_the_others_together():
    values = [[0.970, 0.972], [0.968, 0.971], [0.969, 0.973], [0.971, 0.10]]
    means = [(float(np.mean(own)), NAN, NAN) for own in values]
    (axes,) = strip(values, means, (True, False, False, False)).axes
    assert axes.get_xlim()[0] > 0.9
    beyond = [line for line in axes.lines if line.get_marker() == "<" and line.get_markersize() == BEYOND["markersize"]]
    assert len(beyond) == 1
    assert axes.get_xlim()[0] < beyond[0].get_xdata()[0] < axes.get_xlim()[1]


@pytest.mark.parametrize(
    ("values", "means"),
    [
        ([], []),
        ([[NAN]], [(NAN, NAN, NAN)]),
        ([[0.5], [0.5]], [(0.5, NAN, NAN), (0.5, 0.5, 0.5)]),
        ([[1e6, 2e6], [3.0, 4.0]], [(1.5e6, NAN, NAN), (3.5, 1.0, 6.0)]),
        ([[0.9 + at / 1000] for at in range(40)], [(0.9 + at / 1000, NAN, NAN) for at in range(40)]),
    ],
    ids=["none", "nan", "equal", "decades", "many"],
)
def test_all_kinds_of_values_can_be_drawn(values, means):
    found = [at == 0 for at in range(len(values))]
    assert outside(strip(values, means, found, expected=(0.5, 0.4, 0.6))) == []
