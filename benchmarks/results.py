"""What a benchmark leaves: JSON with every sample, a table in Markdown, a picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory import Peak
from benchmarks.picture import Bar, draw
from benchmarks.targets import Judged
from benchmarks.timing import Timed, ratio


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """One contestant in one group.

    Args:
        reference: in the same group; None where it was not timed.
        trained: parameters that the optimizer holds.
        peak: None if memory was not measured.
    """

    group: str
    name: str
    timed: Timed
    reference_name: str
    reference: Timed | None
    trained: int
    peak: Peak | None = None

    def ratio(self, part: str | None = None) -> float | None:
        """Ratio of the time to that of the reference, or None without one."""
        return None if self.reference is None else ratio(self.timed, self.reference, part)


@dataclass(slots=True, frozen=True, kw_only=True)
class Skip:
    """A contestant without a row, or a figure of it that could not be had."""

    name: str
    why: str


@dataclass(slots=True, frozen=True, kw_only=True)
class Report:
    """One device, size and type.

    Args:
        title: of the table.
        command: what to type for the same again.
        machine: see benchmarks/machine.py.
        work: what a step was.
        parts: of a step, in order; the ratio of the first one is shown beside that of the whole.
        reference: what the ratios of the picture are to, in words.
    """

    title: str
    command: str
    machine: dict[str, str | int]
    work: dict[str, str | int]
    parts: tuple[str, ...]
    rows: list[Row]
    skipped: list[Skip]
    targets: list[Judged]
    reference: str = "a PEFT LoRA of rank k*r"

    @property
    def missed(self) -> bool:
        """Whether a promise was measured and not kept."""
        return any(judged.verdict == "missed" for judged in self.targets)


def write(report: Report, folder: Path, stem: str) -> None:
    """STEM.json, STEM.md and STEM.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(report), indent=1, ensure_ascii=False)
    (folder / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(as_markdown(report, picture=f"{stem}.png"), encoding="utf-8")
    bars = [
        Bar(group=row.group, name=row.name, ratio=value, parts=tuple(row.timed.median(part) for part in report.parts))
        for row in report.rows
        if (value := row.ratio()) is not None
    ]
    draw(bars, report.parts, title=report.title, reference=report.reference, path=folder / f"{stem}.png")


def as_json(report: Report) -> dict[str, Any]:
    """Everything, times in milliseconds and memory in MB (10^6 bytes)."""
    return {
        "title": report.title,
        "command": report.command,
        "machine": report.machine,
        "work": report.work,
        "targets": [
            {
                "what": judged.target.what,
                "limit": judged.target.bound(judged.target.limit),
                "aim": judged.target.bound(judged.target.aim),
                "measured": judged.measured,
                "verdict": judged.verdict,
            }
            for judged in report.targets
        ],
        "contestants": [_row_as_json(row, report.parts) for row in report.rows],
        "skipped": [{"name": skip.name, "why": skip.why} for skip in report.skipped],
    }


def _row_as_json(row: Row, parts: tuple[str, ...]) -> dict[str, Any]:
    return {
        "group": row.group,
        "name": row.name,
        "median_ms": {part: row.timed.median(part) for part in parts} | {"sum": row.timed.median()},
        "spread": row.timed.spread(),
        "reference": row.reference_name,
        "ratio": {parts[0]: row.ratio(parts[0]), "sum": row.ratio()},
        "trained_parameters": row.trained,
        "memory_mb": row.peak and {"base": row.peak.base, "peak": row.peak.peak, "training": row.peak.training},
        "samples_ms": {part: [round(sample, 4) for sample in row.timed.parts[part]] for part in parts},
    }


def as_markdown(report: Report, picture: str) -> str:
    """A page: targets, one table a group, notes."""
    lines = [f"# {report.title}", "", f"`{report.command}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items()) for facts in (report.machine, report.work)]
    lines += ["", "Median milliseconds; a ratio is the median over the repeats of the ratio within one repeat, to the"]
    lines += ["reference of the group. Spread: the middle half of the samples over their median. Memory: peak of two"]
    lines += ["steps in a process of its own, beyond the base.", "", f"![Ratios]({picture})", "", "## Targets", ""]
    lines += ["| what | limit | aim | measured | verdict |", "|---|---:|---:|---:|---|"]
    for judged in report.targets:
        target, measured = judged.target, "" if judged.measured is None else f"{judged.measured:.3f}"
        bounds = f"{target.bound(target.limit)} | {target.bound(target.aim)}"
        lines.append(f"| {target.what} | {bounds} | {measured} | {judged.verdict} |")
    for group in dict.fromkeys(row.group for row in report.rows):
        lines += ["", f"## {group}", "", *_table([row for row in report.rows if row.group == group], report.parts)]
    if report.skipped:
        lines += ["", "## Left out", "", *(f"- {skip.name}: {skip.why}" for skip in report.skipped)]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row], parts: tuple[str, ...]) -> list[str]:
    heads = [*parts, "sum", "spread", f"ratio of {parts[0]}", "ratio of sum", "trained", "MB"]
    lines = [f"| contestant | {' | '.join(heads)} | reference |", "|---" + "|---:" * len(heads) + "|---|"]
    for row in rows:
        ratios = [row.ratio(parts[0]), row.ratio()]
        cells = [
            row.name,
            *(f"{row.timed.median(part):.2f}" for part in (*parts, None)),
            f"{row.timed.spread():.1%}",
            *("" if value is None else f"{value:.3f}" for value in ratios),
            f"{row.trained:,}",
            "" if row.peak is None else f"{row.peak.training:,.0f}",
            "itself" if row.name == row.reference_name else row.reference_name,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
