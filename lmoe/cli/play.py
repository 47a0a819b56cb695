"""`lmoe play`: the server of `lmoe serve` with a page to try it in."""

from collections.abc import Mapping
from typing import Any

from lmoe.cli import serve

DEFAULTS: Mapping[str, Any] = {"port": 8765, "upload_size": 200_000_000}
"""Settings that are others than those of `lmoe serve`. The port is the same one at each start where it is free, since a
browser keeps what its user has saved by the address."""


def run(flags: Mapping[str, Any], settings: Mapping[str, Any], *, config: str | None, browser: bool) -> int:
    """Returns the exit code.

    Args:
        flags, settings, config: as for `lmoe serve`.
        browser: open the page in the user's browser.
    """
    return serve.run(flags, settings, config=config, play=serve.Play(defaults=DEFAULTS, browser=browser))
