"""An empty figure of the report's width, drawn by Agg without pyplot or any global state."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 16.0
"""Inches."""

DPI = 100
"""Dots an inch: a picture is 1,600 pixels wide."""


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
