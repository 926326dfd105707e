import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from lightning_automl.plots import (
    Dimension,
    Segment,
    best_so_far,
    intermediate_values,
    optimisation_history,
    parallel_coordinates,
    parameter_importances,
    pareto_front,
    population_history,
    value_schedule,
    value_slice,
)
from lightning_automl.plots.marks import BEST, COMPLETE, ValueScale
from lightning_automl.plots.parallel import ABSENT

NAN = math.nan
RED = BEST["color"].lower()
LR = Dimension("lr", 1e-4, 1e-1, log=True)
DEPTH = Dimension("depth", 1, 6, whole=True)
POOL = Dimension("pool", choices=["max", "avg", "a rather long choice of the user"])
DOLLARS = Dimension("a $x$ and b $", choices=["$1", "$2"])


def drawn(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line.get_xydata().tolist()


def marks(axes, shape):
    lines = [line for line in axes.lines if line.get_marker() == shape and len(line.get_xdata()) == 1]
    return [tuple(line.get_xydata()[0]) for line in lines]


def outside(figure):
    """Texts that the picture cuts off."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts = [text for axes in figure.axes for text in axes.texts]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())  # what lies beyond is not drawn
            shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in shown]
    texts += [text for legend in figure.legends for text in legend.texts]
    boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
    return [
        text.get_text() for text, box in boxes.items() if min(box.x0, box.y0, width - box.x1, height - box.y1) < -0.5
    ]


# ---- the best value so far


def test_the_best_so_far_by_hand():
    assert best_so_far([3, 1, 4, 1, 5], True) == [3, 3, 4, 4, 5]
    assert best_so_far([3, 1, 4, 0, 5], False) == [3, 1, 1, 0, 0]
    found = best_so_far([NAN, 2, NAN, math.inf, 3], True)
    assert math.isnan(found[0])
    assert found[1:] == [2, 2, 2, 3]


def test_history_has_points_by_state_and_a_line_that_only_complete_trials_raise():
    axes = optimisation_history(
        [0, 1, 2, 3, 4], [0.5, 0.9, NAN, 0.7, 0.6], [True, False, True, True, True], maximize=True, name="acc"
    ).axes[0]
    assert drawn(axes, "complete") == [[0, 0.5], [3, 0.7], [4, 0.6]]
    assert drawn(axes, "pruned") == [[1, 0.9]]
    assert drawn(axes, "best so far") == [[0, 0.5], [3, 0.7], [4, 0.7], [4, 0.7]]
    assert (3, 0.7) in [tuple(line.get_xydata()[0]) for line in axes.lines if to_hex(line.get_color()) == RED]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("trial", "acc")


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_history_without_a_value_can_be_drawn(values, tmp_path):
    figure = optimisation_history(range(len(values)), values, [True] * len(values), maximize=True, name="acc")
    figure.savefig(tmp_path / "empty.png")


def test_history_of_pruned_trials_alone_has_no_best():
    axes = optimisation_history([0, 1], [0.2, 0.3], [False, False], maximize=True, name="acc").axes[0]
    assert [line.get_label() for line in axes.lines] == ["pruned"]


def test_a_value_far_off_is_a_triangle_at_the_edge_that_points_to_it():
    values = [0.90, 0.93, 0.96, 0.97, 0.1]
    axes = optimisation_history(range(5), values, [True] * 5, maximize=True, name="acc").axes[0]
    low, high = axes.get_ylim()
    assert 0.8 < low < 0.90
    ((place, height),) = marks(axes, "v")
    assert place == 4
    assert low < height < low + 0.05 * (high - low)
    assert [4, 0.1] not in drawn(axes, "complete")


# ---- the axis of values


def test_the_scale_leaves_out_what_is_thrice_as_far_from_the_best_as_the_middle():
    # best 10, middle 8: the end is 10 - 3 * 2 = 4, and a margin of 5 % of 6
    scale = ValueScale.of([10, 9, 8, 5, -1000], True)
    assert (scale.low, scale.high) == pytest.approx((3.7, 10.3))
    # and turned round
    scale = ValueScale.of([-10, -9, -8, -5, 1000], False)
    assert (scale.low, scale.high) == pytest.approx((-10.3, -3.7))
    # nothing is that far
    scale = ValueScale.of([10, 8, 6, 5], True)
    assert (scale.low, scale.high) == pytest.approx((5 - 0.25, 10.25))


def test_the_better_part_of_all_values_is_in_the_picture():
    pruned = [0.2, 0.3, 0.4, 0.5]
    scale = ValueScale.of([0.90, 0.91], True, pruned, shown=0.5)
    assert scale.contains(0.5)
    assert not scale.contains(0.2)
    assert not ValueScale.of([0.90, 0.91], True, pruned, shown=0.25).contains(0.5)


def test_losses_that_differ_by_decades_get_a_logarithmic_scale_and_accuracies_never():
    losses = ValueScale.of([0.05, 0.1, 3, 9], False)
    assert losses.log
    assert losses.contains(0.05)
    assert not ValueScale.of([0.01, 0.5, 0.98], True).log
    assert not ValueScale.of([-1, 50], True).log
    assert losses.shares([losses.low, math.sqrt(losses.low * losses.high), losses.high]) == pytest.approx([0, 0.5, 1])
    # a diverged one does not press the others into a line
    assert not ValueScale.of([0.1, 0.2, 0.3, 0.4, 1e30], False).contains(1e30)


@pytest.mark.parametrize("values", [[], [NAN], [0.5], [0.5, 0.5], [0.0]])
def test_a_scale_of_hardly_anything_has_a_width(values):
    scale = ValueScale.of(values, True)
    assert scale.low < scale.high
    assert all(scale.contains(value) for value in values if value == value)


# ---- the axis of a parameter


def test_a_logarithmic_range_is_measured_by_its_logarithm_and_absent_values_stay_absent():
    assert LR.shares([1e-4, 1e-3, 1e-1, NAN]) == pytest.approx([0, 1 / 3, 1, NAN], nan_ok=True)
    assert DEPTH.shares([1, 2, 6]) == pytest.approx([0, 0.2, 1])
    assert POOL.shares([0, 1, 2]) == pytest.approx([0, 0.5, 1])
    assert Dimension("one", 3, 3).shares([3, NAN]) == pytest.approx([0.5, NAN], nan_ok=True)
    assert Dimension("one", choices=["a"]).shares([0]) == pytest.approx([0.5])


def test_ticks_have_both_ends_and_every_choice():
    assert [value for value, _ in LR.ticks()] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    labels = [label for _, label in Dimension("width", 16, 128).ticks()]
    assert (labels[0], labels[-1]) == ("16", "128")
    assert all(value == int(value) for value, _ in DEPTH.ticks())
    assert [label for _, label in POOL.ticks()][:2] == ["max", "avg"]
    assert len(POOL.ticks()[2][1]) == 16
    assert Dimension("one", 3, 3).ticks() == [(3, "3")]


# ---- slices


def test_a_slice_has_the_scale_of_its_parameter_and_the_points_of_those_that_have_it():
    places, values = [1e-3, 1e-2, NAN, 1e-4], [0.5, 0.8, 0.7, 0.6]
    axes = value_slice(LR, places, values, [True, True, True, False], maximize=True, name="acc").axes[0]
    assert axes.get_xscale() == "log"
    assert drawn(axes, "complete") == [[1e-3, 0.5], [1e-2, 0.8]]
    assert drawn(axes, "pruned") == [[1e-4, 0.6]]
    assert (1e-2, 0.8) in marks(axes, "o")
    low, high = axes.get_xlim()
    assert low < 1e-4 < 1e-1 < high


def test_the_best_trial_is_marked_only_where_it_has_the_parameter():
    axes = value_slice(LR, [1e-3, NAN], [0.5, 0.8], [True, True], maximize=True, name="acc").axes[0]
    assert not [line for line in axes.lines if to_hex(line.get_color()) == RED]
    axes = value_slice(LR, [1e-3, NAN], [0.5, 0.8], [True, True], maximize=False, name="loss").axes[0]
    assert marks(axes, "o") == [(1e-3, 0.5)] * 2  # the point, and its mark


def test_choices_are_named_and_their_points_spread_beside_each_other():
    figure = value_slice(POOL, [0.0] * 20 + [1.0], [0.5] * 21, [True] * 21, maximize=True, name="acc")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["max", "avg"]
    across = [x for x, _ in drawn(axes, "complete")]
    assert len({round(x, 6) for x in across[:20]}) == 20
    assert all(abs(x) <= 0.25 for x in across[:20])
    assert abs(across[20] - 1) <= 0.25
    assert not outside(figure)


# ---- parallel coordinates


def test_each_trial_is_a_line_and_the_best_one_is_drawn_last():
    rows = [[1e-4, 0, 1], [1e-1, 2, 6], [NAN, 1, 6]]
    axes = parallel_coordinates([LR, POOL, DEPTH], rows, [0.5, 0.9, 0.7], maximize=True, name="acc").axes[0]
    (lines,) = axes.collections
    assert len(lines.get_segments()) == 2
    (best,) = [line for line in axes.lines if line.get_label() == "best"]
    assert best.get_xdata()[1:] == pytest.approx([1, 1, 1])
    assert best.get_ydata().tolist() == [0, 1, 2, 3]
    worst, middle = lines.get_segments()
    assert worst[1:, 0] == pytest.approx([0, 0, 0])
    assert middle[1:, 0] == pytest.approx([ABSENT, 0.5, 1])
    assert "absent" in [text.get_text() for text in axes.texts]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["acc", "lr", "pool", "depth"]
    colours = lines.get_array()
    assert colours[1] > colours[0]


def test_of_losses_the_smallest_is_best():
    axes = parallel_coordinates([DEPTH], [[1], [6]], [0.1, 0.9], maximize=False, name="loss").axes[0]
    (best,) = [line for line in axes.lines if line.get_label() == "best"]
    assert best.get_xdata()[1] == 0


@pytest.mark.parametrize("count", [2, 400])
@pytest.mark.parametrize("dimensions", [1, 12])
def test_parallel_coordinates_can_be_read(count, dimensions, tmp_path):
    generator = np.random.default_rng(0)
    chosen = [LR, DEPTH, POOL, DOLLARS] * 3
    rows = [[1e-2, 3, 1, NAN] * 3 for _ in range(count)]
    figure = parallel_coordinates(
        chosen[:dimensions], [row[:dimensions] for row in rows], generator.random(count), maximize=True, name="val_x"
    )
    assert not outside(figure)
    figure.savefig(tmp_path / "parallel.svg")


# ---- importances


def test_importances_have_a_bar_a_method_and_the_most_important_on_top():
    figure = parameter_importances({"PED-ANOVA": {"depth": 0.1, "lr": 0.9}, "fANOVA": {"lr": 0.4, "width": 0.6}})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lr", "depth", "width"]
    assert [bar.get_width() for bar in axes.patches] == [0.9, 0.1, 0, 0.4, 0, 0.6]
    assert [text.get_text() for text in axes.texts] == [
        "0.90",
        "0.10",
        "not in every trial",
        "0.40",
        "not in every trial",
        "0.60",
    ]
    assert len({bar.get_hatch() for bar in axes.patches}) == 2
    assert not outside(figure)


def test_of_many_parameters_the_most_important_are_drawn():
    axes = parameter_importances({"a": {f"p{index}": index / 100 for index in range(30)}}, rows=5).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["p29", "p28", "p27", "p26", "p25"]
    assert axes.get_title() == "the 5 most important of 30 parameters"


# ---- reports of the trials


def test_each_trial_is_a_curve_and_pruned_ones_are_dashed_and_end_in_a_cross():
    curves = [[(1, 0.1), (2, 0.5)], [(1, 0.2), (2, NAN), (3, 0.3)], [(1, 0.4), (2, 0.6)], [(1, 0.3)], []]
    states = ["complete", "pruned", "complete", "running", "failed"]
    figure = intermediate_values(curves, states, maximize=True, name="acc", best=2)
    lines = {tuple(map(tuple, line.get_xydata().tolist())): line for line in figure.axes[0].lines}
    assert lines.keys() == {((1, 0.1), (2, 0.5)), ((1, 0.2), (3, 0.3)), ((1, 0.4), (2, 0.6)), ((1, 0.3),)}
    pruned = lines[(1, 0.2), (3, 0.3)]
    assert (pruned.get_linestyle(), pruned.get_marker(), pruned.get_markevery()) == ("--", "x", [1])
    assert lines[(1, 0.1), (2, 0.5)].get_linestyle() == "-"
    best = lines[(1, 0.4), (2, 0.6)]
    assert to_hex(best.get_color()) == RED
    assert best is figure.axes[0].lines[-1]
    assert [text.get_text() for text in figure.legends[0].texts] == ["pruned", "not ended", "complete", "best"]


def test_many_curves_are_drawn_through_each_other_and_as_a_picture(tmp_path):
    curves = [[(step, step / 300) for step in range(300)] for _ in range(100)]
    figure = intermediate_values(curves, ["complete"] * 100, maximize=True, name="acc")
    assert all(line.get_alpha() < 1 and line.get_rasterized() for line in figure.axes[0].lines)
    figure.savefig(tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size < 500_000


def test_curves_without_a_report_can_be_drawn(tmp_path):
    intermediate_values([], [], maximize=True, name="acc").savefig(tmp_path / "empty.png")
    intermediate_values([[]], ["running"], maximize=False, name="loss").savefig(tmp_path / "empty.png")


# ---- two objectives

POINTS = [(0.9, 100.0), (0.8, 10.0), (0.7, 50.0)]


def test_the_front_is_a_staircase_between_what_can_be_had():
    figure = pareto_front([4, 7, 9], POINTS, [4, 7], names=("acc", "parameters"), maximize=(True, False))
    axes = figure.axes[0]
    assert drawn(axes, "Pareto front") == [[10, 0.8], [100, 0.9]]
    assert drawn(axes, "surpassed") == [[50, 0.7]]
    (stairs,) = [line for line in axes.lines if line.get_drawstyle().startswith("steps")]
    # With cost up to 50, no more than 0.8 can be had.
    assert stairs.get_drawstyle() == "steps-post"
    assert [text.get_text() for text in axes.texts] == ["7", "4"]
    assert axes.get_xlabel() == "parameters (less is better)"
    assert axes.get_ylabel() == "acc (more is better)"
    assert not outside(figure)


def test_the_stairs_turn_with_the_direction():
    axes = pareto_front([0, 1], [(1, 2), (2, 1)], [0, 1], names=("a", "b"), maximize=(True, True)).axes[0]
    (stairs,) = [line for line in axes.lines if line.get_drawstyle().startswith("steps")]
    assert stairs.get_drawstyle() == "steps-pre"


def test_costs_of_several_decades_have_a_logarithmic_axis_and_every_trial_is_inside():
    points = [(0.1 + 0.01 * index, 10.0**index) for index in range(7)]
    axes = pareto_front(range(7), points, [0], names=("acc", "flops"), maximize=(True, False)).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    low, high = axes.get_xlim()
    assert low < 1
    assert high > 10**6
    assert axes.get_ylim()[0] < 0.1


def test_two_of_three_objectives_have_no_stairs_and_many_points_no_numbers(tmp_path):
    points = [(float(index), float(index)) for index in range(40)]
    figure = pareto_front(range(40), points, range(20), names=("a", "b"), maximize=(True, False), joined=False)
    assert not [line for line in figure.axes[0].lines if line.get_drawstyle().startswith("steps")]
    assert not figure.axes[0].texts
    pareto_front([], [], [], names=("a", "b"), maximize=(True, True)).savefig(tmp_path / "empty.png")
    pareto_front([3], [(1, 2)], [3], names=("a", "b"), maximize=(True, True)).savefig(tmp_path / "one.png")


# ---- population based training


def test_segments_are_lines_and_what_led_to_the_best_is_thick_and_on_top():
    segments = [
        Segment([(0, 0.1), (2, 0.5)], winner=True),
        Segment([(0, 0.1), (2, 0.2)]),
        Segment([(2, 0.5), (4, 0.6)], copied=True),
    ]
    lines = population_history(segments, maximize=True, name="acc").axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-"]
    assert lines[-1].get_xydata().tolist() == [[0, 0.1], [2, 0.5]]
    assert lines[-1].get_linewidth() > lines[0].get_linewidth()


def test_a_schedule_is_flat_within_a_span_and_has_the_scale_of_its_parameter():
    figure = value_schedule(LR, [(0, 2, 1e-1), (2, 4, 1e-2)])
    axes = figure.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1e-1], [2, 1e-1], [2, 1e-2], [4, 1e-2]]
    assert axes.get_yscale() == "log"
    assert axes.get_title() == "lr"
    choices = value_schedule(POOL, [(0, 1, 2.0)]).axes[0]
    assert [label.get_text() for label in choices.get_yticklabels()][:2] == ["max", "avg"]


# ---- all of them


def everything(count):
    generator = np.random.default_rng(0)
    values = generator.random(count)
    whole = [True] * count
    yield optimisation_history(range(count), values, whole, maximize=True, name="val_balanced_accuracy")
    for dimension in (LR, DEPTH, POOL, DOLLARS, Dimension("narrow", 0.1, 0.2, log=True)):
        yield value_slice(dimension, [1.0] * count, values, whole, maximize=True, name="val_balanced_accuracy")
    yield parameter_importances({"a $x$": {"b $y$": 1.0, "c $": 0.0}})
    points = list(zip(values, generator.random(count) * 1e7, strict=True))
    yield pareto_front(range(count), points, range(count), names=("a", "b $"), maximize=(True, False))
    yield intermediate_values([[(1, value)] for value in values], ["complete"] * count, maximize=True, name="a $x$")
    yield population_history([Segment([(0, value)]) for value in values], maximize=True, name="acc")
    yield value_schedule(DOLLARS, [(0, 1, 0.0)])


@pytest.mark.parametrize("count", [1, 2, 150])
def test_nothing_is_cut_off_and_no_name_is_a_formula(count, tmp_path):
    for figure in everything(count):
        assert not outside(figure)
        axes = figure.axes[0]
        named = [text for text in (*axes.get_xticklabels(), *axes.get_yticklabels()) if "$" in text.get_text()]
        named = [text for text in named if "mathdefault" not in text.get_text()]  # matplotlib's own powers of ten
        assert not any(text.get_parse_math() for text in named)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            assert "$" not in label.get_text() or not label.get_parse_math()
        figure.savefig(tmp_path / "figure.svg")


def test_marks_of_complete_and_pruned_trials_and_of_the_best_differ_in_print_without_colours():
    axes = optimisation_history([0, 1], [0.5, 0.4], [True, False], maximize=True, name="acc").axes[0]
    shapes = {line.get_label(): line.get_marker() for line in axes.lines}
    assert shapes["complete"] != shapes["pruned"]
    assert BEST["markersize"] > COMPLETE["markersize"]
