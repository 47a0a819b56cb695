"""Lines for the terminal."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Text as it is: brackets in it are no markup, numbers get no colour, and long lines stay whole for copying."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
