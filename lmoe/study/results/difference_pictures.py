"""Pictures of the differences to the baseline: a line an arm with its interval, and a map of arms and domains."""

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from lmoe.report.canvas import new_figure
from lmoe.report.cells import ABSENT, MIN_CELL_INCHES, ROW_INCHES, draw_cells, label_rows, write_cell
from lmoe.report.wording import counted
from lmoe.statistics.verdict import Verdict
from lmoe.study.results.answer import best_first, shortened, verdict_as_tuned, within_margin
from lmoe.study.results.pictures import Picture, label
from lmoe.study.results.result import EDGE, ComparisonResult, StudyResult
from lmoe.study.results.tables import is_decided, level_text

LOOKS = {
    Verdict.BETTER: ("#0072B2", "o"),
    Verdict.WORSE: ("#D55E00", "s"),
    Verdict.EQUIVALENT: ("#009E73", "D"),
    Verdict.UNDECIDED: ("0.4", "o"),
    Verdict.TOO_FEW_SEEDS: ("0.4", "o"),
}
"""Colour and mark of a verdict; told apart by the text beside them as well."""
WORDS = {Verdict.UNDECIDED: "cannot be told"}
NEAR = 5
"""Margins on each side of 0 that the second panel shows."""
FAR = 12
"""Margins from 0 from which a difference hides the others, so that there is a second panel."""
LINE_INCHES = 0.36
MOST_LEVEL = 8
"""Domains whose names stand level."""
COLOURS = colormaps["RdBu_r"]
CLEAR_SHARE = 0.9
"""Share of the differences that the colours of the map tell apart; those beyond have the outermost colour."""


def difference_picture(result: StudyResult, comparisons: Sequence[ComparisonResult], title: str) -> Picture | None:
    """A line for each arm, best first: the difference to the baseline, its interval, each seed; None: no arm.

    Args:
        comparisons: with the baseline, on the mean over domains.
        title: of the picture.
    """
    ordered = best_first(comparisons)
    if not ordered:
        return None
    near = NEAR * result.margin
    reach = max(abs(value) for found in ordered for value in _values(found))
    zoomed = reach > FAR * result.margin and any(abs(found.estimate) < near for found in ordered)
    fig = new_figure(1.6 + LINE_INCHES * len(ordered))
    axes = list(fig.subplots(1, 2 if zoomed else 1, sharey=True, squeeze=False)[0])
    for ax in axes:
        _draw_differences(ax, result, ordered)
    if zoomed:
        axes[0].set_title("all", fontsize=13)
        _zoom(axes[1], result, ordered, near)
    axes[0].set_yticks(range(len(ordered)), [label(result.arm(found.arm).title) for found in ordered], fontsize=12)
    _write_verdicts(axes[-1], [f"{found.estimate:+.4f}  {_said(result, found)}" for found in ordered])
    baseline = label(result.arm(result.baseline).title)
    fig.supxlabel(f"loss less that of {baseline}, nats per label token: below 0 is better", fontsize=13)
    several = any(found.low is not None for found in ordered)
    shown = (
        f", its {level_text(result)} interval, and a small dot for each seed"
        if several
        else ", of one seed, so without an interval"
    )
    return Picture(
        title=title,
        caption=(
            f"Each line is an arm, the best first: the difference of its loss to that of {_title(result)}{shown}. The "
            f"band is the margin of {result.margin:g} on both sides of 0, within which arms are equivalent. A verdict "
            "is adjusted for the number of arms, an interval is not. An open mark: a best value is the outermost tried."
        ),
        alt=f"{title}, the best first: " + "; ".join(_in_words(result, found) for found in ordered) + ".",
        figure=fig,
    )


