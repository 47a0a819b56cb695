"""What the benchmark of growth leaves: JSON, a page, a picture, and the tables of docs/SCALING.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import docs_table
from benchmarks.growth.fit import SLACK, Grown
from benchmarks.growth.overhead import WORK, Overhead
from lmoe.report.canvas import new_figure

STEM = "growth"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "SCALING.md"
BEGIN, END = "<!-- table: make bench-growth -->", "<!-- end of growth -->"


def as_json(
    grown: Sequence[Grown], overheads: Sequence[Overhead], command: str, machine: dict[str, str | int]
) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "command": command,
        "machine": machine,
        "growth": [one.as_json() for one in grown],
        "overhead": [one.as_json() for one in overheads],
    }


def tables(
    grown: Sequence[Grown], overheads: Sequence[Overhead], command: str, machine: dict[str, str | int]
) -> list[str]:
    """Lines: what it was measured on, exponents, and shares of a step."""
    lines = [f"`{command}`: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "."]
    if grown:
        lines += ["", "| what grows | from, to | of | time | last two points | counted | time over the first |"]
        lines += ["|---|---:|---|---:|---:|---:|---|"]
    for one in grown:
        points = list(one.timed)
        cells = [
            one.name,
            f"{points[0]:,} to {points[-1]:,}",
            one.job,
            f"{one.measured_exponent:.2f}{'' if one.met else ' (too fast)'}",
            f"{one.last_exponent:.2f}",
            f"{one.counted_exponent:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in one.relative().values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if overheads:
        lines += ["", "| backbone | a step, ms | forward | backward | optimizer | the rest | asked |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for one in overheads:
        parts = (f"{one.median(name) / one.median('step'):.1%}" for name in WORK)
        cells = [one.base, f"{one.median('step'):.0f}", *parts, f"{one.share:.1%}", f"<= {one.limit:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def as_markdown(
    grown: Sequence[Grown], overheads: Sequence[Overhead], command: str, machine: dict[str, str | int]
) -> str:
    """Return the page, with what the rest of a step consists of."""
    lines = ["# How cost grows", "", *tables(grown, overheads, command, machine), ""]
    lines += [f"Exponents are of least squares on logarithms; asked: time at most counted + {SLACK:g}.", ""]
    lines += [f"![Time over the first point]({STEM}.png)"] if grown else []
    for one in overheads:
        lines += [
            "",
            f"The rest of a step of {one.base}, milliseconds of a step under a profiler, which slows them:",
            "",
        ]
        lines += [f"- {1000 * seconds:.2f} {name}" for name, seconds in one.rest]
    return "\n".join(lines) + "\n"


def draw(grown: Sequence[Grown], path: Path) -> None:
    """Time and counted operations over those of the first point, a panel for each series, logarithmic."""
    columns = 3
    fig = new_figure(0.6 + 2.6 * -(-len(grown) // columns))
    panels = fig.subplots(-(-len(grown) // columns), columns, squeeze=False).flatten()
    for panel, one in zip(panels, grown, strict=False):
        first = next(iter(one.counted.values()))
        panel.loglog(list(one.timed), list(one.relative().values()), "o-", color="#1b6ca8", label="time")
        panel.loglog(list(one.counted), [count / first for count in one.counted.values()], "--", color="0.5")
        panel.set_title(one.name, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(grown) :]:
        panel.set_visible(False)
    fig.savefig(path)


def write(
    grown: Sequence[Grown],
    overheads: Sequence[Overhead],
    command: str,
    machine: dict[str, str | int],
    folder: Path,
) -> str:
    """Write growth.json, growth.md and growth.png, and return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(grown, overheads, command, machine), indent=1, ensure_ascii=False)
    (folder / f"{STEM}.json").write_text(text + "\n", encoding="utf-8")
    page = as_markdown(grown, overheads, command, machine)
    (folder / f"{STEM}.md").write_text(page, encoding="utf-8")
    if grown:
        draw(grown, folder / f"{STEM}.png")
    return page


def write_docs(lines: Sequence[str], docs: Path = DOCS) -> None:
    """Put the tables between their marks in the documentation."""
    docs_table.put("\n".join(lines), docs, BEGIN, END)
