"""Heat maps of what routers choose of what they are taught, and of clusters beside domains."""

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lmoe.report.canvas import new_figure, note, plain
from lmoe.report.cells import MIN_CELL_INCHES, ROW_INCHES, draw_cells, label_rows, write_cell
from lmoe.report.targets import TargetReport

SHARE_COLOURS = colormaps["cividis"]
SHARE_SCALE = Normalize(0.0, 1.0)
MOST_ROWS = 64
MIN_INCHES = 3.4


def target_choices(report: TargetReport) -> Figure:
    """Rows are targets, below a line domains that none is; columns what routers choose: the diagonal is right."""
    if not sum(report.counts):
        return note("No validation row was routed.")
    shown = [label for label, count in enumerate(report.counts) if count][:MOST_ROWS]
    values = [report.table[label] for label in shown]
    names = [f"{report.labels[label]}  {report.counts[label]:,}" for label in shown]
    mean = f"; mean of {report.sites} routers" if report.sites > 1 else ""
    left_out = sum(map(bool, report.counts)) - len(shown)
    which = f"; the first {MOST_ROWS}" if left_out else ""
    fig = _shares(values, names, report.targets, f"chosen {report.kind}")
    trained = sum(label < len(report.targets) for label in shown)
    if 0 < trained < len(shown):
        fig.axes[0].axhline(trained, color="black", linewidth=1.5)
    fig.suptitle(f"What routers choose  (% of the validation rows of each {report.kind}{mean}{which})", fontsize=15)
    return fig


def cluster_domains(report: TargetReport) -> Figure:
    """Rows are domains, columns clusters: where the training rows of each domain lie."""
    shown = [place for place, counts in enumerate(report.cluster_rows) if sum(counts)][:MOST_ROWS]
    if not shown:
        return note("No training row was put into a cluster.")
    values = [[count / sum(report.cluster_rows[place]) for count in report.cluster_rows[place]] for place in shown]
    names = [f"{report.domains[place]}  {sum(report.cluster_rows[place]):,}" for place in shown]
    fig = _shares(values, names, report.targets, "cluster")
    fig.suptitle("Where the training rows of each domain lie  (% of them in each cluster)", fontsize=15)
    return fig


def _shares(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], below: str) -> Figure:
    """A map of shares whose rows and columns have names; columns get a label each as far as there is room."""
    fig = new_figure(max(MIN_INCHES, 2.6 + ROW_INCHES * len(values)))
    ax = fig.add_subplot()
    draw_cells(ax, values, SHARE_COLOURS, SHARE_SCALE)
    cell_inches = 12.2 / max(1, len(columns))
    if cell_inches >= MIN_CELL_INCHES:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                write_cell(ax, j, i, f"{100 * value:.0f}", SHARE_COLOURS(SHARE_SCALE(value)))
    label_rows(ax, [(i + 0.5, name) for i, name in enumerate(rows)])
    every = -(-len(columns) // MOST_ROWS)
    places = range(0, len(columns), every)
    names = [plain(columns[place]) for place in places]
    crowded = cell_inches < 0.5
    ax.set_xticks(
        [place + 0.5 for place in places],
        names,
        fontsize=9 if crowded else 12,
        rotation=90 if crowded else 30,
        ha="center" if crowded else "right",
    )
    ax.set_xlabel(below, fontsize=12)
    percent = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")
    fig.colorbar(ScalarMappable(SHARE_SCALE, SHARE_COLOURS), ax=ax, format=percent, pad=0.01, fraction=0.03)
    return fig
