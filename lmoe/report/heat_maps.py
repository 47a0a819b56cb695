"""Heat maps of the load of every expert, by site and by domain.

Colour is load over the uniform share 1/E (1 = uniform), so that sites with different numbers of experts compare.
The scale is fixed, so that the pictures of two runs compare; what exceeds twice the uniform share is clipped.
"""

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lmoe.report.canvas import MOST_DOMAINS, new_figure, note, plain
from lmoe.report.cells import (
    ABSENT,
    MIN_CELL_INCHES,
    MIN_ROW_INCHES,
    ROW_INCHES,
    Ticks,
    draw_cells,
    label_rows,
    write_cell,
)
from lmoe.report.loads import domain_distance, group_sites, is_dead, layer_of, mean_loads, site_ticks
from lmoe.report.summary import RunSummary
from lmoe.vocabulary import DEAD_SHARE

LOAD_COLOURS = colormaps["RdBu_r"]
LOAD_SCALE = Normalize(0.0, 2.0)
DISTANCE_COLOURS = colormaps["cividis"]
MAX_TICKS = 64
MIN_INCHES = 3.0
"""A lower picture has no room for the colour scale."""
PANELS_PER_ROW = 3
NUMBERED_DOMAINS, LOW_ROW_INCHES = 24, 0.25
"""More domains have lower rows, without numbers: to write these takes longer than all else of the picture."""


def load_by_site(summary: RunSummary) -> Figure:
    """Rows are sites in their order, columns experts; hatched where a site has fewer experts than others."""
    sites = list(summary.site_load)
    if not sites:
        return note("No site recorded the load of its experts.")
    loads = list(summary.site_load.values())
    row_inches = ROW_INCHES if len(sites) <= 48 else max(0.2, 20 / len(sites))
    fig = new_figure(max(MIN_INCHES, 1.9 + row_inches * len(sites)))
    ax = fig.add_subplot()
    _draw_loads(ax, loads, site_ticks(sites, MAX_TICKS), cell_inches=(12.2 / max(map(len, loads)), row_inches))
    layers = [layer_of(site) for site in sites]
    for row in range(1, len(sites)):
        if layers[row] != layers[row - 1]:
            ax.axhline(row, color="black", linewidth=1.2)
    by_site = " by site" if len(sites) > 1 else ""
    fig.suptitle(f"Load of every expert{by_site}{_reading(summary)}", fontsize=15)
    _load_scale(fig, [ax])
    return fig


