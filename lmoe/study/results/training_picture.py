"""Pictures of training: the loss of each arm against what its training took."""

import math
from collections.abc import Callable, Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from matplotlib.typing import LineStyleType

from lmoe.report.canvas import new_figure
from lmoe.report.loss_picture import OKABE_ITO
from lmoe.study.results.answer import shortened
from lmoe.study.results.pictures import Picture, label
from lmoe.study.results.result import ArmResult, StudyResult
from lmoe.study.results.tables import reading_note

STROKES: tuple[LineStyleType, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
"""Of eight arms each, so that arms of one colour are told apart."""
FIRST = 4
"""A quarter of a curve is what a run begins with, whose high losses the axis leaves out."""
CUT = 4.0
"""Distances between the lowest and the middle of what the arms have behind that, above which an arm is cut."""
LEGEND_INCHES = 0.3
COSTS: dict[str, Callable[[ArmResult], float | None]] = {
    "optimizer steps": lambda arm: 1.0,
    "tokens": lambda arm: arm.tokens_per_step,
    "seconds, alone on the machine": lambda arm: arm.seconds_per_step,
    "FLOPs, forward and backward, by count": lambda arm: (
        None if arm.tokens_per_step is None else arm.tokens_per_step * arm.flops_per_token
    ),
}
"""What a step takes, by the name of the axis; None: not measured."""


def training_picture(result: StudyResult, arms: Sequence[ArmResult], title: str) -> Picture | None:
    """The training loss of each arm against steps, tokens, seconds and FLOPs; None: no arm has a curve.

    Args:
        result: whose arms each have a look of their own, the same in all pictures.
        arms: of it, or those with longer runs.
        title: of the picture.
    """
    drawn = sorted((arm for arm in arms if _finite(arm)), key=lambda arm: _finite(arm)[-1][1])
    if not drawn:
        return None
    looks: dict[str, tuple[str, LineStyleType]] = {
        arm.name: (OKABE_ITO[i % 8], STROKES[i // 8 % 4]) for i, arm in enumerate(result.arms)
    }
    costs = {name: cost for name, cost in COSTS.items() if any(cost(arm) is not None for arm in drawn)}
    fig = new_figure(max(4.5 * math.ceil(len(costs) / 2), 1.0 + LEGEND_INCHES * len(drawn)))
    panels = fig.subplots(math.ceil(len(costs) / 2), min(2, len(costs)), sharey=True, squeeze=False)
    axes: list[Axes] = list(panels.flat)
    for ax, (name, cost) in zip(axes, costs.items(), strict=False):
        _draw(ax, drawn, cost, looks)
        ax.set_xlabel(name, fontsize=13)
    for ax in axes[len(costs) :]:
        ax.set_visible(False)
    axes[0].set_ylim(*_limits(drawn))
    fig.supylabel("training loss, nats per label token", fontsize=13)
    handles = [Line2D([], [], color=looks[arm.name][0], linestyle=looks[arm.name][1], linewidth=2) for arm in drawn]
    names = [label(arm.title, 34) + f"  {_finite(arm)[-1][1]:.3f}" for arm in drawn]
    fig.legend(handles, names, loc="outside right center", fontsize=12, frameon=False, handlelength=3)
    ends = "; ".join(f"{shortened(arm.title)} {_finite(arm)[0][1]:.3f} to {_finite(arm)[-1][1]:.3f}" for arm in drawn)
    return Picture(
        title=title,
        caption=(
            "Mean over the judged seeds, each point the mean of the steps since the one before; in the legend the arm "
            "with the lowest last loss first. The axis leaves out the high losses that a run begins with."
            + "".join(f" {text}." for text in _absent(arms, drawn))
        ),
        alt=f"{title} against {', '.join(costs)}. From the first to the last point: {ends}.",
        figure=fig,
    )


def _absent(arms: Sequence[ArmResult], drawn: Sequence[ArmResult]) -> list[str]:
    """Which arms are not drawn, in all panels or in one of them, and what the FLOPs of others lack."""
    absent = []
    if without := [arm for arm in arms if arm not in drawn]:
        absent.append(f"Without a curve: {_titles(without)}")
    for name, cost in COSTS.items():
        if missing := [arm for arm in drawn if cost(arm) is None]:
            who = "any arm" if len(missing) == len(drawn) else _titles(missing)
            what = name.partition(",")[0]
            absent.append(f"{what[0].upper()}{what[1:]} not measured of {who}")
    if note := reading_note([arm for arm in drawn if arm.tokens_per_step is not None]):
        absent.append(f"{note[0].upper()}{note[1:]}")
    return absent


def _draw(
    ax: Axes,
    arms: Sequence[ArmResult],
    cost: Callable[[ArmResult], float | None],
    looks: dict[str, tuple[str, LineStyleType]],
) -> None:
    for arm in arms:
        if (a_step := cost(arm)) is not None:
            points = _finite(arm)
            colour, stroke = looks[arm.name]
            steps, losses = [step * a_step for step, _ in points], [loss for _, loss in points]
            mark = "o" if len(points) == 1 else "none"
            ax.plot(steps, losses, color=colour, linestyle=stroke, linewidth=1.8, marker=mark)
    ax.grid(True, color="0.9")
    ax.set_axisbelow(True)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.tick_params(labelsize=12)
    ax.tick_params(axis="y", labelleft=True)
    ax.spines[["top", "right"]].set_visible(False)


def _limits(arms: Sequence[ArmResult]) -> tuple[float, float]:
    """The y axis: what the arms have behind the first quarter of their curves, but for one far above the others."""
    behind = [[loss for _, loss in _finite(arm)] for arm in arms]
    behind = [losses[len(losses) // FIRST :] for losses in behind]
    low, highest = min(map(min, behind)), sorted(map(max, behind))
    bound = low + CUT * (median(highest) - low)
    top = max((loss for loss in highest if loss <= bound), default=highest[-1])
    room = 0.04 * (top - low) or 0.01
    return low - room, top + room


def _finite(arm: ArmResult) -> list[tuple[int, float]]:
    if arm.curve is None:
        return []
    pairs = zip(arm.curve.steps, arm.curve.loss, strict=True)
    return [(step, loss) for step, loss in pairs if loss is not None and math.isfinite(loss)]


def _titles(arms: Sequence[ArmResult]) -> str:
    return ", ".join(shortened(arm.title) for arm in arms)
