"""How many rows are answered, and how fast: a live line on a terminal, a plain one now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0


class RowsProgress:
    """Told after each batch.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            BarColumn(),
            TextColumn("row {task.completed}/{task.total}  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("rows", total=None, rate="")
        self._began: tuple[float, int] | None = None
        self._said = 0.0

    def __enter__(self) -> "RowsProgress":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def answered(self, done: int, of: int) -> None:
        """So many rows are answered; the first call says how many were so before."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._said = (now, done), now
            if done:
                self._console.print(f"{done:,} of {of:,} rows were answered before")
        since, before = self._began
        rate = f"{(done - before) / (now - since):.2f} rows/s" if done > before else ""
        self._progress.update(self._task, completed=done, total=of, rate=rate)
        if not self._console.is_terminal and done > before and (now - self._said >= PLAIN_EVERY_SECONDS or done == of):
            self._said = now
            self._console.print(f"row {done}/{of}  {rate}")
