"""A live line with phase, step, loss and speed on a terminal; one plain line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lmoe.report.say import say

PLAIN_EVERY_SECONDS = 10.0


class ProgressLine:
    """Shows where the run is; `step` is called after every optimizer step.

    Args:
        max_steps: length of the run; `done` are those of which it was told.
        console: where to write.
        enabled: False shows messages only.
    """

    def __init__(self, max_steps: int, console: Console, *, enabled: bool) -> None:
        self.max_steps, self.console = max_steps, console
        self.done = 0
        self._live = enabled and console.is_terminal
        self._plain = enabled and not console.is_terminal
        self._last = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.fields[phase]}", markup=False),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=max_steps, phase="", loss=float("nan"))

    def __enter__(self) -> "ProgressLine":
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._progress.stop()
        sys.stdout.flush()

    def step(self, step: int, phase: str, loss: float) -> None:
        """One optimizer step is done."""
        self.done = step
        self._progress.update(self._task, completed=step, phase=phase, loss=loss)
        now = time.monotonic()
        if self._plain and (now - self._last >= PLAIN_EVERY_SECONDS or step == self.max_steps):
            self._last = now
            self.say(f"{phase}  step {step}/{self.max_steps}  loss {loss:.3f}")

    def say(self, message: str) -> None:
        """A line above the live one."""
        say(self.console, message)
