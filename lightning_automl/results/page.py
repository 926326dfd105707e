"""What a page is made of, and how it becomes one HTML file."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_automl.rundir import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Pictures:
    """Figures as SVG, side by side where there is room, with captions where these are given."""

    svgs: Sequence[str]
    captions: Sequence[str] = ()
    kind: str = field(default="pictures", init=False)


@dataclass(frozen=True)
class Gallery:
    """Images, each an address that holds its own data, with a caption and whether to show its pixels as squares."""

    images: Sequence[tuple[str, str, bool]]
    kind: str = field(default="gallery", init=False)


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    sentences: Sequence[str]
    kind: str = field(default="notes", init=False)


@dataclass(frozen=True)
class Commands:
    """Lines for a terminal."""

    lines: Sequence[str]
    kind: str = field(default="commands", init=False)


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Folded:
    """A table that is shown on a click on its summary."""

    summary: str
    table: Table
    kind: str = field(default="folded", init=False)


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    title: str
    blocks: Sequence[Table | Pictures | Gallery | Notes | Commands | Text | Folded]


def pictures(**figures: "Figure") -> Pictures:
    """Figures as SVG, the same text for the same figures.

    Args:
        figures: By a name unlike that of all others of the page, since the names of parts within are made from it.
    """
    svgs = []
    for name, figure in figures.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            svg = _svg(name, figure)
        if any("missing from font" in str(each.message) for each in told):
            # The reader's browser has fonts for what matplotlib's own does not contain, as Chinese names.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*missing from font")
                svg = _svg(name, figure, font="none")
        svgs.append(svg)
    return Pictures(svgs)


def _svg(name: str, figure: "Figure", font: str = "path") -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": font}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_page(path: Path, title: str, verdict: Sequence[str], sections: Sequence[Section]) -> None:
    """Write a page atomically.

    Args:
        path: The HTML file.
        title: Its heading.
        verdict: The sentences below the heading.
        sections: What follows.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lightning_automl.results", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    write_text(path, template.render(title=title, verdict=verdict, sections=sections))
