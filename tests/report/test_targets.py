"""What routers chose of what they are taught: in the table at the end, on the page, in pictures and in summary.json."""

from dataclasses import replace
from pathlib import Path

import pytest

from lmoe.errors import CheckpointError
from lmoe.report.page import CAPTIONS, CAPTIONS_OF_ONE, SCRIPTS, write_page
from lmoe.report.pictures import load_by_domain, load_by_site, write_pictures
from lmoe.report.summary import RunSummary
from lmoe.report.table import MAX_TARGETS
from lmoe.report.target_maps import cluster_domains, target_choices
from lmoe.report.targets import TargetReport
from lmoe.report.wording import experts
from tests.report.html_page import ParsedPage
from tests.report.test_pictures import texts
from tests.report.test_tables import cells, printed


@pytest.fixture
def report() -> TargetReport:
    """Eight rows of three targets, one of which no row has, and two of a domain that none is."""
    return TargetReport(
        kind="domain",
        targets=["code", "math", "sql"],
        sites=6,
        rows=[6, 2, 0],
        chosen=[[0.75, 0.05, 0.2], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]],
        untrained=["chat"],
        untrained_rows=[2],
        untrained_chosen=[[0.1, 0.9, 0.0]],
        accuracy=0.6875,
        agreement=0.4321,
    )


@pytest.fixture
def clusters(report: TargetReport) -> TargetReport:
    """The same where clusters are the targets, beside the domains of the training rows."""
    names = ["cluster0", "cluster1", "cluster2"]
    told = {"domains": ["$chat$", "code"], "cluster_rows": [[3, 1, 0], [0, 0, 6]], "cluster_agreement": 0.75}
    return replace(report, kind="cluster", targets=names, **told)


def page_of(summary: RunSummary, folder: Path, **pictures: Path) -> ParsedPage:
    return ParsedPage(write_page(summary, {}, pictures, folder).read_text(encoding="utf-8"))


ROWS = [
    ["code", "6", "75.0%", "sql 20.0%"],
    ["math", "2", "50.0%", "code 50.0%"],
    ["sql", "0", "-", "-"],
    ["chat (not trained)", "2", "-", "math 90.0%"],
]


def test_accuracy_stands_beside_that_of_always_the_largest_target_in_the_table_and_on_the_page(
    summary: RunSummary, report: TargetReport, tmp_path: Path
) -> None:
    assert report.largest == 0.75
    summary.targets = report
    summary.domains = []  # so that no other table has rows of these names
    text, page = printed(summary, []), page_of(summary, tmp_path)
    for row in ROWS:
        assert cells(text, row[0]) == row
        assert row in page.rows
    for line in (
        "target chosen for 68.8% of 8 rows (mean over 6 routers)",
        "always the largest target: 75.0%",
        "adjusted mutual information of experts and domains: 0.432",
    ):
        assert line in text and line in page.text().lower()
    summary.targets = None
    assert "Targets of the routers" not in page_of(summary, tmp_path).text()
    assert "largest target" not in printed(summary, [])


def test_rows_without_any_target_have_no_accuracy(summary: RunSummary, report: TargetReport) -> None:
    summary.targets = replace(report, rows=[0, 0, 0], accuracy=None)
    text = printed(summary, [])
    assert "no row has a target" in text and "largest target" not in text


def test_of_many_targets_those_with_the_fewest_right_choices_are_listed(summary: RunSummary) -> None:
    count = MAX_TARGETS + 8
    chosen = [[0.0] * count for _ in range(count)]
    for c in range(count):
        chosen[c][c] = c / count
    names = [f"target{c}" for c in range(count)]
    summary.targets = TargetReport(kind="domain", targets=names, sites=1, rows=[1] * count, chosen=chosen, accuracy=0.5)
    text = printed(summary, [])
    assert f"the {MAX_TARGETS} of {count} with the fewest right choices" in text
    assert "target31" in text and "target32" not in text


