from types import SimpleNamespace

import numpy as np
import pytest

from lightning_automl.metrics import reliability
from lightning_automl.plots import (
    class_counts,
    class_recall,
    confusion_matrix,
    learning_curves,
    reliability_diagram,
)
from lightning_automl.plots.names import LONGEST, shorten

ROWS = [
    {"epoch": 0, "train_loss": 2.0, "val_loss": 1.5, "val_accuracy": 0.5},
    {"epoch": 1, "train_loss": 1.0},
    {"epoch": 2, "train_loss": 0.5, "val_loss": 0.7, "val_accuracy": 0.8},
]


def test_curves_have_a_panel_a_metric_and_a_line_a_stage():
    loss, accuracy = learning_curves(ROWS).axes
    assert [line.get_label() for line in loss.lines] == ["train", "val"]
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.0], [3, 0.5]]
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 0.5], [3, 0.8]]


def test_curves_of_a_run_without_epochs_can_be_drawn(tmp_path):
    learning_curves([]).savefig(tmp_path / "empty.png")


@pytest.mark.parametrize("classes", [2, 40])
def test_confusion_shows_shares_of_the_true_class(classes, tmp_path):
    counts = np.eye(classes, dtype=int) * 3
    counts[0, 1] = 1
    figure = confusion_matrix(counts, [f"class {index}" for index in range(classes)])
    picture = figure.axes[0].images[0].get_array()
    assert picture[0].tolist()[:2] == [0.75, 0.25]
    assert [text.get_text() for text in figure.axes[0].texts] == (["3", "1", "3"] if classes == 2 else [])
    figure.savefig(tmp_path / "confusion.png")


def test_stages_differ_in_print_without_colours():
    lines = learning_curves(ROWS).axes[0].lines
    assert len({line.get_linestyle() for line in lines}) == len(lines) == 2


LONG = ["basal cell carcinoma, superficial type of the head", "basal cell carcinoma, nodular type, $other$ and $"]


def label_texts(ticks):
    return [label.get_text() for label in ticks]


