"""The names in docs/METRICS.md, and those in a metrics.csv."""

import csv
import re
from pathlib import Path

METRICS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "METRICS.md"


def documented() -> list[re.Pattern[str]]:
    """A pattern for each name in the first column of a table of docs/METRICS.md.

    `val/<domain>/loss` stands for any domain, `routing/{entropy,cv}` for both names.
    """
    patterns = []
    for line in METRICS_PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            continue
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            plain = re.escape(name)
            plain = re.sub(r"<[^>]+>", "[^/]+", plain.replace(r"\\<", "<").replace(r"\\>", ">"))
            plain = re.sub(r"\\{(.+?)\\}", lambda m: f"(?:{m.group(1).replace(',', '|')})", plain)
            patterns.append(re.compile(plain))
    return patterns


def undocumented(names: list[str]) -> list[str]:
    """Names that no row of the page describes."""
    patterns = documented()
    assert len(patterns) >= 10
    return [name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)]


def rows(run: Path) -> list[dict[str, float]]:
    """metrics.csv of a run, empty cells left out."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def names(run: Path) -> list[str]:
    """The metrics that a run logged."""
    return sorted({name for row in rows(run) for name in row} - {"step"})
