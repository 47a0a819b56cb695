"""A page in a browser, as a test sees it: errors on its console, what it asks for, what keeps people out of it."""

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
SERIOUS = ("serious", "critical")
"""Impacts of a fault that a page must not have."""


class OpenPage:
    """A page that was opened from disk without a network, or from a server on this machine.

    Args:
        browser: of playwright.
        place: the page's file, or its address at a server.
        width, height: of the window, in CSS pixels.
        dark: the reader prefers dark colours.
        scripts: scripts run.

    Attributes:
        page: of playwright.
        errors: errors on the console, and those that nothing caught.
        requests: what the page asked for beside itself; of a server's page, beside that server.
    """

    def __init__(
        self,
        browser: Any,
        place: Path | str,
        *,
        width: int = 1200,
        height: int = 800,
        dark: bool = False,
        scripts: bool = True,
    ) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._context = browser.new_context(
            offline=isinstance(place, Path),
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
        )
        self.page = self._context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._address = place.resolve().as_uri() if isinstance(place, Path) else place
        self.page.on("request", lambda asked: self._is_own(asked.url) or self.requests.append(asked.url))
        self.page.goto(self._address)

    def _is_own(self, url: str) -> bool:
        own, asked = urlsplit(self._address), urlsplit(url)
        if own.scheme == "file":
            return asked._replace(fragment="") == own._replace(fragment="")
        return (asked.scheme, asked.netloc) == (own.scheme, own.netloc) or url == "data:,"

    def close(self) -> None:
        """Close the page and all that belongs to it."""
        self._context.close()

    def until(self, expression: str, seconds: float = 15) -> None:
        """Wait until an expression is true in the page, which may be loaded anew meanwhile; its policy forbids
        playwright's own way, which evaluates a text in the page."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.page.evaluate(expression):
                    return
            except Exception as error:  # of playwright, which is not imported here
                if "context" not in str(error) and "navigat" not in str(error):
                    raise
            time.sleep(0.05)
        raise AssertionError(f"after {seconds} s not true: {expression}")

    def faults(self) -> list[str]:
        """Serious faults that axe-core finds in the page as it is now: rule, and where."""
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{fault['id']}: {node['target']} {node.get('failureSummary', '')}"
            for fault in found["violations"]
            if fault["impact"] in SERIOUS
            for node in fault["nodes"]
        ]

    def overflows(self) -> bool:
        """Whether the body scrolls sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")

    def colour(self, selector: str, name: str = "background-color") -> str:
        """A colour of the first element that a selector finds, as the browser computes it."""
        return self.page.eval_on_selector(selector, "(element, name) => getComputedStyle(element)[name]", name)
