"""The page of a run: what it is, and what its routers did, in one file that opens from disk (docs/REPORT.md)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lmoe.report.curves import DOMAIN_LOSS, Curves
from lmoe.report.files import write_bytes
from lmoe.report.html import render
from lmoe.report.page_data import page_data
from lmoe.report.routing_file import RoutingHistory
from lmoe.report.summary import RunSummary
from lmoe.report.targets import TargetReport
from lmoe.report.tokens import visible
from lmoe.report.wording import (
    RUN_FILES,
    duration,
    experts,
    loss_rows,
    memory,
    specialists,
    steps,
    target_lines,
    target_rows,
)
from lmoe.vocabulary import DEAD_SHARE

PAGE_FILE = "index.html"
SCRIPTS = ("page.js", "experts.js", "vendor/chart.umd.min.js", "charts.js", "run.js")
ASKING = (*SCRIPTS, "watch.js")
"""Of a page that asks for news."""

CAPTIONS = {
    "loss_curves": (
        "Loss curves",
        "Lower is better; a dashed line marks where a phase begins, and a validation point at step 0 has the adapters "
        "off.",
    ),
    "load_by_site": (
        "Load by site",
        "White is the uniform share, red an expert that gets more of the assignments, blue one that gets less; a row "
        "with one dark red cell is a site that collapsed.",
    ),
    "load_by_domain": (
        "Load by domain",
        "Rows that differ show experts that specialise by domain; experts of different sites are different experts, so "
        "the lower panel, which compares domains within each site, is the surer sign.",
    ),
    "target_choices": (
        "What routers choose of what they were taught",
        "Rows are what validation rows are, columns what routers choose for them: the diagonal is right. Below the "
        "line stand domains that no router was taught, and where their rows go.",
    ),
    "cluster_domains": (
        "Clusters and domains",
        "The clusters that routers were taught, made from prompts alone, beside the domains that the rows name: a row "
        "with one bright cell is a domain that the clusters found too.",
    ),
    "coactivation": (
        "Experts that work together",
        "The diagonal is 100 %. Two experts that always meet do the work of one; with a dense router all of them meet.",
    ),
    "knock_out": (
        "Knock-out",
        "What silencing an expert does to each domain: red where the loss rises, which says more of what an expert is "
        "for than how often it is chosen.",
    ),
}
"""Picture -> its heading, and how to read it; in the order of the page."""

CAPTIONS_OF_ONE = {
    "load_by_site": (
        "Load of the experts",
        "White is the uniform share, red an expert that gets more of the assignments, blue one that gets less; one "
        "dark red cell is a router that collapsed.",
    ),
    "load_by_domain": ("Load by domain", "Rows that differ show experts that specialise by domain."),
}
"""The same where one router alone has decided."""

ROUTING = {
    "entropy": "router entropy over ln E: 1 where a router is undecided, 0 where it is certain",
    "cv": "coefficient of variation of the load: 0 where all experts are equally busy",
    "max_vio": "MaxVio, the busiest expert's load over the uniform one, less 1: 0 is perfect balance",
    "dead": f"dead experts, all sites together: share below {100 * DEAD_SHARE:g} % of the uniform one",
    "load_entropy": "entropy of the load over ln E: 1 balanced, 0 where one expert has it all",
    "information": "what a token tells about its expert, over ln E: 1 where routers are certain and balanced",
    "effective": "effective number of experts per token, 1 / sum of squared routing weights",
}
"""Routing metric -> what it says."""

VIEWS = {
    "losses": ("loss_curves",),
    "sites": ("load_by_site",),
    "domains": ("load_by_domain",),
    "experts": ("coactivation", "knock_out"),
    "targets": ("target_choices", "cluster_domains"),
}
"""Part of the page -> its pictures; others stand with the files."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Watched:
    """A run whose page asks for news.

    Args:
        state: how far it is, in words.
        ended: all of its summary is known.
        run: which run it is; what was chosen on the page is kept for it alone.
        shape: changes where the page must be loaded anew.
        every: seconds between two questions.
    """

    state: str
    ended: bool
    run: str
    shape: str
    every: float


def write_page(
    summary: RunSummary,
    metrics: Curves,
    pictures: Mapping[str, Path],
    folder: Path,
    next_commands: Sequence[str] = (),
    routing: RoutingHistory | None = None,
) -> Path:
    """Write `folder`/index.html; pictures are linked by relative path.

    Args:
        next_commands: what to run next.
        routing: what the routers did over the run; None: the run has none, or kept nothing.

    Raises:
        TrainingError: the file cannot be written.
    """
    links = {name: quote(os.path.relpath(place, folder).replace(os.sep, "/")) for name, place in pictures.items()}
    page = run_page(summary, metrics, links, next_commands, routing)
    return write_bytes(Path(folder) / PAGE_FILE, page.encode("utf-8"))


