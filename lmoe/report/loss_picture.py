"""Loss curves: training, validation, validation by domain, and where phases begin."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, islice
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lmoe.report.canvas import MOST_DOMAINS, new_figure, note, plain
from lmoe.report.curve_pieces import Points, finite, measure_breaks, measure_changes, parted
from lmoe.report.curves import Curves, domain_losses
from lmoe.vocabulary import NATS

OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#000000"]
"""Colours that remain apart for colour-blind readers (Okabe and Ito 2008; its yellow darkened, for white paper)."""

MARKERS = "os^DvPX*"
LABEL_INCHES = 0.21
"""Height of one label at the end of a curve."""


def loss_curves(
    metrics: Curves,
    phases: Mapping[str, int],
    max_steps: int,
    measure: str = NATS,
    *,
    unit: str = "label token",
    phase_measures: Mapping[str, str] = MappingProxyType({}),
) -> Figure:
    """Left: training and validation loss. Right: validation loss of each domain, of very many the first ones.

    Args:
        measure, unit: of the objective.
        phase_measures: of each phase, where they differ: a curve is broken where the measure changes.
    """
    train, val = finite(metrics.get("train/loss", [])), finite(metrics.get("val/loss", []))
    every = {domain: points for domain, values in domain_losses(metrics).items() if (points := finite(values))}
    domains = dict(islice(every.items(), MOST_DOMAINS))
    if not (train or val or domains):
        return note("No loss was logged.")
    last = max(1, max_steps, *(points[-1][0] for points in (train, val, *domains.values()) if points))
    height = max(7.0, 2.0 + LABEL_INCHES * len(domains))
    fig = new_figure(height)
    breaks = measure_breaks(phases, phase_measures)
    everything = "all phases" if breaks else "all tokens" if unit == "label token" else f"all {unit}s"
    columns = [bool(train or val), bool(domains)]
    axes = fig.subplots(1, sum(columns), squeeze=False)[0]
    if columns[0]:
        _draw_overall(axes[0], train, val, breaks, everything)
    if columns[1]:
        shown = "domain" if len(domains) == len(every) else f"domain, the first {len(domains)} of {len(every)}"
        _draw_domains(axes[-1], domains, height - 2.0, last, breaks)
        axes[-1].set_title(f"Validation loss by {shown}", fontsize=15, pad=40)
    shown_measure = plain("; ".join(measure_changes(phases, phase_measures))) if breaks else measure
    for ax in axes:
        _draw_phases(ax, phases, last)
        ax.set_xlim(-0.01 * last, 1.01 * last)
        ax.set_xlabel("optimizer step", fontsize=13)
        ax.set_ylabel(shown_measure, fontsize=13)
        ax.tick_params(labelsize=12)
        ax.grid(True, color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def smooth(points: Points) -> list[tuple[int, float]]:
    """Centred mean over about a fifteenth of the curve; the window shrinks at both ends.

    NOTE sums up to each point are exact: in floats a loss of 1e20 would take the digits of all that come after it.
    """
    half = max(1, len(points) // 30)
    sums = [Fraction(0), *accumulate(Fraction(value) for _, value in points)]
    result = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        begin, end = i - reach, i + reach + 1
        result.append((step, float((sums[end] - sums[begin]) / (end - begin))))
    return result


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order of `wanted` and near it.

    Neighbours that are too close merge into a block around the mean of what they wanted.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, list[int]]] = []
    for i in order:
        centre, members = wanted[i], [i]
        while blocks and centre - gap * len(members) / 2 < blocks[-1][0] + gap * len(blocks[-1][1]) / 2:
            _, before = blocks.pop()
            members = before + members
            centre = sum(wanted[j] for j in members) / len(members)
        blocks.append((centre, members))
    placed = [0.0] * len(wanted)
    for centre, members in blocks:
        for rank, j in enumerate(members):
            placed[j] = centre + gap * (rank - (len(members) - 1) / 2)
    return placed


def _draw_overall(ax: Axes, train: Points, val: Points, breaks: Sequence[int], everything: str) -> None:
    for number, piece in enumerate(parted(train, breaks)):
        hidden = "_" * (number > 0)  # from the legend
        ax.plot(*_xy(piece), color="#56B4E9", linewidth=0.9, alpha=0.8, label=f"{hidden}training, each step")
        ax.plot(*_xy(smooth(piece)), color="#0072B2", linewidth=2.4, label=f"{hidden}training, smoothed")
    for number, piece in enumerate(parted(val, breaks)):
        label = f"{'_' * (number > 0)}validation, {everything}"
        ax.plot(*_xy(piece), color="#D55E00", linewidth=2, marker="o", markersize=8, label=label)
    if val and val[0][0] == 0:
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate("adapters off", val[0], (9, 0), textcoords="offset points", va="center", fontsize=11, bbox=ground)
    ax.set_title("Training and validation loss", fontsize=15, pad=40)
    ax.legend(fontsize=12, frameon=False, loc="upper right")


def _draw_domains(ax: Axes, domains: Mapping[str, Points], inches: float, last: int, breaks: Sequence[int]) -> None:
    for i, points in enumerate(domains.values()):
        colour, marker = OKABE_ITO[i % 8], MARKERS[(i + i // 8) % 8]
        for piece in parted(points, breaks):
            ax.plot(*_xy(piece), color=colour, linewidth=1.8, marker=marker, markersize=7)
    ends = [points[-1] for points in domains.values()]
    low, high = ax.get_ylim()
    places = spread([value for _, value in ends], gap=(high - low) * LABEL_INCHES / inches)
    for name, (_, value), place in zip(domains, ends, places, strict=True):
        ax.text(1.05 * last, place, plain(f"{name}  {value:.2f}"), color="0.1", fontsize=12, va="center")
    # NOTE the arrows of annotations are cut off at their texts, which takes longer than all else of the picture.
    leads = [(end, (1.04 * last, place)) for end, place in zip(ends, places, strict=True)]
    ax.add_collection(LineCollection(leads, colors=OKABE_ITO, linewidths=1.5, clip_on=False), autolim=False)
    ax.set_ylim(min(low, *places), max(high, *places))


def _draw_phases(ax: Axes, phases: Mapping[str, int], last: int) -> None:
    """A dashed line where a later phase begins; names above the axes, on two levels so that short phases fit."""
    for i, (name, start) in enumerate(phases.items()):
        level = 1.0 + 0.045 * (1 - i % 2) * (len(phases) > 1)
        text = name if start == 0 else f"{name} after step {start:,}"
        late = start > 0.6 * last
        ax.text(
            start, level, plain(f" {text} "), transform=ax.get_xaxis_transform(), fontsize=11, color="0.25",
            ha="right" if late else "left", va="bottom",
        )  # fmt: skip
        if start > 0:
            ax.axvline(start, color="0.35", linestyle="--", linewidth=1.3, label=f"_phase {name}")


def _xy(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
