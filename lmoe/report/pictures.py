"""The pictures of a report."""

from pathlib import Path

from matplotlib.figure import Figure

from lmoe.report.canvas import as_png
from lmoe.report.curves import Curves
from lmoe.report.expert_maps import coactivation, knock_out
from lmoe.report.files import write_bytes
from lmoe.report.heat_maps import load_by_domain, load_by_site
from lmoe.report.loss_picture import loss_curves
from lmoe.report.summary import RunSummary
from lmoe.report.target_maps import cluster_domains, target_choices

__all__ = [
    "cluster_domains",
    "coactivation",
    "knock_out",
    "load_by_domain",
    "load_by_site",
    "loss_curves",
    "target_choices",
    "write_loss_curve",
    "write_pictures",
]


def write_pictures(summary: RunSummary, metrics: Curves, folder: Path) -> dict[str, Path]:
    """Write the pictures as PNG: loss_curves, with routers their maps, target_choices (and cluster_domains) where they
    are taught, and knock_out where experts were silenced.

    Returns:
        Name of each picture without `.png` -> its file.

    Raises:
        TrainingError: a file cannot be written.
    """
    figures: dict[str, Figure] = {}
    if summary.site_load:
        figures["load_by_site"] = load_by_site(summary)
        figures["load_by_domain"] = load_by_domain(summary)
        figures["coactivation"] = coactivation(summary)
    if summary.targets is not None:
        figures["target_choices"] = target_choices(summary.targets)
        if summary.targets.cluster_rows:
            figures["cluster_domains"] = cluster_domains(summary.targets)
    figures["loss_curves"] = loss_curves(
        *(metrics, summary.phases, summary.max_steps, summary.loss_measure),
        unit=summary.loss_unit,
        phase_measures=summary.phase_measures,
    )
    if summary.knock_out:
        figures["knock_out"] = knock_out(summary)
    return {name: write_bytes(Path(folder) / f"{name}.png", as_png(figure)) for name, figure in figures.items()}


def write_loss_curve(metrics: Curves, max_steps: int, path: Path) -> Path:
    """Write the loss curves of a run without phases.

    Raises:
        TrainingError: the file cannot be written.
    """
    return write_bytes(path, as_png(loss_curves(metrics, {}, max_steps)))
