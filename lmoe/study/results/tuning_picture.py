"""Pictures of tuning: what each arm scored with each value that was tried."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from lmoe.config.study import MEAN
from lmoe.report.canvas import new_figure
from lmoe.report.loss_picture import MARKERS, OKABE_ITO
from lmoe.study.results.answer import shortened
from lmoe.study.results.pictures import Picture, label
from lmoe.study.results.result import ArmResult, StudyResult, TryResult
from lmoe.study.results.tables import value_said, values_said

COLUMNS = 4
MOST_LINES = 8
"""Combinations of the other keys that have a line of their own."""
CUT = 5.0
"""Distances between the lowest and the middle mean, above which a try is drawn at the upper edge."""
MOST_TICKS = 8
ARM_INCHES = 2.5
TITLE = 32
"""Characters above a panel."""


@dataclass(slots=True, frozen=True)
class Axis:
    """Where the values of a key stand on the x axis.

    Args:
        values: all that were tried, in order.
        numbers: whether they are numbers; others stand beside one another.
        log: whether the axis is logarithmic.
    """

    values: list[Any]
    numbers: bool
    log: bool

    def place(self, value: Any) -> float:
        """Where a value stands on the axis."""
        return float(value) if self.numbers else float(self.values.index(value))


@dataclass(slots=True)
class Line:
    """Tries that differ in the first key alone."""

    text: str
    tries: list[TryResult] = field(default_factory=list)


def tuning_pictures(result: StudyResult) -> list[Picture]:
    """A picture for each key that is the first of an arm's, with a panel for each of these arms on common axes."""
    by_key: dict[str, list[ArmResult]] = {}
    for arm in result.arms:
        if any(found.mean is not None and found.values for found in arm.tries):
            by_key.setdefault(next(iter(arm.tries[0].values)), []).append(arm)
    return [_picture(result, key, arms) for key, arms in by_key.items()]


def _picture(result: StudyResult, key: str, arms: Sequence[ArmResult]) -> Picture:
    lines = {arm.name: _lines(arm, key) for arm in arms}
    texts = list(dict.fromkeys(line.text for of_arm in lines.values() for line in of_arm))
    axis = _axis([found.values[key] for arm in arms for found in arm.tries])
    low, high = _limits([found for arm in arms for found in arm.tries])
    rows = math.ceil(len(arms) / COLUMNS)
    fig = new_figure(1.5 + ARM_INCHES * rows)
    panels = fig.subplots(rows, min(COLUMNS, len(arms)), sharex=True, sharey=True, squeeze=False)
    axes: list[Axes] = list(panels.flat)
    for ax, arm in zip(axes, arms, strict=False):
        for line in lines[arm.name]:
            _draw(ax, key, arm, line, texts, axis, high)
        _dress(ax, arm)
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(arms) - panels.shape[1]) : len(arms)]:
        ax.tick_params(labelbottom=True)
    axes[0].set_ylim(low, high)
    _ticks(axes[0], axis)
    fig.supxlabel(label(key), fontsize=13)
    fig.supylabel(label(_measure(result)), fontsize=13)
    if 1 < len(texts) <= MOST_LINES:
        shown = {text: _look(texts, text) for text in texts}
        handles = [axes[0].plot([], [], **look)[0] for look in shown.values()]
        fig.legend(handles, [label(text, 60) for text in texts], loc="outside upper center", ncols=3, fontsize=11)
    many = f" The {len(texts)} combinations of other keys are not joined by lines." if len(texts) > MOST_LINES else ""
    return Picture(
        title=f"Tuning by {key}",
        caption=(
            f"A panel for each arm, on common axes: {_measure(result)} of each try, its mean over the seeds of tuning, "
            "a faint dot for each seed, and a ring around the chosen one. A triangle at the upper edge stands for a "
            f"try whose loss is higher still; a try with a run that failed is not drawn.{many}"
        ),
        alt=f"Tuning by {key}, a panel for each arm: " + "; ".join(_in_words(arm) for arm in arms) + ".",
        figure=fig,
    )


