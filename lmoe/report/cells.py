"""Cells of a heat map, and what is written into them and beside them."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize

from lmoe.report.canvas import plain

Ticks = Sequence[tuple[float, str]]
"""(position, label) of what has a label."""

ABSENT = math.nan
ROW_INCHES = 0.42
MIN_CELL_INCHES, MIN_ROW_INCHES = 0.38, 0.3
"""Narrower and lower cells carry no number."""


def draw_cells(ax: Axes, values: Sequence[Sequence[float]], colours: Colormap, scale: Normalize) -> None:
    """One cell a value, the first row on top; what is absent shows the hatched ground."""
    ax.patch.set(facecolor="white", edgecolor="0.6", hatch="////")
    few = len(values) * len(values[0]) <= 2000
    ax.pcolormesh(values, cmap=colours, norm=scale, edgecolors="white" if few else "none", linewidth=0.8)
    ax.invert_yaxis()
    ax.tick_params(length=0)


def write_cell(ax: Axes, column: int, row: int, text: str, background: tuple[float, float, float, float]) -> None:
    red, green, blue, _ = background
    colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
    ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=11, color=colour, in_layout=False)


def label_rows(ax: Axes, ticks: Ticks) -> None:
    ax.set_yticks([place for place, _ in ticks], [plain(label) for _, label in ticks], fontsize=12)