def domain_picture(result: StudyResult) -> Picture | None:
    """A map of the difference of each arm in each domain of the mean; None: there are no comparisons by domain."""
    domains = list(result.domains)
    by_place = {(found.arm, str(found.domain)): found for found in result.secondary if found.domain in domains}
    total = {found.arm: found.estimate for found in result.primary}
    arms = sorted({arm for arm, _ in by_place}, key=lambda arm: total.get(arm, 0.0))
    if not by_place:
        return None
    sizes = sorted(abs(found.estimate) for found in by_place.values())
    bound = max(sizes[math.ceil(CLEAR_SHARE * len(sizes)) - 1], result.margin) or 1.0
    scale = Normalize(-bound, bound)
    fig = new_figure(max(3.0, 2.2 + ROW_INCHES * len(arms)))
    ax = fig.add_subplot()
    estimates = [[by_place[a, d].estimate if (a, d) in by_place else ABSENT for d in domains] for a in arms]
    draw_cells(ax, estimates, COLOURS, scale)
    wide = 10.0 / len(domains) >= 1.5 * MIN_CELL_INCHES
    for row, arm in enumerate(arms):
        for column, domain in enumerate(domains):
            found = by_place.get((arm, domain))
            if found is not None:
                star = "*" if is_decided(result, found) else ""
                text = f"{found.estimate:+.3f}{star}" if wide else star
                write_cell(ax, column, row, text, COLOURS(scale(found.estimate)))
    turned = 90 if len(domains) > MOST_LEVEL else 0
    ax.set_xticks(
        [i + 0.5 for i in range(len(domains))], [label(name, 24) for name in domains], fontsize=12, rotation=turned
    )
    label_rows(ax, [])
    ax.set_yticks([i + 0.5 for i in range(len(arms))], [label(result.arm(arm).title) for arm in arms], fontsize=12)
    beyond = "both" if sizes[-1] > bound else "neither"
    bar = fig.colorbar(ScalarMappable(scale, COLOURS), ax=ax, extend=beyond, pad=0.01, fraction=0.03, aspect=25)
    bar.set_label("difference, nats per label token", fontsize=12)
    decided = [found for found in best_first(list(by_place.values())) if is_decided(result, found)]
    said = "; ".join(f"{shortened(result.arm(f.arm).title)} in {f.domain} {f.estimate:+.4f}" for f in decided)
    comparisons = counted(len(by_place), "comparison")
    shown = f"in {len(decided)} of {comparisons}: {said}" if decided else f"in none of {comparisons}"
    baseline = _title(result)
    arms_and_domains = f"{counted(len(arms), 'arm')} to {baseline} in {counted(len(domains), 'domain')}"
    return Picture(
        title="Differences by domain, secondary",
        caption=(
            f"The difference of each arm to {baseline} in each domain: blue is better, red is worse; * where a "
            "difference was shown. All cells are one family, apart from the comparisons above."
        ),
        alt=f"Difference of {arms_and_domains}, of which a difference was shown {shown}.",
        figure=fig,
    )


def _draw_differences(ax: Axes, result: StudyResult, ordered: Sequence[ComparisonResult]) -> None:
    ax.axvspan(-result.margin, result.margin, color="0.92", zorder=0)
    ax.axvline(0.0, color="0.3", linewidth=1.2, zorder=1)
    for row, found in enumerate(ordered):
        colour, mark = LOOKS[verdict_as_tuned(result, found)]
        if found.low is not None and found.high is not None:
            ax.plot([found.low, found.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt", zorder=2)
        seeds = found.by_seed if len(found.by_seed) > 1 else []
        ax.plot(seeds, [row + 0.24] * len(seeds), "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
        fill = "white" if found.verdict == EDGE else colour
        ax.plot(found.estimate, row, mark, color=colour, markerfacecolor=fill, markersize=8, zorder=3)
    ax.set_ylim(len(ordered) - 0.4, -0.6)
    ax.grid(True, axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=12)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _write_verdicts(ax: Axes, texts: Sequence[str]) -> None:
    """A text at the right of each line."""
    right = ax.twinx()
    right.set_ylim(ax.get_ylim())
    right.set_yticks(range(len(texts)), texts)
    right.tick_params(length=0, labelsize=12)
    right.spines[:].set_visible(False)


def _zoom(ax: Axes, result: StudyResult, ordered: Sequence[ComparisonResult], near: float) -> None:
    """Show what is near 0 alone, with an arrow to each difference that is not."""
    ax.set_title(f"near 0: an arrow points to what lies farther than {near:g}", fontsize=13)
    ax.set_xlim(-near, near)
    for row, found in enumerate(ordered):
        if abs(found.estimate) > near:
            colour, _ = LOOKS[verdict_as_tuned(result, found)]
            side = math.copysign(0.97 * near, found.estimate)
            ax.plot(side, row, marker="<" if side < 0 else ">", color=colour, markersize=9)


def _said(result: StudyResult, found: ComparisonResult) -> str:
    """The verdict in a few words."""
    verdict = verdict_as_tuned(result, found)
    word = WORDS.get(verdict, str(verdict))
    if verdict in (Verdict.BETTER, Verdict.WORSE) and within_margin(result, found):
        word += f", by less than {result.margin:g}"
    return f"{word}, but at the {EDGE}" if found.verdict == EDGE else word


def _in_words(result: StudyResult, found: ComparisonResult) -> str:
    interval = "" if found.low is None or found.high is None else f" ({found.low:+.4f} to {found.high:+.4f})"
    return f"{shortened(result.arm(found.arm).title)} {found.estimate:+.4f}{interval}, {_said(result, found)}"


def _title(result: StudyResult) -> str:
    """The title of the baseline, shortened."""
    return shortened(result.arm(result.baseline).title)


def _values(found: ComparisonResult) -> list[float]:
    ends = [value for value in (found.low, found.high) if value is not None]
    return [found.estimate, *ends, *found.by_seed]