def test_the_picture_has_a_row_for_each_target_with_rows_and_for_domains_that_none_is(report: TargetReport) -> None:
    figure = target_choices(report)
    seen = texts(figure)
    assert {"code  6", "math  2", "chat (not trained)  2", "code", "math", "sql"} <= set(seen)
    assert "sql  0" not in seen
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "5", "20", "50", "50", "0", "10", "90", "0"]
    assert any("mean of 6 routers" in text for text in seen)
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == [2]  # type: ignore[index]
    empty = replace(report, rows=[0, 0, 0], untrained=[], untrained_rows=[], untrained_chosen=[])
    assert texts(target_choices(empty)) == ["No validation row was routed."]


def test_clusters_are_shown_beside_the_domains_of_the_training_rows(
    summary: RunSummary, clusters: TargetReport, tmp_path: Path
) -> None:
    figure = cluster_domains(clusters)
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "0", "0", "0", "100"]
    assert {r"\$chat\$  4", "code  6", "cluster2"} <= set(texts(figure))
    summary.targets = clusters
    text = printed(summary, [])
    assert "clusters and domains (training rows): 0.750" in text
    assert cells(text, "chat (no cluster)")[-1] == "cluster1 90.0%"
    assert {"target_choices", "cluster_domains"} <= {*write_pictures(summary, {}, tmp_path)} & {*CAPTIONS}


def test_many_targets_can_be_drawn(report: TargetReport, tmp_path: Path) -> None:
    count = 100
    many = replace(
        report, targets=[f"t{c}" for c in range(count)], rows=[1] * count, chosen=[[1 / count] * count] * count
    )
    figure = target_choices(many)
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_yticklabels()) == 64 and any("the first 64" in text for text in texts(figure))


def test_json_keeps_the_targets_and_what_is_none_is_one_clear_error(
    summary: RunSummary, clusters: TargetReport, tmp_path: Path
) -> None:
    summary.targets, summary.sites_of_one_router = clusters, 18
    path = summary.to_json(tmp_path / "summary.json")
    assert RunSummary.from_json(path) == summary
    for wrong in ('{"kind": 1}', "[1]", "3"):
        whole = path.read_text(encoding="utf-8")
        start, end = whole.index('"targets": {'), whole.index(',\n "sites_of_one_router"')
        (tmp_path / "wrong.json").write_text(whole[:start] + f'"targets": {wrong}' + whole[end:], encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"wrong\.json is no summary of a run .*: targets"):
            RunSummary.from_json(tmp_path / "wrong.json")


def test_one_router_for_many_sites_reads_as_one(summary: RunSummary, tmp_path: Path) -> None:
    loads = {"model": [0.4, 0.3, 0.295, 0.005]}
    summary.site_load, summary.domain_load = loads, dict.fromkeys(summary.domains, loads)
    summary.coactivation, summary.sites_of_one_router = {}, 6
    assert experts(summary) == "4 experts at each of 6 sites, chosen by one router for the whole model"
    text = printed(summary, [])
    assert cells(text, "0") == ["0", "40.0%", "#" * 20, ""]
    summary.site_load["model"] = [0.4, 0.3, 0.299, 0.001]
    assert cells(printed(summary, []), "3")[-1] == "dead"
    assert "over the sites" not in text
    assert not any("by site" in seen for seen in texts(load_by_site(summary)))
    assert not any("How far each site" in seen for seen in texts(load_by_domain(summary)))
    page = page_of(summary, tmp_path, load_by_site=tmp_path / "load_by_site.png")
    assert CAPTIONS_OF_ONE["load_by_site"][0] in page.text() and "Load by site" not in page.text()
    summary.site_load = {f"l.{n}.up": [0.25] * 4 for n in range(2)}
    assert "Load by site" in page_of(summary, tmp_path, load_by_site=tmp_path / "load_by_site.png").text()


def test_names_of_targets_cannot_inject_markup(summary: RunSummary, report: TargetReport, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\""
    summary.targets = replace(report, targets=[evil, "[bold]math[/x]", "sql"], untrained=[evil])
    page = page_of(summary, tmp_path)
    assert page.tags.count("script") == 1 + len(SCRIPTS) and page.text().count(evil) >= 2
    assert "[bold]math[/x]" in printed(summary, [])
