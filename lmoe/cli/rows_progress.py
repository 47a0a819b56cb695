"""How many rows are answered, and how fast."""

import time

from rich.console import Console

from lmoe.cli.live_line import LiveLine


class RowsProgress(LiveLine):
    """Told after each batch.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, "row {task.completed}/{task.total}  {task.fields[rate]}")
        self._task = self._progress.add_task("rows", total=None, rate="")
        self._began: tuple[float, int] | None = None

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
        if done > before and self._says(anyway=done == of):
            self._console.print(f"row {done}/{of}  {rate}")
