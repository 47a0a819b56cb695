"""metrics.csv: one row a logged step, one column a metric, kept when a run resumes."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lmoe.errors import TrainingError
from lmoe.files.small_file import Reader, make_way, whole_lines

PAST = Reader(cure="move it away, and the run goes on with a new one", most=2**32, what="it")
"""How the rows of the past are read."""


class MetricsCsv(Logger):
    """Appends to metrics.csv; a metric that appears later adds a column, for which alone the file is written anew.

    Lightning's CSVLogger deletes the file when it finds it, and a resumed run would lose its past.

    Args:
        path: the file.
        resume_step: rows after this step are dropped (a run that resumes makes them again), and so is a last row that a
            crash has torn; None: a new file.

    Raises:
        CheckpointError: the rows of the past cannot be read.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = ["step"]
        self._last: dict[str, Any] | None = None  # row of the latest step, which further metrics of it complete
        self._last_at = 0  # where it begins in the file, in bytes
        self._begun = False
        if resume_step is not None and path.exists():
            self._columns = self._header()
            self._write_anew(row for row in self._rows() if _step(row) <= resume_step)

    @staticmethod
    def check(path: Path) -> None:
        """Read the rows of the past, and change nothing.

        Raises:
            CheckpointError: they cannot be read.
        """
        for _ in _cells(path):
            pass

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
        same_step = self._last is not None and _step(self._last) == (step or 0)
        row = (self._last or {}) | values if same_step else {"step": step or 0, **values}
        known = set(self._columns)
        fresh = [name for name in row if name not in known]
        if self._begun and self.path.exists() and not fresh:
            self._put(row, self._last_at if same_step else None)
            return
        self._columns += fresh
        past = self._rows(self._last_at if same_step else None) if self._begun and self.path.exists() else ()
        self._write_anew((*past, row))

    @rank_zero_only
    def forget(self, prefix: str, step: int) -> None:
        """Take metrics back from the row of a step, where it is the last one; a row of which nothing is left goes."""
        if self._last is None or _step(self._last) != step:
            return
        kept = {name: value for name, value in self._last.items() if not name.startswith(prefix)}
        if len(kept) == len(self._last):
            return
        if len(kept) > 1:
            self._put(kept, self._last_at)
            return
        with self._named_errors():
            os.truncate(self.path, self._last_at)
        self._last = None

    def _put(self, row: dict[str, Any], at: int | None) -> None:
        """Write one row over the one that begins `at`, or behind all others.

        NOTE the new bytes go over the old ones before what is left of these is cut off: a kill loses no row.
        """
        with self._named_errors(), open(self.path, "r+b") as file:
            self._last_at = file.seek(0, os.SEEK_END) if at is None else file.seek(at)
            file.write(self._line(row))
            file.truncate()
        self._last = row

    def _write_anew(self, rows: Iterable[dict[str, Any]]) -> None:
        """NOTE under another name first: a kill or a full disk must not take the rows of the past."""
        partial, last, begins = self.path.with_suffix(".partial"), None, 0
        with self._named_errors():
            make_way(partial)
            with open(partial, "wb") as file:
                file.write(_text(self._columns))
                for last in rows:
                    begins = file.tell()
                    file.write(self._line(last))
            os.replace(partial, self.path)
        self._last, self._last_at, self._begun = last, begins, True

    def _line(self, row: dict[str, Any]) -> bytes:
        return _text([row.get(name, "") for name in self._columns])

    def _header(self) -> list[str]:
        return next(_cells(self.path), ["step"])

    def _rows(self, end: int | None = None) -> list[dict[str, Any]]:
        """The rows of the file without their empty cells; those that begin before `end`."""
        reader = _cells(self.path, end)
        header = next(reader, [])
        return [{name: cell for name, cell in zip(header, cells, strict=False) if cell} for cells in reader]

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror or error}") from None


def _cells(path: Path, end: int | None = None) -> Iterator[list[str]]:
    """The cells of each whole line, of those that begin before `end`."""
    return PAST.rows(whole_lines(PAST.decoded(PAST.bytes_of(path)[:end], path)), path)


def _text(cells: list[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().encode("utf-8")


def _step(row: dict[str, Any]) -> int:
    try:
        return int(float(row["step"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return 2**62  # a damaged line belongs to no step
