from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from lmoe.report.curves import Curves
from lmoe.report.page import SCRIPTS, page_content, write_page
from lmoe.report.summary import RunSummary

VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """Text of every table row, links, tags; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def render(summary: RunSummary, metrics: Curves, folder: Path) -> Page:
    pictures = {name: folder / f"{name}.png" for name in ("load_by_site", "load_by_domain", "loss_curves")}
    path = write_page(
        summary, metrics, pictures, folder, ["lmoe generate --checkpoint x --prompt 'a < b'", "lmoe chat"]
    )
    assert path == folder / "index.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_has_losses_facts_routing_and_the_next_command(
    summary: RunSummary, metrics: Curves, tmp_path: Path
) -> None:
    page = render(summary, metrics, tmp_path)
    assert ["code", "4.000", "3.000", "-1.000", "-25.0%"] in page.rows
    assert ["mean over domains", "5.000", "4.583", "-0.417", "-8.3%"] in page.rows
    assert ["experts", "4 experts at each of 6 sites"] in page.rows
    assert ["phases", "router_warmup from step 1, experts from step 16"] in page.rows
    assert ["time", "2 min 20 s"] in page.rows
    assert any(row[:3] == ["routing/entropy", "1.375", "1.125"] for row in page.rows)
    assert any(row[:3] == ["routing/dead", "0.000", "2.000"] for row in page.rows)
    assert not any(row[0] == "routing/cv" for row in page.rows)
    assert ["optimizer steps", "150"] in page.rows and ["ended", "all steps done"] in page.rows
    assert "lmoe generate --checkpoint x --prompt 'a < b'\nlmoe chat" in page.text
    for name in ("adapter/", "checkpoints/", "metrics.csv", "report/"):
        assert any(row[0] == name for row in page.rows)


def test_pictures_are_linked_relatively_and_nothing_is_external(
    summary: RunSummary, metrics: Curves, tmp_path: Path
) -> None:
    page = render(summary, metrics, tmp_path / "a b")
    assert set(page.links) == {"load_by_site.png", "load_by_domain.png", "loss_curves.png"}
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    elsewhere = write_page(summary, {}, {"loss_curves": tmp_path / "other dir" / "x.png"}, tmp_path / "report")
    assert Page(elsewhere.read_text()).links == ["../other%20dir/x.png"] * 2


def test_names_cannot_inject_markup(summary: RunSummary, metrics: Curves, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\""
    plain = render(summary, metrics, tmp_path)
    summary.name = summary.run_dir = summary.backbone = evil
    summary.domains = [evil]
    summary.before = summary.after = {evil: 1.0}
    summary.phases = {evil: 0}
    summary.collapsed = [evil]
    summary.knock_out, summary.specialisation = {evil: {evil: 1.0}}, {evil: evil}
    page = render(summary, metrics, tmp_path)
    assert page.tags.count("script") == plain.tags.count("script") == 1 + len(SCRIPTS)
    assert "".join(page.text).count(evil) >= 5
    assert [evil, "1.000", "1.000", "+0.000", "+0.0%"] in page.rows


def test_an_expert_stands_with_the_domain_that_needs_it_most(summary: RunSummary, tmp_path: Path) -> None:
    page = render(summary, {}, tmp_path)
    assert ["code", "no expert"] in page.rows and ["math", "no expert"] in page.rows
    assert ["sql", "all sites/3 +0.030, all sites/2 +0.020, all sites/1 +0.010"] in page.rows
    assert ["no domain", "all sites/0"] in page.rows
    summary.specialisation = {}
    assert "What each expert is for" not in render(summary, {}, tmp_path).text


def test_of_many_experts_for_one_domain_the_most_needed_are_named(summary: RunSummary, tmp_path: Path) -> None:
    summary.knock_out = {f"site/{e}": {"code": 0.001 * e} for e in range(100)}
    summary.specialisation = dict.fromkeys(summary.knock_out, "code")
    (row,) = [row for row in render(summary, {}, tmp_path).rows if row[-1].startswith("site/99 +0.099, ")]
    assert row[0] == "code" and row[1].endswith(", site/88 +0.088, and 88 more")


def test_collapse_is_on_the_page(summary: RunSummary, tmp_path: Path) -> None:
    assert "Collapse." not in render(summary, {}, tmp_path).text
    summary.collapsed = ["layers.2 sends everything to expert 1"]
    page = render(summary, {}, tmp_path)
    assert "Collapse." in page.text
    assert any("layers.2 sends everything" in text for text in page.text)


def test_a_run_without_the_adapters_off_row_has_a_page(summary: RunSummary, tmp_path: Path) -> None:
    summary.before = {}
    page = render(summary, {}, tmp_path)
    assert ["code", "-", "3.000", "-", "-"] in page.rows
    assert ["mean over domains", "-", "4.583", "-", "-"] in page.rows


def test_a_page_says_in_what_unit_losses_are(summary, tmp_path):
    for name in ("plain", "pairs", "both", "ended"):
        (tmp_path / name).mkdir()
    plain = write_page(summary, {}, {}, tmp_path / "plain").read_text("utf-8")
    assert "<p>In nats per label token; below" in plain
    pairs = replace(summary, loss_measure="loss per pair", loss_unit="pair")
    text = write_page(pairs, {}, {}, tmp_path / "pairs").read_text("utf-8")
    assert "<p>Loss per pair; below" in text and "by so much (loss per pair)" in text and "nats" not in text
    measures = {"router_warmup": "nats per label token", "experts": "loss per pair"}
    both = replace(pairs, phase_measures=measures)
    text = write_page(both, {}, {}, tmp_path / "both").read_text("utf-8")
    assert "<p>Loss per pair, of phase experts on its rows; below" in text
    assert "router_warmup from step 1 (nats per label token), experts from step 16 (loss per pair)" in text
    curves = {"val/loss": [(0, 5.0), (15, 4.0), (150, 0.5)]}
    drawn = page_content(both, curves, None, under_way=False)["data"]["losses"]["val"]
    assert drawn == [[0, 5.0], [15, 4.0], [149.5, None], [150, 0.5]]
    ended = replace(both, steps=15, loss_measure="nats per label token")
    text = write_page(ended, {}, {}, tmp_path / "ended").read_text("utf-8")
    assert "<p>In nats per label token, of phase router_warmup on its rows; below" in text
