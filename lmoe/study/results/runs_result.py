"""What a comparison of runs has found: compare.json and compare.csv, and the tables for the terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lmoe.files.wording import shown
from lmoe.report.files import write_bytes
from lmoe.report.wording import counted
from lmoe.statistics.strata import Floats
from lmoe.statistics.verdict import Judged, Verdict
from lmoe.study.results.csv_tables import as_csv
from lmoe.study.results.result import ComparisonResult, comparison_result, finite
from lmoe.study.results.tables import COULD_SEE, P, Rows, p_text, rich_table

JSON_FILE, CSV_FILE = "compare.json", "compare.csv"
FORMAT_VERSION = 1
OVER_ROWS = "over rows alone"
"""Column: the interval of these very models."""
SHORT: Mapping[str, str] = {
    Verdict.TOO_FEW_SEEDS: str(Verdict.TOO_FEW_SEEDS),
    Verdict.UNDECIDED: "cannot be told",
}
"""Verdicts whose sentence the columns say."""
MOST_SETTINGS = 8
"""Of an arm that the terminal shows."""


@dataclass(slots=True, kw_only=True)
class RunsComparison(ComparisonResult):
    """An arm beside the baseline, with what can be said of these very models."""

    rows_low: float
    """Of the interval over rows alone: the difference of these models on other rows, whatever other seeds give."""
    rows_high: float
    """Likewise."""

    @classmethod
    def of(cls, judged: Judged, arm: str, domain: str | None, over_rows: tuple[Floats, Floats]) -> "RunsComparison":
        """A comparison that was judged.

        Args:
            domain: None: the mean over domains.
            over_rows: see `rows_interval`.
        """
        low, high = over_rows
        return cls(**asdict(comparison_result(judged, arm, domain)), rows_low=float(low), rows_high=float(high))


@dataclass(slots=True, kw_only=True)
class RunsArm:
    """One arm."""

    name: str
    """In tables."""
    differs: dict[str, Any]
    """The settings in which some arm differs from another."""
    runs: list[str]
    """Run directories, by their seeds."""
    seeds: list[int]
    """Of the runs."""
    losses: list[float]
    """Of each run: mean over domains of the loss per label token, in nats."""
    loss: float
    """Mean over the runs."""
    domain_losses: dict[str, float]
    """By domain, mean over the runs."""


@dataclass(slots=True, kw_only=True)
class RunsResult:
    """All of a comparison."""

    format_version: int = FORMAT_VERSION
    """Of compare.json."""
    data: str
    """judge, val, or where the rows are."""
    rows: int
    """Rows that all runs are compared on."""
    tokens: int
    """Their label tokens."""
    digest: str
    """Of the names of these rows."""
    left_out: int
    """Rows that could not be compared."""
    judged_before: dict[str, int]
    """Models that these judging rows have judged, by study or comparison; empty for other rows."""
    domains: dict[str, int]
    """Rows of each domain."""
    baseline: str
    """Name of the arm that the others are beside."""
    margin: float
    """Arms are equivalent within it, in nats."""
    alpha: float
    """Of each family of comparisons."""
    arms: list[RunsArm]
    """The baseline first."""
    primary: list[RunsComparison]
    """Each arm beside the baseline on the mean over domains: one family."""
    by_domain: list[RunsComparison]
    """Each arm in each domain: another family; empty with a single domain."""
    notes: list[str]
    """What a reader has to know."""

    def write(self, folder: Path) -> list[Path]:
        """Write compare.json and compare.csv, each whole or not at all.

        Returns:
            The files.

        Raises:
            TrainingError: one cannot be written.
        """
        text = json.dumps(finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)
        return [
            write_bytes(folder / JSON_FILE, (text + "\n").encode("utf-8")),
            write_bytes(folder / CSV_FILE, as_csv(self._csv_rows()).encode("utf-8")),
        ]

    def _csv_rows(self) -> list[list[Any]]:
        numbers = ("estimate", "low", "high", "rows_low", "rows_high", "difference_p", "equivalence_p")
        found: list[list[Any]] = [["arm", "domain", "seeds", "loss", *numbers, "verdict"]]
        for arm in self.arms:
            for domain, loss in [("", arm.loss), *(arm.domain_losses.items() if self.by_domain else ())]:
                own = next((c for c in [*self.primary, *self.by_domain] if _is(c, arm.name, domain)), None)
                values = [None if own is None else getattr(own, name) for name in numbers]
                verdict = "baseline" if own is None else own.verdict
                seeds = len(arm.seeds) if own is None else own.seeds
                found.append([arm.name, domain, seeds, loss, *values, verdict])
        return found

    def tables(self, *, by_domain: bool) -> Group:
        """The tables for the terminal: the arms, their verdicts, those of each domain if asked for, and the notes."""
        what = {"judge": "judging rows", "val": "validation rows"}.get(self.data, f"rows of {self.data}")
        head = f"{self.rows:,} {what} of {counted(len(self.domains), 'domain')}, {self.tokens:,} label tokens"
        parts: list[RenderableType] = [Text(), Text(head, "bold"), Text()]
        mean = ", mean over domains" if len(self.domains) > 1 else ""
        parts.append(rich_table(f"Loss per label token{mean}, less that of {self.baseline}", self._verdict_rows()))
        if by_domain and self.by_domain:
            parts += [Text(), rich_table("By domain", self._domain_rows())]
        parts.append(Text())
        for arm in self.arms:
            said = [f"{key}={shown(value)}" for key, value in arm.differs.items()]
            more = f", and {len(said) - MOST_SETTINGS} more" if len(said) > MOST_SETTINGS else ""
            settings = "" if said == [arm.name] else f" ({', '.join(said[:MOST_SETTINGS])}{more})"
            parts.append(Text(f"{arm.name}: {', '.join(arm.runs)}{settings}"))
        parts += [Text(f"note: {note}") for note in self.notes]
        return Group(*parts)

    def _verdict_rows(self) -> Rows:
        columns = _columns(self.primary, self.alpha)
        rows = [["arm", "loss", "seeds", *columns]]
        for arm in sorted(self.arms, key=lambda arm: arm.loss):
            own = next((found for found in self.primary if found.arm == arm.name), None)
            seeds = len(arm.seeds) if own is None else own.seeds
            rows.append([arm.name, f"{arm.loss:.4f}", str(seeds), *_cells(own, columns)])
        return rows

    def _domain_rows(self) -> Rows:
        columns = _columns(self.by_domain, self.alpha)
        rows = [["arm", "domain", "loss", *columns]]
        for arm in self.arms:
            for domain in self.domains:
                own = next((found for found in self.by_domain if _is(found, arm.name, domain)), None)
                rows.append([arm.name, domain, f"{arm.domain_losses[domain]:.4f}", *_cells(own, columns)])
        return rows


def _columns(comparisons: Sequence[RunsComparison], alpha: float) -> list[str]:
    """What stands behind the loss: the interval over seeds and rows where there is one, and that over rows alone, of
    these very models, where there are too few seeds for a verdict."""
    level = f"{100 * (1 - alpha):g} %"
    columns = ["difference"]
    if any(found.low is not None for found in comparisons):
        columns.append(f"{level} interval")
    if any(found.verdict == Verdict.TOO_FEW_SEEDS for found in comparisons):
        columns.append(OVER_ROWS)
    if any(found.difference_p is not None for found in comparisons):
        columns.append(P)
    if any(found.verdict == Verdict.UNDECIDED for found in comparisons):
        columns.append(COULD_SEE)
    return [*columns, "verdict"]


def _cells(found: RunsComparison | None, columns: Sequence[str]) -> list[str]:
    if found is None:
        return [""] * (len(columns) - 1) + ["baseline"]
    cells = []
    for name in columns[:-1]:
        if name == "difference":
            cells.append(f"{found.estimate:+.4f}")
        elif name == P:
            cells.append("" if found.difference_p is None else p_text(found.difference_p))
        elif name == COULD_SEE:
            cells.append("" if found.smallest_effect is None else f"{found.smallest_effect:.2g}")
        elif name == OVER_ROWS:
            cells.append(f"{found.rows_low:+.4f} to {found.rows_high:+.4f}")
        else:
            cells.append("" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}")
    return [*cells, SHORT.get(found.verdict, found.sentence)]


def _is(found: RunsComparison, arm: str, domain: str) -> bool:
    return found.arm == arm and (found.domain or "") == domain
