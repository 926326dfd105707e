import math
from itertools import pairwise

import numpy as np
import pytest

from lightning_automl.plots import adapter_outputs

NORMAL = np.diff([0.5 * math.erf((place / 8 - 97 / 16) / math.sqrt(2)) for place in range(98)])


def output(std=1.0, zero_fraction=0.0, shares=NORMAL):
    shares = np.array(shares, float) * (1 - zero_fraction)
    shares[48] += zero_fraction
    histogram = {"shares": shares.tolist(), "below": 0.0, "above": 0.0}
    moments = {"zero_fraction": zero_fraction, "mean": 0.0, "std": std, "skewness": 0.0, "kurtosis": 0.0}
    return moments | {"histogram": histogram}


def layer(name="conv", ratio=0.1, zeros=0.0, gradient=1.0):
    adapter = output(ratio or 0.0) if ratio else output(0.0, 1.0) | {"skewness": None, "kurtosis": None}
    parts = {"block": output(1.0, zeros), "adapter": adapter}
    return {"layer": name, "kind": "Conv2d", "ratio": ratio, "scale": 1.0, "gradient_norm": gradient, **parts}


def rows(ratios, layers=1):
    return [
        {"epoch": at, "layers": [layer(f"layer{number}", ratio) for number in range(layers)]}
        for at, ratio in enumerate(ratios)
    ]


def panels(figure):
    """Those above by column, block and adapter beside each other and the adapter alone, and the two below."""
    *above, ratio, gradient = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    half = len(above) // 2
    return list(zip(above[:half], above[half:], strict=True)), ratio, gradient


def stairs(axes):
    return [patch.get_data() for patch in axes.patches if hasattr(patch, "get_data")]


def test_the_adapter_is_drawn_in_the_units_of_its_block():
    ((beside, alone),), *_ = panels(adapter_outputs(rows([0.1])))
    block, adapter = stairs(beside)
    assert block.edges[[0, -1]] == pytest.approx([-97 / 16, 97 / 16])
    assert adapter.edges == pytest.approx(0.1 * block.edges)
    assert (block.values.max(), adapter.values.max()) == pytest.approx((1, 1))
    (own,) = stairs(alone)
    assert (own.values * np.diff(own.edges)).sum() == pytest.approx(1, abs=1e-3)
    (normal,) = alone.lines
    assert own.values[48] == pytest.approx(normal.get_ydata().max(), rel=0.01)


def test_exact_zeros_are_a_line_and_not_a_part_of_the_bins():
    figure = adapter_outputs([{"epoch": 0, "layers": [layer(zeros=0.6)]}])
    ((beside, _),), *_ = panels(figure)
    assert [line.get_label() for line in beside.lines] == ["zeros of the block"]
    assert stairs(beside)[0].values == pytest.approx(NORMAL / NORMAL.max())
    assert "60 % zeros" in beside.texts[0].get_text()


def test_an_adapter_that_is_zero_is_a_line(tmp_path):
    figure = adapter_outputs(rows([0.0]))
    ((beside, alone),), ratio, _ = panels(figure)
    assert [line.get_label() for line in beside.lines] == ["adapter"]
    assert alone.get_title() == "adapter: constant"
    assert stairs(alone) == list(ratio.lines) == []
    figure.savefig(tmp_path / "zero.png")


@pytest.mark.parametrize(("number", "drawn"), [(1, [0]), (3, [0, 1, 2]), (9, [0, 3, 5, 8]), (30, [0, 10, 19, 29])])
def test_of_many_layers_first_and_last_and_some_between_are_drawn(number, drawn):
    above, ratio, gradient = panels(adapter_outputs(rows([0.1, 0.2], number)))
    assert [beside.get_title().strip() for beside, _ in above] == [f"layer{at}" for at in drawn]
    assert len(ratio.lines) == len(gradient.lines) == number


def test_ratios_are_drawn_over_the_epochs_on_a_scale_that_shows_what_is_usual():
    _, ratio, gradient = panels(adapter_outputs(rows([0.1, 0.0, 0.4])))
    assert ratio.lines[0].get_xydata().tolist() == [[1, 0.1], [3, 0.4]]  # a logarithmic scale has no 0
    assert gradient.lines[0].get_xydata().tolist() == [[1, 1], [2, 1], [3, 1]]
    low, high = ratio.get_ylim()
    assert low < 0.01 < 10 < high


@pytest.mark.parametrize("ratios", [[1e-5, 2e-4], [0.5], [40, 2000]], ids=str)
def test_no_line_runs_through_the_words(ratios):
    figure = adapter_outputs(rows(ratios))
    figure.draw_without_rendering()
    _, axes, _ = panels(figure)
    for text in axes.texts:
        box = text.get_window_extent()
        for line in axes.lines:
            heights = axes.transData.transform(line.get_xydata())[:, 1]
            assert heights.max() < box.y0 or heights.min() > box.y1


def test_what_is_not_known_and_a_run_without_epochs_can_be_drawn(tmp_path):
    unknown = layer() | {"ratio": None, "gradient_norm": None}
    unknown["block"] |= {"skewness": None, "std": None, "mean": None}
    for number, given in enumerate(([], [{"epoch": 0, "layers": [unknown]}])):
        adapter_outputs(given).savefig(tmp_path / f"{number}.png")


def test_texts_of_neighbours_do_not_touch():
    name = "features.denseblock4.denselayer16.conv2"
    figure = adapter_outputs([{"epoch": 0, "layers": [layer(f"{name}.{at}", 0.00123, 0.55) for at in range(9)]}])
    figure.draw_without_rendering()
    above, *_ = panels(figure)
    for row in (0, 1):
        boxes = [
            [axes.title.get_window_extent(), *(text.get_window_extent() for text in axes.texts)]
            for axes in (column[row] for column in above)
        ]
        for left, right in pairwise(boxes):
            assert max(box.x1 for box in left) < min(box.x0 for box in right)
