"""Heat maps of what experts do together, and of what they are needed for."""

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from lmoe.report.canvas import MOST_DOMAINS, new_figure, note, plain
from lmoe.report.cells import MIN_CELL_INCHES, ROW_INCHES, draw_cells, label_rows, write_cell
from lmoe.report.loads import group_sites
from lmoe.report.summary import RunSummary

SHARE_COLOURS = colormaps["cividis"]
CHANGE_COLOURS = colormaps["RdBu_r"]
LARGEST_NUMBERED = 16
"""More experts than this, and the cells carry no number."""
PANELS_PER_ROW = 3
MOST_ROWS = 64


def coactivation(summary: RunSummary) -> Figure:
    """P(column | row): of the tokens of one expert, how many use the other too; one panel a kind of site, averaged."""
    found = {site: matrix for site, matrix in summary.coactivation.items() if len(matrix) > 1}
    if not found:
        return note("No site has several experts whose tokens could meet.")
    groups = group_sites({site: summary.site_load[site] for site in found})
    columns = min(PANELS_PER_ROW, len(groups))
    rows = math.ceil(len(groups) / columns)
    fig = new_figure(4.4 * rows + 0.8)
    axes, scale = [], Normalize(0.0, 1.0)
    for i, (title, members) in enumerate(groups.items()):
        ax = fig.add_subplot(rows, columns, i + 1)
        values = _mean([found[site] for site in members])
        _numbered(ax, values, SHARE_COLOURS, scale, numbers=len(values) <= LARGEST_NUMBERED, percent=True)
        every = math.ceil(len(values) / 16)
        ticks = [(e + 0.5, str(e)) for e in range(0, len(values), every)]
        ax.set_xticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=12)
        label_rows(ax, ticks)
        ax.set_title(plain(f"{title}: mean of {len(members)} sites" if len(members) > 1 else title), fontsize=13)
        axes.append(ax)
    fig.suptitle("Experts that work together  (% of the row's tokens that use the column too)", fontsize=15)
    fig.colorbar(ScalarMappable(scale, SHARE_COLOURS), ax=axes, pad=0.01, fraction=0.03)
    return fig


def knock_out(summary: RunSummary) -> Figure:
    """Rows are silenced experts, columns domains; red: the domain's loss rises, so that the expert was needed."""
    rows = sorted(summary.knock_out.items(), key=lambda row: -max(row[1].values(), default=0.0))[:MOST_ROWS]
    if not rows:
        return note("No expert was silenced (analysis.knock_out=none).")
    rows = [row for row in summary.knock_out.items() if row in rows]
    silenced_for = [domain for domain in summary.domains if domain in rows[0][1]]
    domains = silenced_for[:MOST_DOMAINS]
    values = [[changes[domain] for domain in domains] for _, changes in rows]
    top = max(1e-6, max(abs(value) for row in values for value in row))
    scale = Normalize(-top, top)
    fig = new_figure(max(3.0, 2.4 + ROW_INCHES * len(rows)))
    ax = fig.add_subplot()
    _numbered(ax, values, CHANGE_COLOURS, scale, numbers=12.2 / len(domains) >= MIN_CELL_INCHES, percent=False)
    label_rows(ax, [(i + 0.5, name) for i, (name, _) in enumerate(rows)])
    places = [i + 0.5 for i in range(len(domains))]
    ax.set_xticks(places, [plain(name) for name in domains], fontsize=12, rotation=30, ha="right")
    which = f"; the {MOST_ROWS} that matter most" if len(rows) < len(summary.knock_out) else ""
    which += f"; the first {len(domains)} of {len(silenced_for)} domains" if len(domains) < len(silenced_for) else ""
    fig.suptitle(f"Change of each domain's loss with one expert silenced  ({summary.loss_measure}{which})", fontsize=15)
    fig.colorbar(ScalarMappable(scale, CHANGE_COLOURS), ax=ax, pad=0.01, fraction=0.03)
    return fig


def _numbered(
    ax: Axes, values: Sequence[Sequence[float]], colours: Colormap, scale: Normalize, *, numbers: bool, percent: bool
) -> None:
    draw_cells(ax, values, colours, scale)
    for i, row in enumerate(values if numbers else []):
        for j, value in enumerate(row):
            text = f"{100 * value:.0f}" if percent else f"{value:+.3f}"
            write_cell(ax, j, i, text, colours(scale(value)))


def _mean(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [[sum(cells) / len(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
