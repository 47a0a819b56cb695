"""Bars of the ratio to the reference, split into the parts of a step."""

from dataclasses import dataclass
from pathlib import Path

from lmoe.report.canvas import new_figure

COLOURS = {
    "lmoe": "#1b6ca8",
    "eulerforge": "#d1603d",
    "mixlora": "#c99a2e",
    "peft xlora": "#8a5a9e",
    "peft": "#7a8b8b",
}
FLOOR = "#c8c8c8"


@dataclass(slots=True, frozen=True, kw_only=True)
class Bar:
    """One contestant.

    Args:
        ratio: length of the bar.
        parts: milliseconds, which split it.
    """

    group: str
    name: str
    ratio: float
    parts: tuple[float, ...]


def draw(bars: list[Bar], parts: tuple[str, ...], *, title: str, reference: str, path: Path) -> None:
    """Write a PNG; the first part is solid, the others are lighter; `reference` says what the ratio is to."""
    several = len({bar.group for bar in bars}) > 1
    labels = [f"{bar.name}   [{bar.group}]" if several else bar.name for bar in bars]
    fig = new_figure(1.6 + 0.32 * len(bars))
    axes = fig.subplots()
    for place, bar in enumerate(bars):
        colour = next((shade for family, shade in COLOURS.items() if bar.name.startswith(family)), FLOOR)
        left = 0.0
        for number, milliseconds in enumerate(bar.parts):
            width = bar.ratio * milliseconds / sum(bar.parts)
            axes.barh(place, width, left=left, color=colour, alpha=0.45 if number else 1.0)
            left += width
        axes.text(left, place, f" {bar.ratio:.2f}", va="center", fontsize=10)
    axes.set_yticks(range(len(bars)), labels, fontsize=10)
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.2", linewidth=1, linestyle="--")
    axes.set_xlabel(f"time over that of {reference} ({parts[0]}; {', '.join(parts[1:])} lighter)")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)
