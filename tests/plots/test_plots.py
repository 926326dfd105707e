import numpy as np
import pytest

from lightning_automl.plots import confusion_matrix, learning_curves

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
