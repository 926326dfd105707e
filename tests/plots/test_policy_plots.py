import math

import numpy as np
import pytest
from test_study_plots import outside

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.policies import (
    ImageRow,
    KeptOperation,
    acceptance_values,
    captioned_images,
    density_history,
    operations_kept,
    paired_differences,
)

NAN = math.nan
ARMS = ["no policy", "TrivialAugment", "searched policy"]


def image(channels=3, side=8, level=100):
    return np.full((channels, side, side), level, np.uint8)


def overlapping(figure):
    """Pairs of the figure's own texts, or of one and an image, that lie on each other."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    areas = [axes.get_window_extent() for axes in figure.axes]
    pairs = [(a, b) for place, a in enumerate(boxes) for b in [*boxes[:place], *areas]]
    return [(a, b) for a, b in pairs if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1]


def cut_off(figure):
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = {text.get_text(): text.get_window_extent() for text in figure.texts}
    return [name for name, box in boxes.items() if min(box.x0, box.y0, width - box.x1, height - box.y1) < -0.5]


# ---- images


def test_images_have_their_captions_and_a_long_row_goes_on_below():
    rows = [
        ImageRow("a title", [(image(), f"number {index}") for index in range(9)]),
        ImageRow("", [(image(), "last")]),
    ]
    figure = captioned_images(rows, columns=4)
    assert len(figure.axes) == 10
    assert [text.get_text() for text in figure.texts] == ["a title", *(f"number {index}" for index in range(9)), "last"]
    places = [axes.get_position() for axes in figure.axes]
    assert len({round(place.y0, 6) for place in places}) == 4  # lines
    assert len({round(place.x0, 6) for place in places}) == 4  # columns
    assert places[0].y0 > places[4].y0 > places[8].y0 > places[9].y0


@pytest.mark.parametrize("caption", ["turned left by 30°", "contrast x 1.90, moved right by 45.3 % and much more " * 3])
def test_captions_are_whole_and_neither_on_each_other_nor_on_images(caption):
    figure = captioned_images([ImageRow("a title", [(image(), caption)] * 8), ImageRow("", [(image(), caption)] * 3)])
    assert not overlapping(figure)
    assert not cut_off(figure)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_number_of_channels_are_drawn_as_they_are(channels):
    given = np.random.default_rng(0).integers(0, 256, (channels, 9, 5), dtype=np.uint8)
    (axes,) = captioned_images([ImageRow("", [(given, "")])]).axes
    shown = axes.images[0]
    wanted = given[0] if channels < 3 else given[:3].transpose(1, 2, 0)
    assert np.array_equal(shown.get_array(), wanted)
    assert shown.get_clim() == (0, 255)  # a dark image stays dark


def test_small_images_are_shown_by_their_pixels_and_large_ones_smoothed():
    small, large = captioned_images([ImageRow("", [(image(side=28), ""), (image(side=224), "")])]).axes
    assert small.images[0].get_interpolation() == "nearest"
    assert large.images[0].get_interpolation() != "nearest"


def test_a_dollar_sign_is_no_formula(tmp_path):
    captioned_images([ImageRow("$a$", [(image(), "class $x_$")])]).savefig(tmp_path / "figure.png")
    acceptance_values(["$a$"], [[]], [(0, 0, 1)], metric="$m_$", maximize=True).savefig(tmp_path / "figure.png")
    operations_kept([KeptOperation("$a_$", 1, 0.5, 0.5)]).savefig(tmp_path / "figure.png")
    density_history("fold", {0: [1.0]}, None, name="$loss_$").savefig(tmp_path / "figure.png")


# ---- the comparison


def test_each_arm_has_its_runs_its_mean_and_its_interval():
    values = [[(5, 0.9), (6, 0.8), (6, NAN)], [(5, 0.7)], []]
    means = [(0.85, 0.8, 0.9), (0.7, NAN, NAN), (NAN, NAN, NAN)]
    figure = acceptance_values(ARMS, values, means, metric="val_accuracy", maximize=True)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ARMS
    runs = [line for line in axes.lines if line.get_color() == COLOURS["train"]]
    assert sorted(float(line.get_xdata()[0]) for line in runs) == [0.7, 0.8, 0.9]
    assert len({line.get_marker() for line in runs}) == 2  # a shape a fold
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert [line.get_xdata().tolist() for line in bars] == [[0.8, 0.9]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["fold 5", "fold 6", "mean, 95 % interval"]
    assert axes.get_xlabel() == "val_accuracy (more is better)"
    assert not outside(figure)


def test_differences_stand_beside_the_line_of_no_difference():
    figure = paired_differences(ARMS[:2], [(0.01, -0.01, 0.03), (NAN, NAN, NAN)], metric="val_loss", maximize=False)
    axes = figure.axes[0]
    assert any(line.get_xdata() == [0, 0] for line in axes.lines)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["minus no policy", "minus TrivialAugment"]
    assert "less is better" in axes.get_title()
    assert not outside(figure)


# ---- what was kept


def test_operations_have_a_bar_and_their_means_where_there_are_some():
    given = [KeptOperation("rotate", 7, 0.5, 0.25), KeptOperation("invert", 2, 0.75, NAN)]
    given.append(KeptOperation("blur", 0, NAN, NAN))
    figure = operations_kept(given)
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [7, 2, 0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["rotate", "invert", "blur"]
    means = {line.get_label(): line.get_xdata().tolist() for line in right.lines}
    assert means["probability"] == pytest.approx([0.5, 0.75, NAN], nan_ok=True)
    assert means["magnitude"] == pytest.approx([0.25, NAN, NAN], nan_ok=True)
    assert len({line.get_marker() for line in right.lines}) == 2  # told apart without colours
    assert not outside(figure)


# ---- how they were found


def test_the_best_so_far_of_each_round_is_a_line_and_unchanged_images_another():
    figure = density_history("fold 1", {0: [0.5, NAN, 0.3, 0.4], 1: [0.6, 0.2]}, 0.25, name="loss")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["best, round 1", "best, round 2", "unchanged images"]
    assert lines["best, round 1"].get_xydata().tolist() == [[1, 0.5], [3, 0.3], [4, 0.3], [4, 0.3]]
    assert lines["best, round 2"].get_ydata().tolist() == [0.6, 0.2, 0.2]
    assert set(lines["unchanged images"].get_ydata()) == {0.25}
    assert len({line.get_linestyle() for line in lines.values()}) == 3
    assert not outside(figure)


@pytest.mark.parametrize("values", [[], [NAN], [0.3], [0.1, 1e6, NAN]])
@pytest.mark.parametrize("clean", [None, 0.2])
def test_a_history_of_hardly_anything_can_be_drawn(values, clean, tmp_path):
    density_history("fold 1", {0: values}, clean, name="loss").savefig(tmp_path / "figure.svg")
