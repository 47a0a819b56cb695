"""How many tokens have gone through the model."""

from rich.console import Console

from lmoe.cli.live_line import LiveLine


class TokensProgress(LiveLine):
    """Told as tokens go through the model.

    Args:
        console: where to write.
        total: tokens in all.
    """

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, "{task.completed:,.0f} of {task.total:,.0f} tokens")
        self._total, self._done = total, 0
        self._task = self._progress.add_task("tokens", total=total)

    def went(self, tokens: int) -> None:
        """So many more tokens went through."""
        self._done += tokens
        self._progress.update(self._task, completed=self._done)
        if self._says():
            self._console.print(f"{self._done:,} of {self._total:,} tokens", highlight=False)