def run_page(
    summary: RunSummary,
    metrics: Curves,
    links: Mapping[str, str],
    next_commands: Sequence[str] = (),
    routing: RoutingHistory | None = None,
    watched: Watched | None = None,
) -> str:
    """The page as HTML.

    Args:
        links: address of each picture by its name.
        watched: somebody watches the run; while it has not ended, what is not known of it is left out.
    """
    content = page_content(summary, metrics, routing, under_way=watched is not None and not watched.ended)
    about = None if watched is None else {"run": watched.run, "shape": watched.shape, "every": watched.every}
    data = content["data"] | {"watched": about}
    facts = dict(content["tables"]["facts"])
    captions = CAPTIONS | (CAPTIONS_OF_ONE if len(summary.site_load) == 1 else {})
    placed = {name for names in VIEWS.values() for name in names}
    figures = {view: _figures(links, names, captions) for view, names in VIEWS.items()}
    return render(
        "run.html.jinja",
        scripts=SCRIPTS if watched is None else ASKING,
        data=data,
        asks_server=watched is not None,
        title=visible(summary.name),
        subtitle=visible(f"{summary.backbone}: {experts(summary)}." if "experts" in facts else f"{summary.backbone}."),
        state=None if watched is None else visible(watched.state),
        collapsed=_visible(summary.collapsed),
        tables=content["tables"],
        measure=_measure(summary),
        figures=figures | {"others": _figures(links, [name for name in links if name not in placed], captions)},
        alive={
            "losses": any(data["losses"].values()),
            "sites": routing is not None and bool(data["routing"]["steps"]),
            "domains": routing is not None and bool(data["routing"]["validations"]),
            "gates": routing is not None and bool(data["routing"]["steps"]),
            "tokens": routing is not None and bool(data["routing"]["tokens"]["rows"]),
        },
        targets=summary.targets and _visible(_targets(summary.targets)),
        loss_measure=summary.loss_measure,
        several=len(summary.site_load) > 1,
        run_dir=visible(summary.run_dir),
        commands="\n".join(map(visible, next_commands)),
    )


def page_content(
    summary: RunSummary, metrics: Curves, routing: RoutingHistory | None, *, under_way: bool
) -> dict[str, Any]:
    """What of a page changes while a run goes on, as JSON takes it: its tables, and what its scripts draw."""
    losses = [[row.label, row.before, row.after, row.change, row.percent] for row in loss_rows(summary)]
    tables = {
        "facts": list(_facts(summary, under_way=under_way).items()),
        "losses": losses[: len(summary.domains)],
        "mean": losses[len(summary.domains) :],
        "specialists": list(specialists(summary).items()) if summary.specialisation else [],
        "routing": _routing(metrics),
        "files": list(RUN_FILES.items()),
    }
    return {
        "tables": _visible(tables),
        "data": page_data(
            *(metrics, summary.phases, summary.max_steps, _measure(summary), routing, summary.expert_names),
            phase_measures=summary.phase_measures,
        ),
    }


def is_shown(metric: str) -> bool:
    """Whether a page shows a metric of metrics.csv."""
    if metric.startswith("val/"):
        return metric == "val/loss" or DOMAIN_LOSS.fullmatch(metric) is not None
    return metric == "train/loss" or (metric.startswith("routing/") and metric.removeprefix("routing/") in ROUTING)


def _visible(value: Any) -> Any:
    """The same with all texts as a reader sees them, what is invisible or would turn the direction marked."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {name: _visible(one) for name, one in value.items()}
    return [_visible(one) for one in value] if isinstance(value, list | tuple) else value


def _facts(summary: RunSummary, *, under_way: bool) -> dict[str, str]:
    done = summary.max_steps if summary.steps is None else summary.steps
    phases = ", ".join(
        f"{name} from step {start + 1:,}{_measured(summary, name)}{'' if start < done else ' (not reached)'}"
        for name, start in summary.phases.items()
    )
    facts = {"backbone": summary.backbone}
    if summary.site_load or not under_way:
        facts["experts"] = experts(summary)
    if not under_way:
        facts["trainable parameters"] = f"{summary.trainable_parameters:,}"
    facts["optimizer steps"] = steps(summary)
    if not under_way:
        facts["ended"] = summary.ended
    facts["phases"] = phases or "-"
    if not under_way:
        facts |= {"time": duration(summary.seconds), "peak memory": memory(summary.peak_memory_mb)}
    return facts


def _measure(summary: RunSummary) -> str:
    """What losses are measured in, as a sentence begins."""
    measure = summary.loss_measure
    measure = measure.capitalize() if measure.startswith("loss ") else f"In {measure}"
    return f"{measure}, of phase {summary.last_phase} on its rows" if summary.measures_differ else measure


def _measured(summary: RunSummary, phase: str) -> str:
    """What the objective of a phase measures, in brackets, where phases differ in that."""
    return f" ({summary.phase_measures[phase]})" if summary.measures_differ and phase in summary.phase_measures else ""


def _figures(
    links: Mapping[str, str], names: Sequence[str], captions: Mapping[str, tuple[str, str]]
) -> list[dict[str, str]]:
    found = []
    for name in names:
        if name in links:
            title, reading = captions.get(name, (name, ""))
            found.append({"title": title, "reading": reading, "link": links[name]})
    return found


def _targets(report: TargetReport) -> dict[str, Any]:
    return {
        "kind": report.kind,
        "lines": [f"{line[:1].upper()}{line[1:]}." for line in target_lines(report)],
        "rows": [(row.label, row.rows, row.right, row.other) for row in target_rows(report)],
    }


def _routing(metrics: Curves) -> list[list[str]]:
    found = []
    for name, meaning in ROUTING.items():
        if points := metrics.get(f"routing/{name}"):
            (_, first), (_, last) = points[0], points[-1]
            found.append([f"routing/{name}", f"{first:.3f}", f"{last:.3f}", meaning])
    return found
