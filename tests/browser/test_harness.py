"""What the tests of pages rest on: faults of a page are seen."""

from collections.abc import Callable
from pathlib import Path

from tests.browser.harness import OpenPage

FAULTY = """<!DOCTYPE html><html><head></head><body>
<button></button><img src="http://127.0.0.1:9/a.png"><div style="width: 900px">wide</div>
<script>console.error("said"); throw new Error("thrown");</script></body></html>"""


def test_errors_requests_faults_and_overflow_of_a_page_are_seen(browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(FAULTY)
    page = OpenPage(browser, tmp_path / "page.html", width=360)
    assert "said" in page.errors and any("thrown" in error for error in page.errors)
    assert page.requests == ["http://127.0.0.1:9/a.png"] and page.overflows()
    found = {fault.partition(":")[0] for fault in page.faults()}
    assert {"button-name", "document-title", "html-has-lang"} <= found
    page.close()


def test_charts_can_be_drawn_in_a_page_whose_policy_lets_nothing_else_run(
    open_page: Callable[..., OpenPage], tmp_path: Path, monkeypatch
) -> None:
    from lmoe.report import html

    own = 'new Chart(document.querySelector("main").appendChild(document.createElement("canvas")), page.data());'
    html.environment()  # made once, and not of the folder that stands for the pages below
    monkeypatch.setattr(html, "PAGES", tmp_path)
    pages = Path(html.__file__).parent / "pages"
    (tmp_path / "vendor").mkdir()
    for name in ("page.js", "vendor/chart.umd.min.js"):
        (tmp_path / name).write_text((pages / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "own.js").write_text(own)
    chart = {
        "type": "line",
        "data": {"labels": [1, 2], "datasets": [{"data": [3, 4]}]},
        "options": {"animation": False},
    }
    scripts = ["page.js", "vendor/chart.umd.min.js", "own.js"]
    (tmp_path / "page.html").write_text(html.render("base.html.jinja", title="a", data=chart, scripts=scripts))
    page = open_page(tmp_path / "page.html").page
    assert page.evaluate("Chart.getChart(document.querySelector('canvas')).data.datasets[0].data.length") == 2
