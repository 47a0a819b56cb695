"""A browser for the tests of pages, where there is one.

The environment variable CHROMIUM names it, else it is `chromium` on PATH; PyPI's playwright drives it. Where one of
them is missing the tests are skipped with the reason, and with LMOE_REQUIRE_BROWSER=1 they fail.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.harness import OpenPage


def no_browser(reason: str) -> None:
    """End the test for want of a browser."""
    if os.environ.get("LMOE_REQUIRE_BROWSER") == "1":
        pytest.fail(f"LMOE_REQUIRE_BROWSER=1, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for a file of tests."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        no_browser("playwright is not installed (pip install 'lmoe[dev]')")
        return
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None or not Path(program).is_file():
        no_browser(f"there is no browser {program or 'chromium on PATH'}; CHROMIUM=PROGRAM names one")
        return
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program)
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., OpenPage]]:
    """Open a page from disk, offline, or from a server. When the test ends, no page has written an error or asked for
    anything else."""
    opened: list[OpenPage] = []

    def function(place: Path | str, **options: Any) -> OpenPage:
        opened.append(OpenPage(browser, place, **options))
        return opened[-1]

    yield function
    for page in opened:
        page.close()
    for page in opened:
        assert page.errors == [] and page.requests == [], (page.errors, page.requests)
