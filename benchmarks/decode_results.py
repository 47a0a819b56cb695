"""What `make bench-decode` leaves: JSON with every sample, and a page."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.targets import Judged
from benchmarks.timing import Timed, ratio


@dataclass(slots=True, frozen=True, kw_only=True)
class Line:
    """One contestant.

    Args:
        tokens: of its prompt.
        limit: base bytes / (base + experts' bytes): what its speed could be if reading were all.
        weights_ms, sets_ms: to change weights; to change which experts take part. None: it cannot.
        add_ms, remove_ms: one expert more, read from its files, and off again. None: it cannot.
        memory: peak / (base + experts' bytes), or None if not measured.
    """

    name: str
    timed: Timed
    base: Timed
    tokens: int
    limit: float
    weights_ms: float | None = None
    sets_ms: float | None = None
    add_ms: float | None = None
    remove_ms: float | None = None
    memory: float | None = None

    def speed(self, part: str) -> float:
        """Share of the base's tokens a second, within each repeat."""
        return ratio(self.base, self.timed, part)

    def as_json(self) -> dict[str, Any]:
        """The result with every sample, for a JSON file."""
        return {
            "name": self.name,
            "tokens_per_s": {"prefill": self._rate("prefill"), "decode": self._rate("decode")},
            "of_base": {part: self.speed(part) for part in self.timed.parts},
            "byte_limit": self.limit,
            "weights_ms": self.weights_ms,
            "sets_ms": self.sets_ms,
            "add_ms": self.add_ms,
            "remove_ms": self.remove_ms,
            "memory_of_base_and_experts": self.memory,
            "samples_ms": {part: [round(s, 3) for s in samples] for part, samples in self.timed.parts.items()},
        }

    def _rate(self, part: str) -> float:
        return 1000 * (self.tokens if part == "prefill" else 1) / self.timed.median(part)

    def cells(self) -> list[str]:
        """The cells of a row of the table."""
        optional = (self.weights_ms, self.sets_ms, self.add_ms, self.remove_ms, self.memory)
        return [
            self.name,
            f"{self._rate('prefill'):.1f}",
            f"{self.speed('prefill'):.3f}",
            f"{self._rate('decode'):.2f}",
            f"{self.speed('decode'):.3f}",
            f"{self.limit:.3f}",
            *("" if value is None else f"{value:.2f}" for value in optional),
        ]


HEADS = (
    "contestant",
    "prefill tokens/s",
    "of base",
    "decode tokens/s",
    "of base",
    "byte limit",
    "weights ms",
    "sets ms",
    "add ms",
    "remove ms",
    "memory",
)


@dataclass(slots=True, frozen=True, kw_only=True)
class DecodeReport:
    """One type.

    Args:
        machine, work: facts.
        skipped: what was left out, and why.
    """

    title: str
    command: str
    machine: dict[str, str | int]
    work: dict[str, str | int]
    lines: list[Line]
    targets: list[Judged]
    skipped: dict[str, str]

    def write(self, folder: Path, stem: str) -> str:
        """STEM.json and STEM.md; returns the page."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "title": self.title,
            "command": self.command,
            "machine": self.machine,
            "work": self.work,
            "targets": [{"what": j.target.what, "measured": j.measured, "verdict": j.verdict} for j in self.targets],
            "contestants": [line.as_json() for line in self.lines],
            "skipped": self.skipped,
        }
        (folder / f"{stem}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page = self.page()
        (folder / f"{stem}.md").write_text(page, encoding="utf-8")
        return page

    def page(self) -> str:
        """The results as a page of Markdown."""
        lines = [f"# {self.title}", "", f"`{self.command}`", ""]
        lines += [", ".join(f"{name} {value}" for name, value in facts.items()) for facts in (self.machine, self.work)]
        lines += [
            "",
            "Medians; `of base` is the median over the turns of the ratio within one turn. Byte limit: what",
        ]
        lines += [
            "is left if reading weights were all: base / (base + experts) bytes a token. Memory:",
            "peak over base + experts.",
            "",
        ]
        lines += ["## Targets", ""]
        lines += ["| what | limit | aim | measured | verdict |", "|---|---:|---:|---:|---|"]
        for judged in self.targets:
            target, found = judged.target, "" if judged.measured is None else f"{judged.measured:.3f}"
            bounds = f"{target.bound(target.limit)} | {target.bound(target.aim)}"
            lines.append(f"| {target.what} | {bounds} | {found} | {judged.verdict} |")
        lines += ["", f"| {' | '.join(HEADS)} |", "|---" + "|---:" * (len(HEADS) - 1) + "|"]
        lines += [f"| {' | '.join(line.cells())} |" for line in self.lines]
        if self.skipped:
            lines += ["", "## Left out", "", *(f"- {name}: {why}" for name, why in self.skipped.items())]
        return "\n".join(lines) + "\n"
