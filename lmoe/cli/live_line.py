"""A line that says how far something is: live on a terminal, a plain one now and then elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0


class LiveLine:
    """What all such lines share.

    Args:
        console: where to write.
        text: of the live line, in the words of rich's TextColumn.
    """

    def __init__(self, console: Console, text: str) -> None:
        self._console, self._said = console, time.monotonic()
        self._progress = Progress(BarColumn(), TextColumn(text), TimeRemainingColumn(), console=console, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def _says(self, *, anyway: bool = False) -> bool:
        """Whether a plain line is due, which is then taken for said.

        Args:
            anyway: whenever the last one was.
        """
        now = time.monotonic()
        if self._console.is_terminal or not (anyway or now - self._said >= PLAIN_EVERY_SECONDS):
            return False
        self._said = now
        return True
