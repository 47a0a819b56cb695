"""metrics.csv: one row a logged step, one column a metric, kept when a run resumes."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lmoe.errors import TrainingError


class MetricsCsv(Logger):
    """Appends to metrics.csv; a metric that appears later adds a column.

    Lightning's CSVLogger deletes the file when it finds it, and a resumed run would lose its past.

    Args:
        path: the file.
        resume_step: rows after this step are dropped (a run that resumes makes them again); None: a new file.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        super().__init__()
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = ["step"]
        if resume_step is not None and path.exists():
            with open(path, newline="", encoding="utf-8") as lines:
                kept = [row for row in csv.DictReader(lines) if _step(row) <= resume_step]
            self._extend_columns(kept)
            self._rows = [{k: v for k, v in row.items() if k is not None and v not in ("", None)} for row in kept]
            self._write_all()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        if not values:
            return
        same_step = bool(self._rows) and _step(self._rows[-1]) == (step or 0)
        known = len(self._columns)
        if same_step:
            self._rows[-1].update(values)
        else:
            self._rows.append({"step": step or 0, **values})
        self._extend_columns([self._rows[-1]])
        if same_step or len(self._columns) != known or not self.path.exists():
            self._write_all()
        else:
            self._append(self._rows[-1])

    def _extend_columns(self, rows: list[dict[str, Any]]) -> None:
        known = set(self._columns)
        for row in rows:
            fresh = [name for name in row if name is not None and name not in known]
            self._columns += fresh
            known.update(fresh)

    def _write_all(self) -> None:
        """NOTE under another name first: a kill or a full disk must not take the rows of the past."""
        partial = self.path.with_suffix(".partial")
        with self._named_errors():
            self._write(partial, "w", self._rows)
            os.replace(partial, self.path)

    def _append(self, row: dict[str, Any]) -> None:
        with self._named_errors():
            self._write(self.path, "a", [row])

    def _write(self, path: Path, mode: str, rows: list[dict[str, Any]]) -> None:
        with open(path, mode, newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, self._columns, restval="")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror or error}") from None


def _step(row: dict[str, Any]) -> int:
    try:
        return int(float(row["step"]))
    except (KeyError, TypeError, ValueError):
        return 2**62  # a torn last line belongs to no step
