"""`lmoe watch`: the page of a run, live from its files."""

import os
import sys
import webbrowser

from lmoe.cli.errors import exit_code_of


def run(checkpoint: str, *, host: str, port: int, browser: bool) -> int:
    """Returns the exit code.

    Args:
        checkpoint: run directory.
        host, port: where it listens.
        browser: open the page.
    """

    def action() -> None:
        from rich.console import Console

        from lmoe.report.say import say
        from lmoe.watch.run_page import RunPage
        from lmoe.watch.server import PageServer, serve

        console = Console()
        server = PageServer(RunPage(checkpoint), host, port)

        def begun(url: str) -> None:
            say(console, f"watching {checkpoint} at {url} (Ctrl-C ends it)")
            if browser and has_screen():
                webbrowser.open(url)

        serve(server, begun)

    return exit_code_of(action)


def has_screen() -> bool:
    """Whether a browser can open a window here; one of the terminal would take that of this command."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
