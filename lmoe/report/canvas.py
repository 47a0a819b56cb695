"""An empty figure of the report's width, drawn without pyplot or any lasting global state, and its bytes."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 16.0
"""Inches."""

DPI = 100
"""Dots an inch: a picture is 1,600 pixels wide."""

MOST_DOMAINS = 40
"""Domains that a picture draws, the first ones."""


def new_figure(height: float) -> Figure:
    """An empty figure, `height` inches tall."""
    fig = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def note(message: str) -> Figure:
    """A figure that says why there is nothing to see."""
    fig = new_figure(2.0)
    fig.text(0.5, 0.5, message, ha="center", va="center", fontsize=16, color="0.3")
    return fig


def plain(text: str) -> str:
    """Text from a user in which dollar signs do not start a formula."""
    return text.replace("$", r"\$")


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    content = io.BytesIO()
    with _boxes_for_missing_glyphs():
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG, the same bytes each time, whose text is drawn as shapes so that it needs no fonts."""
    content = io.BytesIO()
    with _boxes_for_missing_glyphs(), rc_context({"svg.hashsalt": "lmoe", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None, "Creator": None})
    return content.getvalue()


@contextmanager
def _boxes_for_missing_glyphs() -> Iterator[None]:
    """A name may use a script that the bundled font lacks; boxes in a label are no reason to fail."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield
