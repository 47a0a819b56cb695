"""How many tokens have gone through the model: a live line on a terminal, a plain one now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0


class TokensProgress:
    """Told as tokens go through the model.

    Args:
        console: where to write.
        total: tokens in all.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._said = time.monotonic()
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("tokens", total=total)

    def __enter__(self) -> "TokensProgress":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def went(self, tokens: int) -> None:
        """So many more tokens went through."""
        self._done += tokens
        self._progress.update(self._task, completed=self._done)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said >= PLAIN_EVERY_SECONDS:
            self._said = now
            self._console.print(f"{self._done:,} of {self._total:,} tokens", highlight=False)
