"""Which parameters a study's values hang on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_automl.plots.curves import COLOURS
from lightning_automl.plots.names import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More rows would fill more than a page.
ROWS = 20
#: In print without colours the methods are told apart by their pattern.
METHODS = [(COLOURS["train"], ""), ("#E69F00", "////"), (COLOURS["arch"], "....")]


def parameter_importances(shares: Mapping[str, Mapping[str, float]], title: str = "", rows: int = ROWS) -> "Figure":
    """Draw how much of the differences each parameter explains, one bar a method.

    Args:
        shares: By name of the method, shares in [0, 1] by name of the parameter; a method may lack parameters.
        title: Of the figure.
        rows: Of more parameters than these only the most important are drawn, and the title says so.

    Returns:
        The figure, the most important parameter on top: by the first method, then by the next.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for own in shares.values() for name in own))
    names.sort(key=lambda name: [-own.get(name, 0.0) for own in shares.values()])
    drawn = names[:rows]
    figure = Figure(figsize=(4.5, 1.2 + (0.2 + 0.16 * len(shares)) * max(len(drawn), 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(shares), 1)
    for index, (method, own) in enumerate(shares.items()):
        places = [row - 0.4 + (index + 0.5) * height for row in range(len(drawn))]
        colour, hatch = METHODS[index % len(METHODS)]
        widths = [own.get(name, 0.0) for name in drawn]
        axes.barh(
            places, widths, height=height, label=method, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6
        )
        for place, name in zip(places, drawn, strict=True):
            text = f"{own[name]:.2f}" if name in own else "not in every trial"
            axes.text(own.get(name, 0.0) + 0.01, place, text, va="center", fontsize=7.5)
    # A dollar sign in a name is no formula.
    axes.set_yticks(range(len(drawn)), labels=[shorten(name) for name in drawn], fontsize=9, parse_math=False)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set(xlabel="share", xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    if len(names) > rows:
        title += f"{', ' * bool(title)}the {rows} most important of {len(names)} parameters"
    axes.set_title(title, fontsize=10, parse_math=False)
    if shares:
        figure.legend(loc="outside upper right", ncols=len(shares), frameon=False, fontsize=9)
    return figure