def _measure(result: StudyResult) -> str:
    """What tuning made small."""
    return "validation loss, mean over domains" if result.metric == MEAN else result.metric


def _dress(ax: Axes, arm: ArmResult) -> None:
    """The title and the frame of a panel."""
    title = f"{label(arm.title, TITLE - 7)} (edge)" if arm.edges else label(arm.title, TITLE)
    ax.set_title(title, fontsize=12)
    ax.grid(True, color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.12)
    ax.tick_params(labelsize=11)


def _lines(arm: ArmResult, key: str) -> list[Line]:
    """The tries of an arm by the values of its other keys."""
    lines: dict[str, Line] = {}
    for found in arm.tries:
        text = values_said({name: value for name, value in found.values.items() if name != key})
        if found.mean is not None:
            lines.setdefault(text, Line(text)).tries.append(found)
    return list(lines.values())


def _axis(tried: Sequence[Any]) -> Axis:
    values = [value for i, value in enumerate(tried) if value not in tried[:i]]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Axis(sorted(values), True, min(values) > 0)
    return Axis(values, False, False)


def _limits(tries: Sequence[TryResult]) -> tuple[float, float]:
    """The y axis: all scores, or those that are not far above the others."""
    means = sorted(found.mean for found in tries if found.mean is not None)
    scores = [score for found in tries for score in found.scores.values()]
    top, bound = max(scores), means[0] + CUT * (median(means) - means[0])
    if means[0] < bound < max(means):
        top = max(score for score in scores if score <= bound)
    bottom = min(scores)
    room = 0.08 * (top - bottom) or 0.01
    return bottom - room, top + room


def _draw(ax: Axes, key: str, arm: ArmResult, line: Line, texts: Sequence[str], axis: Axis, high: float) -> None:
    look = _look(texts, line.text)
    points = sorted((axis.place(found.values[key]), found.mean or 0.0, i) for i, found in enumerate(line.tries))
    ax.plot([x for x, _, _ in points], [mean for _, mean, _ in points], **look)
    for x, mean, i in points:
        found = line.tries[i]
        scores = list(found.scores.values())
        ax.plot([x] * len(scores), scores, "o", color=look["color"], markersize=4, alpha=0.35, markeredgewidth=0)
        if mean > high:
            ax.plot(x, high, "^", color=look["color"], markersize=9, clip_on=False)
        if found.values == arm.chosen:
            ax.plot(x, min(mean, high), "o", color="black", fillstyle="none", markersize=14, clip_on=False)


def _look(texts: Sequence[str], text: str) -> dict[str, Any]:
    """Colour, mark and stroke of a line."""
    number = texts.index(text)
    joined = len(texts) <= MOST_LINES
    return {
        "color": OKABE_ITO[number % len(OKABE_ITO)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 6,
        "linestyle": ("-", "--", "-.", ":")[number % 4] if joined else "none",
        "linewidth": 1.6,
    }


def _ticks(ax: Axes, axis: Axis) -> None:
    """The values that were tried, or of many of them every few."""
    if axis.log:
        ax.set_xscale("log")
    every = math.ceil(len(axis.values) / MOST_TICKS)
    shown = axis.values[::every]
    ax.set_xticks([axis.place(value) for value in shown], [label(value_said(value), 14) for value in shown])
    ax.set_xticks([], minor=True)


def _in_words(arm: ArmResult) -> str:
    means = [(values_said(found.values), found.mean) for found in arm.tries if found.mean is not None]
    best = "nothing chosen" if arm.chosen is None else f"chosen {values_said(arm.chosen)}"
    scores = [mean for _, mean in means]
    return f"{shortened(arm.title)} {min(scores):.4f} to {max(scores):.4f} in {len(scores)} tries, {best}"
