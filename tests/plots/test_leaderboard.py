import math

import pytest
from test_study_plots import outside

from lightning_automl.plots.leaderboard import ROWS, Standing, leaderboard
from lightning_automl.plots.seeds import seed_curves

NAN = math.nan
ARMS = [
    Standing("ResNet-20 from scratch, TrivialAugment, tuned", 0.92, 0.87, 0.97, [0.91, 0.92, 0.93]),
    Standing("ResNet-20 from scratch, TrivialAugment", 0.91, 0.86, 0.96, [0.90, 0.91, 0.92], chosen=True),
    Standing("small CNN", 0.80, values=[0.8], pruned=True),
    Standing("pretrained, LoRA", note="not run: the pretrained network is not installed, so that it cannot be had"),
]


def draw(standings, maximize=True):
    figure = leaderboard(standings, metric="AUROC", maximize=maximize)
    figure.draw_without_rendering()
    return figure


def points(figure, marker="o", size=5):
    """Places of the larger marks, from the top."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() == marker and line.get_markersize() >= size]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def test_each_arm_has_a_row_with_its_mean_and_the_chosen_one_is_marked():
    figure = draw(ARMS)
    assert points(figure) == [(0.92, 0), (0.91, 1), (0.80, 2)]
    names = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_yticklabels()]
    assert names == [each.name for each in ARMS]
    assert len(figure.axes[0].patches) == 1  # behind the chosen one
    sizes = {line.get_ydata()[0]: line.get_markersize() for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert sizes[1] > sizes[0] > sizes[2]
    assert not outside(figure)


def test_an_arm_without_a_value_says_why_inside_the_picture():
    figure = draw(ARMS)
    assert [text.get_text().split("\n")[0] for text in figure.axes[0].texts] == [
        "not run: the pretrained network is not"
    ]
    frame, box = figure.axes[0].get_window_extent(), figure.axes[0].texts[0].get_window_extent()
    assert frame.x0 <= box.x0
    assert box.x1 <= frame.x1


def test_a_row_is_never_blank():
    figure = draw([*ARMS, Standing("arm", note="not run: why")])
    rows = {line.get_ydata()[0] for line in figure.axes[0].lines} | {
        text.get_position()[1] for text in figure.axes[0].texts
    }
    assert {0, 1, 2, 3, 4} <= rows


def test_intervals_that_go_on_beyond_the_picture_end_in_triangles():
    wide = [Standing("a", 0.91, -3.0, 5.0, [0.90, 0.92]), Standing("b", 0.90, 0.895, 0.905, [0.9])]
    figure = draw(wide)
    low, high = figure.axes[0].get_xlim()
    assert 0.5 < low < 0.9
    assert high < 1.1
    assert [(x, y) for marker in "<>" for x, y in points(figure, marker, 4)] == [(low, 0), (high, 0)]


def test_an_arm_far_below_the_others_does_not_press_them_together():
    many = [Standing(str(number), 0.9 + 0.001 * number, values=[0.9]) for number in range(9)]
    figure = draw([*many, Standing("bad", 0.1, values=[0.1], pruned=True)])
    low, high = figure.axes[0].get_xlim()
    assert low > 0.5
    assert points(figure, "<") == [(pytest.approx(low + 0.02 * (high - low)), 9)]


@pytest.mark.parametrize("maximize", [True, False])
def test_equal_single_and_missing_values_can_be_drawn(maximize):
    draw([Standing("a", 0.5), Standing("b", 0.5)], maximize)
    draw([Standing("a", 0.0, NAN, NAN)], maximize)
    draw([Standing("a", note="not judged yet")], maximize)
    draw([], maximize)


def test_before_anything_is_chosen_the_legend_says_so():
    figure = leaderboard(ARMS, metric="AUROC", maximize=True, mark="leads so far")
    texts = [text.get_text() for text in figure.legends[0].texts]
    assert texts == ["leads so far", "mean, 95 % interval", "stopped early", "one fold"]


def test_of_very_many_arms_the_first_are_drawn_and_the_title_says_so():
    figure = draw([Standing(f"arm {number}", 0.9) for number in range(ROWS + 3)])
    assert len(figure.axes[0].get_yticklabels()) == ROWS
    assert figure.axes[0].get_title() == f"the first {ROWS} of {ROWS + 3}"


def test_a_dollar_sign_and_a_long_name_are_no_trouble():
    assert not outside(
        draw([Standing("$x_1$ " + "very " * 30 + "long", 0.9, chosen=True), Standing("b", note="$y$ " * 60)])
    )


# ---- seeds


def test_each_seed_has_a_line_a_stage_and_the_legend_one_entry():
    runs = [
        [{"epoch": epoch, "train_loss": 1.0 / (1 + epoch + seed), "val_loss": 1.0} for epoch in range(4)]
        for seed in range(3)
    ]
    axes = seed_curves(runs, "loss", "the loss").axes[0]
    assert len(axes.lines) == 6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "val"]
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert axes.get_title() == "the loss"


def test_a_metric_that_nobody_has_gives_an_empty_picture():
    figure = seed_curves([[{"epoch": 0.0}], []], "auroc")
    figure.draw_without_rendering()
    assert not figure.axes[0].lines