def load_by_domain(summary: RunSummary) -> Figure:
    """Above: domains by experts, averaged over sites of a kind. Below, of several sites: how far each tells domains
    apart. Of very many domains the first ones are drawn."""
    measured = [domain for domain in summary.domains if summary.domain_load.get(domain)]
    domains = measured[:MOST_DOMAINS]
    sites = [site for site in summary.site_load if all(site in summary.domain_load[domain] for domain in domains)]
    if not domains or not sites:
        return note("No load by domain was recorded.")
    groups = group_sites({site: summary.site_load[site] for site in sites})
    columns = min(PANELS_PER_ROW, len(groups))
    rows = math.ceil(len(groups) / columns)
    row_inches = ROW_INCHES if len(domains) <= NUMBERED_DOMAINS else LOW_ROW_INCHES
    panel_inches = max(MIN_INCHES, 1.1 + row_inches * len(domains))
    has_distance = len(domains) > 1 and len(sites) > 1
    # Labels under the lower panel are written upright and take an inch and a half.
    heights = [panel_inches] * rows + [panel_inches + 1.5] * has_distance
    fig = new_figure(sum(heights) + 0.6)
    grid = fig.add_gridspec(len(heights), columns, height_ratios=heights)
    axes = []
    for i, (title, members) in enumerate(groups.items()):
        ax = fig.add_subplot(grid[i // columns, i % columns])
        loads = [mean_loads([summary.domain_load[domain][site] for site in members]) for domain in domains]
        _draw_loads(
            ax,
            loads,
            _domain_ticks(domains) if i % columns == 0 else [],
            cell_inches=(12.2 / columns / len(loads[0]), row_inches),
        )
        ax.set_title(plain(f"{title}: mean of {len(members)} sites" if len(members) > 1 else title), fontsize=13)
        axes.append(ax)
    shown = "domain" if len(domains) == len(measured) else f"domain, the first {len(domains)} of {len(measured)}"
    fig.suptitle(f"Load of every expert by {shown}{_reading(summary)}", fontsize=15)
    _load_scale(fig, axes)
    if has_distance:
        _draw_distance(fig, fig.add_subplot(grid[rows, :]), summary, measured, sites, row_inches)
    return fig


def _reading(summary: RunSummary) -> str:
    counts = {len(loads) for loads in summary.site_load.values()}
    uniform = f"; uniform = {100 / counts.pop():.3g}" if len(counts) == 1 else ""
    return f"  (% of assignments{uniform}; x = dead, below {100 * DEAD_SHARE:g} % of uniform)"


def _draw_loads(ax: Axes, loads: Sequence[Sequence[float]], ticks: Ticks, cell_inches: tuple[float, float]) -> None:
    widest = max(map(len, loads))
    ratios = [[share * len(row) for share in row] + [ABSENT] * (widest - len(row)) for row in loads]
    draw_cells(ax, ratios, LOAD_COLOURS, LOAD_SCALE)
    if cell_inches[0] >= MIN_CELL_INCHES and cell_inches[1] >= MIN_ROW_INCHES:
        _write_shares(ax, loads)
    else:
        _mark_dead(ax, loads, cell_inches)
    every = math.ceil(widest / (32 if cell_inches[0] > 0.3 else 16))
    ax.set_xticks([e + 0.5 for e in range(0, widest, every)], [str(e) for e in range(0, widest, every)], fontsize=12)
    ax.set_xlabel("expert", fontsize=12)
    label_rows(ax, ticks)


def _write_shares(ax: Axes, loads: Sequence[Sequence[float]]) -> None:
    for i, row in enumerate(loads):
        for e, share in enumerate(row):
            in_percent = f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
            text = "x" if is_dead(share, len(row)) else in_percent
            write_cell(ax, e, i, text, LOAD_COLOURS(LOAD_SCALE(share * len(row))))


def _mark_dead(ax: Axes, loads: Sequence[Sequence[float]], cell_inches: tuple[float, float]) -> None:
    """All of them in one line of marks: a text each takes longer than all else of the picture where most are dead."""
    dead = [(e, i) for i, row in enumerate(loads) for e, share in enumerate(row) if is_dead(share, len(row))]
    ax.plot(
        [e + 0.5 for e, _ in dead], [i + 0.5 for _, i in dead], linestyle="none", marker="x", color="white",
        markersize=min(7.0, 0.6 * 72 * min(cell_inches)), scalex=False, scaley=False,
    )  # fmt: skip


def _draw_distance(
    fig: Figure, ax: Axes, summary: RunSummary, domains: list[str], sites: list[str], row_inches: float
) -> None:
    distances = [domain_distance({d: summary.domain_load[d] for d in domains}, site) for site in sites]
    drawn = domains[:MOST_DOMAINS]
    values = [[distance[domain] for distance in distances] for domain in drawn]
    top = max(0.05, max(map(max, values)))
    scale = Normalize(0.0, top)
    draw_cells(ax, values, DISTANCE_COLOURS, scale)
    if 12.2 / len(sites) >= MIN_CELL_INCHES and row_inches >= MIN_ROW_INCHES:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                write_cell(ax, j, i, f"{100 * value:.0f}", DISTANCE_COLOURS(scale(value)))
    places, names = zip(*site_ticks(sites, MAX_TICKS), strict=True)
    ax.set_xticks(places, [plain(name) for name in names], fontsize=11, rotation=90)
    label_rows(ax, _domain_ticks(drawn))
    ax.set_title("How far each site tells the domains apart  (% of a domain's assignments routed unlike the mean)",
                 fontsize=13)  # fmt: skip
    percent = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")
    fig.colorbar(ScalarMappable(scale, DISTANCE_COLOURS), ax=ax, format=percent, pad=0.01, fraction=0.03)


def _domain_ticks(domains: Sequence[str]) -> Ticks:
    return [(row + 0.5, domain) for row, domain in enumerate(domains)]


def _load_scale(fig: Figure, axes: list[Axes]) -> None:
    bar = fig.colorbar(
        ScalarMappable(LOAD_SCALE, LOAD_COLOURS), ax=axes, extend="max", pad=0.01, fraction=0.03, aspect=25
    )
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "0.5", "uniform", "1.5", "2 or more"], fontsize=11)
    bar.set_label("load / uniform share", fontsize=12)
