"""The page of `lmoe watch` in a browser: it follows the run, keeps what was chosen, and says when the run has ended."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmoe.report.routing_file import write_routing
from lmoe.watch import run_page
from lmoe.watch.run_page import RunPage
from lmoe.watch.server import PageServer
from tests.browser.harness import OpenPage
from tests.report.routing import made_up
from tests.watch.runs import cut_metrics, under_way

Open = Callable[..., OpenPage]
DOMAINS = ("code", "math", "words")
STATE = "document.getElementById('state').textContent"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return under_way(finished_run, tmp_path / "run", steps=2)


@pytest.fixture
def address(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the run is served; its page asks often."""
    monkeypatch.setattr(run_page, "OFTEN", 0.1)
    monkeypatch.setattr(run_page, "SELDOM", 0.2)
    monkeypatch.setattr(run_page, "REST", 0)
    with served(run) as server:
        yield server.url


@contextmanager
def served(run: Path) -> Iterator[PageServer]:
    """A server of a run inside the block."""
    server = PageServer(RunPage(run), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_page_follows_the_run_and_keeps_what_was_chosen(
    open_page: Open, address: str, run: Path, finished_run: Path
) -> None:
    opened = open_page(address)
    page = opened.page
    assert page.inner_text("#state").startswith("Step 2 of 6; the newest numbers are ")
    page.click("#tab-view-sites")
    page.locator(".chooser [role=option]").nth(2).click()
    page.locator("#table-sites th button").nth(2).click()
    page.locator("#step").fill("0")
    history = made_up(steps=4, every=1, domains=DOMAINS, seed=1)
    write_routing(history, run / "report")
    cut_metrics(finished_run, run, 4)
    opened.until("document.getElementById('step').max === '3'")
    assert page.inner_text("#state").startswith("Step 4 of 6")
    assert page.inner_text("#step-said").startswith("1 of 6")  # who looks back stays there
    assert page.locator(".chooser [aria-selected=true]").get_attribute("data-site") == "1"
    assert page.locator("#table-sites th").nth(2).get_attribute("aria-sort") == "descending"
    page.locator("#step").fill("3")
    write_routing(made_up(steps=5, every=1, domains=DOMAINS, seed=1), run / "report")
    opened.until("document.getElementById('step').max === '4'")
    assert page.inner_text("#step-said").startswith("5 of 6")  # who looks at the newest goes on with it
    page.click("#tab-view-run")
    assert (
        page.locator("[data-table=facts] tr", has_text="optimizer steps").locator("td").nth(1).inner_text() == "4 of 6"
    )


def test_when_the_run_has_ended_the_page_says_so_and_has_what_a_finished_run_has(
    open_page: Open, address: str, run: Path, finished_run: Path
) -> None:
    opened = open_page(address, dark=True)
    page = opened.page
    page.click("#tab-view-gates")
    shutil.rmtree(run / "report")
    shutil.copytree(finished_run / "report", run / "report")
    shutil.copy(finished_run / "metrics.csv", run)
    opened.until(f"{STATE} === 'The run has ended: all steps done.'")
    assert page.locator("#view-gates").is_visible()  # what was chosen is kept when the page is loaded anew
    assert page.locator("#table-gates tbody tr").count() == 6
    assert opened.faults() == [] and not opened.overflows()


def test_a_server_that_is_gone_is_said_and_what_was_known_stays(browser, address: str, run: Path, monkeypatch) -> None:
    opened = OpenPage(browser, address)

    def fail(self, version: str):
        raise ConnectionError

    monkeypatch.setattr(RunPage, "news", fail)
    opened.until("document.getElementById('state').textContent.startsWith('lmoe watch does not answer')")
    assert opened.page.locator("[data-table=facts] tr").count() >= 4
    opened.close()


def test_what_goes_wrong_on_the_page_is_not_said_of_the_server(browser, address: str, run: Path, finished_run: Path):
    opened = OpenPage(browser, address)
    opened.page.evaluate("void (page.news = () => { throw new Error('of the page') })")
    cut_metrics(finished_run, run, 4)
    opened.until(f"{STATE}.startsWith('Step 4 of 6')")
    opened.page.wait_for_timeout(500)  # it goes on asking
    assert opened.page.inner_text("#state").startswith("Step 4 of 6")
    assert any("of the page" in error for error in opened.errors)
    opened.close()


def test_what_was_chosen_for_one_run_is_not_taken_for_another_at_the_same_address(
    browser, run: Path, finished_run: Path, tmp_path: Path
) -> None:
    other = under_way(finished_run, tmp_path / "other")
    with served(run) as server:
        opened = OpenPage(browser, server.url)
        opened.page.click("#tab-view-sites")
        opened.page.locator("#table-sites th button").nth(2).click()
        opened.page.reload()
        assert opened.page.locator("#view-sites").is_visible()
        server.page = RunPage(other)
        opened.page.reload()
        assert opened.page.locator("#view-run").is_visible()
        opened.page.click("#tab-view-sites")
        assert opened.page.locator("#table-sites th[aria-sort]").count() == 0
    opened.close()


def test_before_there_are_numbers_the_page_is_there_and_grows_when_they_come(
    open_page: Open, address: str, run: Path, finished_run: Path
) -> None:
    shutil.rmtree(run / "report")
    (run / "metrics.csv").unlink()
    page = open_page(address).page
    assert page.inner_text("#state") == "The run has no numbers yet."
    assert page.locator("[role=tab]").all_inner_texts() == ["What ran", "Figures and files"]
    write_routing(made_up(domains=DOMAINS), run / "report")
    cut_metrics(finished_run, run, 1)
    page.wait_for_selector("#tab-view-sites")
    page.click("#tab-view-losses")
    assert page.locator("#chart-losses").is_visible()
