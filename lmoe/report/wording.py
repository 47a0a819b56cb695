"""Numbers as a reader wants them, the same in the terminal and on the page. ASCII only, for logs."""

import math
from dataclasses import dataclass

from lmoe.report.summary import RunSummary
from lmoe.report.targets import TargetReport

NOT_MEASURED = "-"
AGREEMENT = "adjusted mutual information"
MOST_EXPERTS = 12
"""Of more experts that matter for one domain, the rest is only counted."""


@dataclass(slots=True, kw_only=True)
class LossRow:
    """Validation loss of one domain, or the mean over domains, as text."""

    label: str
    before: str
    after: str
    change: str
    percent: str
    improved: bool | None
    """None where the two cannot be compared."""


def loss_rows(summary: RunSummary) -> list[LossRow]:
    """A row for each domain; the mean comes last where there are several.

    The means are compared only where both were measured on the same domains.
    """
    rows = [_loss_row(name, summary.before.get(name), summary.after.get(name), True) for name in summary.domains]
    if len(rows) > 1:
        same = all((name in summary.before) == (name in summary.after) for name in summary.domains)
        rows.append(_loss_row("mean over domains", summary.before_mean, summary.after_mean, same))
    return rows


def _loss_row(label: str, before: float | None, after: float | None, comparable: bool) -> LossRow:
    row = LossRow(
        label=label,
        before=loss(before),
        after=loss(after),
        change=NOT_MEASURED,
        percent=NOT_MEASURED,
        improved=None,
    )
    if comparable and before is not None and after is not None and math.isfinite(after - before):
        row.change = f"{after - before:+.3f}"
        row.percent = f"{100 * (after - before) / before:+.1f}%" if before else NOT_MEASURED
        row.improved = after < before
    return row


def loss(value: float | None) -> str:
    """A loss, or a dash."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def counted(number: int, noun: str) -> str:
    """`1 domain`, `8,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """`48 s`, `2 min 20 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(megabytes: float | None) -> str:
    """`812 MB`, `1.2 GB`, or that nobody measured."""
    if megabytes is None:
        return "not measured"
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def experts(summary: RunSummary) -> str:
    """`8 experts at each of 18 sites`, with their names where they have some, and one router for all if that is so."""
    named = f" ({', '.join(summary.expert_names)})" if summary.expert_names else ""
    return _count(summary) + named


def _count(summary: RunSummary) -> str:
    counts = sorted({len(loads) for loads in summary.site_load.values()})
    if not counts:
        return "no routers"
    sites = summary.sites_of_one_router or len(summary.site_load)
    if summary.sites_of_one_router is not None:
        where = "1 site" if sites == 1 else f"each of {sites} sites"
        return f"{counts[0]} experts at {where}, chosen by one router for the whole model"
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} experts at {sites} sites"
    return f"{counts[0]} experts at 1 site" if sites == 1 else f"{counts[0]} experts at each of {sites} sites"


def specialists(summary: RunSummary) -> dict[str, str]:
    """Domain -> the experts that matter most for it, and the change of its loss without each, the largest first.

    The last row, `no domain`, is there where an expert matters for none.
    """
    rows = {}
    for domain in summary.domains:
        changes = {e: summary.knock_out[e][domain] for e, best in summary.specialisation.items() if best == domain}
        largest = sorted(changes, key=lambda e: -changes[e])
        rows[domain] = _listed([f"{e} {changes[e]:+.3f}" for e in largest]) or "no expert"
    if useless := [e for e, best in summary.specialisation.items() if best is None]:
        rows["no domain"] = _listed(useless)
    return rows


@dataclass(slots=True, kw_only=True)
class TargetRow:
    """What routers choose for the rows of one target, or of a domain that none is, as text."""

    label: str
    rows: str
    right: str
    other: str
    """The other target that is chosen most, and how often."""


def target_rows(report: TargetReport) -> list[TargetRow]:
    """A row for each target, then for each domain that was not trained; those without rows say so by dashes."""
    found = []
    for label, name in enumerate(report.labels):
        right = report.right(label) if label < len(report.targets) else None
        other = report.most_other(label)
        found.append(
            TargetRow(
                label=name,
                rows=f"{report.counts[label]:,}",
                right=NOT_MEASURED if right is None else percent(right),
                other=NOT_MEASURED
                if other is None
                else f"{report.targets[other]} {percent(report.table[label][other])}",
            )
        )
    return found


def target_lines(report: TargetReport) -> list[str]:
    """The accuracy beside that of always the same target, and how experts, clusters and domains agree."""
    lines = []
    if report.accuracy is not None and report.largest is not None:
        mean = "" if report.sites == 1 else f" (mean over {report.sites} routers)"
        lines.append(f"target chosen for {percent(report.accuracy)} of {sum(report.rows):,} rows{mean}")
        lines.append(f"always the largest target: {percent(report.largest)}")
    else:
        lines.append("no row has a target")
    if report.agreement is not None:
        lines.append(f"{AGREEMENT} of experts and domains: {report.agreement:.3f}")
    if report.cluster_agreement is not None:
        lines.append(f"{AGREEMENT} of clusters and domains (training rows): {report.cluster_agreement:.3f}")
    return lines


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - MOST_EXPERTS} more"] if len(names) > MOST_EXPERTS else []
    return ", ".join(names[:MOST_EXPERTS] + more)


def steps(summary: RunSummary) -> str:
    """Optimizer steps done, and of how many where they are fewer."""
    if summary.steps is None or summary.steps == summary.max_steps:
        return f"{summary.max_steps:,}"
    return f"{summary.steps:,} of {summary.max_steps:,}"


RUN_FILES = {
    "adapter/": "the trained adapter, to use, export or share",
    "checkpoints/": "last.ckpt and best.ckpt, to resume",
    "metrics.csv": "every logged metric by step",
    "report/": "pictures and a page of what the routers did",
}
"""What a run leaves in its directory, and what for."""