def outside(figure):
    """Texts that the picture cuts off, in points of it."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = {text: text.get_window_extent() for axes in figure.axes for text in axes.texts + axes.get_yticklabels()}
    return [text for text, box in boxes.items() if min(box.x0, box.y0, width - box.x1, height - box.y1) < 0]


def test_long_names_lose_their_middle_and_short_ones_nothing():
    assert shorten("x" * LONGEST) == "x" * LONGEST
    first, second = (shorten(name) for name in LONG)
    assert first != second
    assert all(len(name) == LONGEST for name in (first, second))
    assert first.startswith("basal cell")
    assert first.endswith("f the head")


def test_a_dollar_sign_in_a_name_is_no_formula():
    names, one = ["a $x$", "b $"], np.ones(2)
    for figure in (
        class_recall(names, one, one, one, one),
        class_counts(names, {"train": one}),
        confusion_matrix(np.eye(2, dtype=int), names),
    ):
        assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())


def test_long_names_leave_room_for_the_confusion_matrix():
    figure = confusion_matrix(np.array([[900, 80], [3, 17]]), LONG)
    assert not outside(figure)
    assert figure.axes[0].get_window_extent().width > 0.4 * figure.bbox.width


@pytest.mark.parametrize("equal_mass", [False, True])
def test_a_reliability_diagram_has_a_point_and_two_bars_for_each_bin_with_images(equal_mass, tmp_path):
    generator = np.random.default_rng(0)
    table = reliability(generator.dirichlet(np.ones(4), 80), generator.integers(4, size=80), equal_mass=equal_mass)
    filled = table.counts > 0
    figure = reliability_diagram(table)
    above, below = figure.axes
    (points,) = [line for line in above.lines if line.get_label() == "measured"]
    assert points.get_xydata() == pytest.approx(np.stack([table.confidence, table.accuracy], 1)[filled])
    assert [bar.get_height() for bar in above.patches] == pytest.approx(table.accuracy[filled].tolist())
    assert [bar.get_x() for bar in below.patches] == pytest.approx(table.lower[filled].tolist())
    assert [bar.get_height() for bar in below.patches] == table.counts[filled].tolist()
    figure.savefig(tmp_path / "reliability.png")


def test_a_reliability_diagram_needs_only_the_columns_of_a_table():
    columns = {name: np.array([0.5]) for name in ("lower", "upper", "confidence", "accuracy")}
    assert len(reliability_diagram(SimpleNamespace(**columns, counts=np.array([3]))).axes) == 2


def test_recall_has_a_dot_an_interval_and_a_number_of_images_a_class():
    axes = class_recall(["cat", "dog"], [0.5, 0.75], [0.1, 0.4], [0.9, 1.0], [4, 8]).axes[0]
    assert label_texts(axes.get_yticklabels()) == ["cat, n=4", "dog, n=8"]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[0.1, 0], [0.9, 0]], [[0.5, 0]], [[0.4, 1], [1.0, 1]], [[0.75, 1]]]
    low, high = axes.get_ylim()
    assert low > 1 > 0 > high  # the first class stands at the top


def test_a_class_without_images_keeps_its_row_and_has_no_dot():
    nan = float("nan")
    axes = class_recall(["cat", "dog"], [nan, 1.0], [0, 0.2], [1, 1], [0, 3]).axes[0]
    assert label_texts(axes.get_yticklabels()) == ["cat, n=0", "dog, n=3"]
    assert {line.get_ydata()[0] for line in axes.lines} == {1}


def test_of_many_classes_the_worst_are_drawn_and_the_title_says_so():
    recall = np.random.default_rng(0).permutation(100) / 100
    recall[7] = np.nan
    names = [f"class {index}" for index in range(100)]
    axes = class_recall(names, recall, recall, recall, np.arange(100), rows=5).axes[0]
    worst = sorted(set(range(100)) - {7}, key=lambda index: recall[index])[:5]
    assert label_texts(axes.get_yticklabels()) == [f"class {index}, n={index}" for index in worst]
    assert axes.get_title() == "the 5 worst of 100 classes"
    assert class_recall(names[:5], *[recall[:5]] * 3, np.arange(5), rows=5).axes[0].get_title() == ""


def test_counts_have_a_bar_a_split_behind_each_other_and_their_numbers():
    figure = class_counts(["cat", "dog"], {"train": [80, 7], "val": [10, 1], "test": [10, 2]})
    axes = figure.axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
        (0, 80),
        (0, 7),
        (80, 10),
        (7, 1),
        (90, 10),
        (8, 2),
    ]
    assert [text.get_text() for text in axes.texts] == ["80 + 10 + 10", "7 + 1 + 2"]
    assert label_texts(figure.legends[0].texts) == ["train", "val", "test"]
    assert len({bar.get_hatch() for bar in axes.patches}) == 3


def test_of_many_classes_the_smallest_are_drawn():
    counts = np.random.default_rng(0).permutation(50)
    names = [f"class {index}" for index in range(50)]
    axes = class_counts(names, {"train": counts, "val": counts * 0}, rows=3).axes[0]
    assert label_texts(axes.get_yticklabels()) == [f"class {np.flatnonzero(counts == n)[0]}" for n in range(3)]
    assert axes.get_title() == "the 3 smallest of 50 classes"


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_nothing_is_cut_off_however_many_classes_and_images(classes, tmp_path):
    names = [f"{LONG[index % 2]} {index}" for index in range(classes)]
    counts = np.arange(classes) * 1000
    recall = np.linspace(0, 1, classes)
    splits = {"train": counts * 10, "val": counts, "test": counts}
    for figure in (class_recall(names, recall, recall, recall, counts), class_counts(names, splits)):
        assert not outside(figure)
        assert figure.axes[0].get_window_extent().width > 0.25 * figure.bbox.width
        figure.savefig(tmp_path / "classes.png")
