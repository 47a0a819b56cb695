"""One HTML page about a run: no script, no external resource, readable from a file share."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from lmoe.report.curves import Curves
from lmoe.report.files import write_bytes
from lmoe.report.loads import DEAD_SHARE
from lmoe.report.summary import RunSummary
from lmoe.report.targets import TargetReport
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

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem; text-align: right; }
th:first-child, td:first-child, table.text td { text-align: left; } tbody tr:nth-child(odd) { background: #f5f5f5; }
thead { border-bottom: 2px solid #999; } tr.mean { font-weight: bold; border-top: 2px solid #999; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figure img { width: 100%; height: auto; } figcaption { color: #444; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.warning { border-left: 5px solid #d55e00; background: #fff3ea; padding: .5rem 1rem; }
"""

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


def write_page(
    summary: RunSummary, metrics: Curves, pictures: Mapping[str, Path], folder: Path, next_commands: Sequence[str] = ()
) -> Path:
    """Write `folder`/index.html; pictures are linked by relative path.

    Args:
        next_commands: what to run next.

    Raises:
        TrainingError: the file cannot be written.
    """
    body = "\n".join(
        [
            f"<h1>{escape(summary.name)}</h1>",
            f"<p>{escape(summary.backbone)}: {escape(experts(summary))}.</p>",
            _warnings(summary),
            "<h2>What ran</h2>",
            _facts(summary),
            "<h2>Validation loss by domain</h2>",
            _losses(summary),
            _figures(pictures, folder, CAPTIONS | (CAPTIONS_OF_ONE if len(summary.site_load) == 1 else {})),
            _taught(summary.targets),
            _specialists(summary),
            _routing(metrics, several=len(summary.site_load) > 1),
            "<h2>Where things are</h2>",
            _files(summary),
            _next(next_commands),
        ]
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(summary.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    return write_bytes(Path(folder) / "index.html", page.encode("utf-8"))


def _warnings(summary: RunSummary) -> str:
    return "\n".join(f'<p class="warning"><b>Collapse.</b> {escape(message)}</p>' for message in summary.collapsed)


def _facts(summary: RunSummary) -> str:
    done = summary.max_steps if summary.steps is None else summary.steps
    phases = ", ".join(
        f"{name} from step {start + 1:,}{_measured(summary, name)}{'' if start < done else ' (not reached)'}"
        for name, start in summary.phases.items()
    )
    facts = {
        "backbone": summary.backbone,
        "experts": experts(summary),
        "trainable parameters": f"{summary.trainable_parameters:,}",
        "optimizer steps": steps(summary),
        "ended": summary.ended,
        "phases": phases or "-",
        "time": duration(summary.seconds),
        "peak memory": memory(summary.peak_memory_mb),
    }
    return _text_table(facts)


def _losses(summary: RunSummary) -> str:
    rows = loss_rows(summary)
    lines = []
    for i, row in enumerate(rows):
        mark = ' class="mean"' if i >= len(summary.domains) else ""
        cells = (row.label, row.before, row.after, row.change, row.percent)
        lines.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("domain", "adapters off", "after", "change", "change in %"))
    return (
        f"<p>{escape(_measure(summary))}; below, a dash stands for what was not measured.</p>\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
    )


def _measure(summary: RunSummary) -> str:
    """What losses are measured in, as a sentence begins."""
    measure = summary.loss_measure
    measure = measure.capitalize() if measure.startswith("loss ") else f"In {measure}"
    return f"{measure}, of phase {summary.last_phase} on its rows" if summary.measures_differ else measure


def _measured(summary: RunSummary, phase: str) -> str:
    """What the objective of a phase measures, in brackets, where phases differ in that."""
    return f" ({summary.phase_measures[phase]})" if summary.measures_differ and phase in summary.phase_measures else ""


def _figures(pictures: Mapping[str, Path], folder: Path, captions: Mapping[str, tuple[str, str]]) -> str:
    parts = []
    for name in [*(n for n in captions if n in pictures), *(n for n in pictures if n not in captions)]:
        title, reading = captions.get(name, (name, ""))
        link = escape(quote(os.path.relpath(pictures[name], folder).replace(os.sep, "/")))
        parts.append(
            f'<h2>{escape(title)}</h2>\n<figure><figcaption>{escape(reading)}</figcaption>\n<a href="{link}">'
            f'<img src="{link}" alt="{escape(title)}"></a></figure>'
        )
    return "\n".join(parts)


def _specialists(summary: RunSummary) -> str:
    if not summary.specialisation:
        return ""
    return (
        "<h2>What each expert is for</h2>\n<p>An expert stands with the domain whose loss rises most without it, "
        f"by so much ({escape(summary.loss_measure)}).</p>\n" + _text_table(specialists(summary))
    )


def _taught(report: TargetReport | None) -> str:
    if report is None:
        return ""
    lines = "".join(f"<p>{escape(line[:1].upper() + line[1:])}.</p>\n" for line in target_lines(report))
    head = "".join(f"<th>{name}</th>" for name in (report.kind, "rows", "chosen rightly", "chosen instead"))
    rows = (
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in (row.label, row.rows, row.right, row.other))}</tr>"
        for row in target_rows(report)
    )
    return (
        f"<h2>Targets of the routers</h2>\n<p>On the validation rows.</p>\n{lines}"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
    )


def _routing(metrics: Curves, *, several: bool) -> str:
    lines = []
    for name, meaning in ROUTING.items():
        if points := metrics.get(f"routing/{name}"):
            (first_step, first), (last_step, last) = points[0], points[-1]
            cells = (f"routing/{name}", f"{first:.3f}", f"{last:.3f}")
            numbers = "".join(f"<td>{cell}</td>" for cell in cells)
            lines.append(f'<tr title="steps {first_step} and {last_step}">{numbers}<td>{escape(meaning)}</td></tr>')
    if not lines:
        return ""
    head = "<tr><th>metric</th><th>first</th><th>last</th><th>meaning</th></tr>"
    means = "; means over the sites unless it says otherwise" if several else ""
    return (
        f"<h2>Routing</h2>\n<p>As first and as last logged{means}.</p>\n"
        f'<table class="text"><thead>{head}</thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
    )


def _files(summary: RunSummary) -> str:
    return f"<p>In <code>{escape(summary.run_dir)}</code>:</p>\n" + _text_table(RUN_FILES)


def _next(commands: Sequence[str]) -> str:
    return "<h2>Try next</h2>\n<pre>" + escape("\n".join(commands)) + "</pre>" if commands else ""


def _text_table(rows: Mapping[str, str]) -> str:
    lines = (f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return '<table class="text"><tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
