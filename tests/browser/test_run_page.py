"""The page of a run in a browser: what is shown is what the run kept, whatever is chosen."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmoe.report.curves import Curves
from lmoe.report.loads import short_sites
from lmoe.report.page import write_page
from lmoe.report.page_data import LONGEST_TOKEN
from lmoe.report.routing_file import RoutingHistory
from lmoe.report.summary import RunSummary
from lmoe.report.tokens import visible
from tests.browser.harness import OpenPage
from tests.report.routing import made_up

Open = Callable[..., OpenPage]
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\u202e\x00\x07\"&"
PICTURE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU\x00\x00\x00\nIDATx\x9cc`\x00"
    b"\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
)
VIEWS = ("run", "losses", "sites", "domains", "gates", "tokens", "experts", "files")


def summary_of(routing: RoutingHistory, **changes) -> RunSummary:
    domains = routing.domains
    known = RunSummary(
        name="a run",
        run_dir="outputs/a",
        domains=list(domains),
        before={domain: 4.0 + n for n, domain in enumerate(domains)},
        after={domain: 3.0 - n for n, domain in enumerate(domains)},
        site_load={site: [1 / count] * count for site, count in zip(routing.sites, routing.experts, strict=True)},
        domain_load={},
        phases=routing.phases,
        max_steps=routing.max_steps,
        seconds=1.0,
        peak_memory_mb=None,
        trainable_parameters=1,
        backbone="tiny",
        collapsed=[],
    )
    return replace(known, **changes)


def written(folder: Path, routing: RoutingHistory, metrics: Curves | None = None, **changes) -> Path:
    """A page with its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name in ("loss_curves", "load_by_site", "load_by_domain", "coactivation"):
        pictures[name] = folder / f"{name}.png"
        pictures[name].write_bytes(PICTURE)
    curves: Curves = {
        "train/loss": [(step, 3 + 1 / step) for step in range(1, routing.max_steps + 1)],
        "val/loss": [(0, 4.0), (routing.max_steps, 3.0)],
        **{f"val/{domain}/loss": [(0, 4.0), (routing.max_steps, 3.0)] for domain in routing.domains},
        "routing/entropy": [(1, 0.9), (2, 0.8)],
    }
    return write_page(summary_of(routing, **changes), metrics or curves, pictures, folder, ["lmoe chat"], routing)


@pytest.fixture
def opened(open_page: Open) -> Callable[..., OpenPage]:
    """Open a page, whose pictures may be asked for and nothing else."""
    pages: list[OpenPage] = []

    def function(file: Path, **options) -> OpenPage:
        page = open_page(file, **options)
        folder = file.parent.resolve().as_uri()
        page.requests = Pictures(folder)
        pages.append(page)
        return page

    return function


class Pictures(list):
    """Requests beside those for pictures of a folder."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def append(self, asked: str) -> None:
        if not (asked.startswith(self.folder) and asked.endswith(".png")):
            super().append(asked)


def as_shown(token: str) -> str:
    """A token on the page, which cuts long ones."""
    return visible(token if len(token) <= LONGEST_TOKEN else token[:LONGEST_TOKEN] + "…")


def show(page: OpenPage, view: str) -> None:
    page.page.click(f"#tab-view-{view}")


def slide(page: OpenPage, name: str, value: int) -> None:
    page.page.locator(f"#{name}").fill(str(value))


def table(page: OpenPage, selector: str) -> list[list[str]]:
    """Cells of the rows of a table's body."""
    read = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    return page.page.eval_on_selector_all(f"{selector} tbody tr", read)


@pytest.fixture(scope="module")
def history() -> RoutingHistory:
    texts = (("It", " is", " <b>", EVIL, "\n", " so"), ("one", " two", "", "three"))
    return made_up((4, 4, 3, 4, 2), steps=6, validations=3, domains=("code", EVIL), texts=texts)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, history: RoutingHistory) -> Path:
    return written(tmp_path_factory.mktemp("run"), history)


def test_a_slider_shows_the_loads_of_the_step_that_it_is_moved_to(opened, file: Path, history: RoutingHistory) -> None:
    page = opened(file)
    show(page, "sites")
    ends = [0, *np.cumsum(history.experts)]
    for step in (0, 3, 5):
        slide(page, "step", step)
        said = page.page.inner_text("#step-said")
        phase = "router_warmup" if history.steps[step] <= 2 else "experts"
        assert said == f"{history.steps[step]} of 12, phase {phase}"
        rows = table(page, "#table-sites")
        assert [row[0] for row in rows] == short_sites(history.sites)
        for site, row in enumerate(rows):
            load = history.load[step, ends[site] : ends[site + 1]] / 255
            expected = [str(load.argmax()), f"{100 * load.max():.1f}", f"{100 * load.min():.1f}"]
            assert row[1:4] == expected, (step, site)
            assert row[5] == f"{history.load_entropy[step, site] / 255:.2f}"


def test_the_map_has_the_colour_of_each_load_and_a_click_on_it_chooses_the_site(
    opened, file: Path, history: RoutingHistory
) -> None:
    page = opened(file)
    show(page, "sites")
    slide(page, "step", 0)
    pixel = """([row, column, columns, rows]) => {
      const map = document.getElementById("map");
      const at = [map.width * (column + .5) / columns, map.height * (row + .5) / rows];
      return [...map.getContext("2d").getImageData(at[0], at[1], 1, 1).data].slice(0, 3);
    }"""
    red, _, blue = page.page.evaluate(pixel, [0, int(history.load[0, :4].argmax()), 4, 5])
    assert red > blue  # more than the uniform share
    red, _, blue = page.page.evaluate(pixel, [0, int(history.load[0, :4].argmin()), 4, 5])
    assert red < blue
    box = page.page.locator("#map").bounding_box()
    page.page.mouse.click(box["x"] + 5, box["y"] + box["height"] * 2.5 / 5)
    assert page.page.inner_text(".chooser [aria-selected=true]") == short_sites(history.sites)[2]
    assert page.page.inner_text("#over-time").endswith(short_sites(history.sites)[2])
    chart = (
        "Chart.getChart(document.getElementById('chart-load')).data.datasets.map((line) => line.data.map((p) => p.y))"
    )
    assert np.allclose(page.page.evaluate(chart), history.load[:, 8:11].T / 255)


def test_tables_are_sorted_by_their_heads_with_the_keyboard_too(opened, file: Path, history: RoutingHistory) -> None:
    page = opened(file)
    show(page, "sites")
    head = page.page.locator("#table-sites th").nth(2)
    head.locator("button").click()
    values = [float(row[2]) for row in table(page, "#table-sites")]
    assert head.get_attribute("aria-sort") == "descending" and values == sorted(values, reverse=True)
    page.page.keyboard.press("Enter")
    values = [float(row[2]) for row in table(page, "#table-sites")]
    assert head.get_attribute("aria-sort") == "ascending" and values == sorted(values)
    slide(page, "step", 1)  # which keeps the order
    values = [float(row[2]) for row in table(page, "#table-sites")]
    assert values == sorted(values)
    show(page, "run")
    page.page.locator("[data-table=losses] th").nth(2).locator("button").click()
    assert [row[2] for row in table(page, "[data-table=losses]")] == ["3.000", "2.000"]
    assert page.page.locator("[data-table=losses] tfoot tr").count() == 1


def test_loads_by_domain_follow_the_validation_and_the_site(opened, file: Path, history: RoutingHistory) -> None:
    page = opened(file)
    show(page, "domains")
    page.page.locator(".chooser [role=option]").nth(3).click()  # the third site, behind the mean
    slide(page, "validation", 1)
    rows = table(page, "#table-domains")
    assert [row[0] for row in rows] == ["code", visible(EVIL)]
    load = history.domain_load[1, :, 8:11] / 255
    assert [row[2:] for row in rows] == [[f"{100 * share:.1f}" for share in one] for one in load]
    far = np.abs(load - load.mean(0)).sum(1) / 2
    assert [row[1] for row in rows] == [f"{100 * one:.1f}" for one in far]
    page.page.locator(".chooser [role=option]").first.focus()
    for key in ("Home", "Enter"):
        page.page.keyboard.press(key)
    whole = history.domain_load[1] / 255
    ends = [0, *np.cumsum(history.experts)]
    mean = [np.mean([whole[0, ends[s] + e] for s in range(5) if history.experts[s] > e]) for e in range(4)]
    assert table(page, "#table-domains")[0][2:] == [f"{100 * share:.1f}" for share in mean]


def test_a_table_sorted_by_an_expert_that_a_site_has_not_is_shown_unsorted(opened, file: Path) -> None:
    page = opened(file)
    show(page, "domains")
    page.page.locator(".chooser [role=option]").nth(1).click()  # the first site, of four experts
    page.page.locator("#table-domains th button").nth(5).click()
    assert page.page.locator("#table-domains th").nth(5).get_attribute("aria-sort") == "descending"
    page.page.locator(".chooser [role=option]").nth(5).click()  # the last one, of two
    assert page.page.locator("#table-domains thead th").count() == 4
    assert len(table(page, "#table-domains")) == 2
    page.page.locator(".chooser [role=option]").nth(1).click()
    assert page.page.locator("#table-domains th[aria-sort]").count() == 0


def test_a_line_of_losses_has_a_gap_where_another_thing_is_measured(opened, tmp_path: Path) -> None:
    history = made_up(phases={"learn": 0, "prefer": 6}, domains=("code",))
    curves: Curves = {"train/loss": [(step, 3.0 if step <= 6 else 0.5) for step in range(1, 13)]}
    measures = {"learn": "nats per label token", "prefer": "loss per pair"}
    page = opened(written(tmp_path, history, curves, phase_measures=measures))
    show(page, "losses")
    line = "Chart.getChart(document.getElementById('chart-losses')).getDatasetMeta(0).data"
    skipped = page.page.evaluate(f"{line}.map((point) => point.skip)")
    assert skipped == [False] * 6 + [True] + [False] * 6
    box = page.page.locator("#chart-losses").bounding_box()
    for share in (0.3, 0.5, 0.55, 0.7):  # over the gap too
        page.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
    assert "learn: nats per label token; prefer: loss per pair" in page.page.inner_text("#losses-said")


def test_gates_judge_as_the_watch_for_collapse_does(opened, tmp_path: Path) -> None:
    from lmoe.metrics.routing import SiteRouting
    from lmoe.training.callbacks.collapse_watch import collapse_reason

    history = made_up((4, 4, 12, 2), steps=30, seed=3)
    page = opened(written(tmp_path, history))
    show(page, "gates")
    ends, verdicts = [0, *np.cumsum(history.experts)], set()
    for step in (0, 9, 29):
        slide(page, "gate-step", step)
        for site, row in enumerate(table(page, "#table-gates")):
            load = (history.load[step, ends[site] : ends[site + 1]] / 255).tolist()
            largest = history.largest[step, site] / 255
            entropy = history.load_entropy[step, site] / 255
            start = history.phase_entropy[0 if history.steps[step] <= 2 else 1, site] / 255

            class AsKept(SiteRouting):
                load_entropy = entropy

            reason = collapse_reason(AsKept(load, 0.5, 1.0, [largest] + [0.0] * (len(load) - 1)), start)
            assert row[-1] == ("within" if reason is None else "beyond a gate"), (step, site, reason)
            verdicts.add(row[-1])
    assert verdicts == {"within", "beyond a gate"}
    page.page.locator(".chooser [role=option]").nth(1).click()
    lines = "Chart.getChart(document.getElementById('chart-load-entropy')).data.datasets.map((line) => line.data)"
    drawn = page.page.evaluate(lines)
    assert [point["y"] for point in drawn[0]] == pytest.approx((history.load_entropy[:, 0] / 255).tolist())
    assert drawn[2][0]["y"] == pytest.approx(0.75 * history.phase_entropy[1, 0] / 255)  # the gate of the second phase


def test_a_click_on_a_token_shows_what_the_file_holds_of_it(opened, file: Path, history: RoutingHistory) -> None:
    page = opened(file)
    show(page, "tokens")
    shown = page.page.locator(".list .token").all_text_contents()
    assert shown == [as_shown(text) for text in history.rows[0].texts]
    page.page.select_option("#row", "1")
    assert page.page.locator(".list .token").all_text_contents() == ["one", " two", "·", "three"]
    page.page.click(".token[data-i='1']")
    panel, token = page.page.locator("#detail"), len(history.rows[0].texts) + 1
    assert panel.locator("h2").inner_text() == "Token “ two”"
    mean = panel.locator("table").nth(0).locator("td").all_inner_texts()
    assert mean == [f"{100 * (int(share) / 255):.1f}" for share in history.mean[token]]
    sites = table(page, "#detail div:nth-of-type(2)")
    assert sites == [
        [name, str(history.expert[token, s]), f"{100 * (int(history.weight[token, s]) / 255):.1f}"]
        for s, name in enumerate(short_sites(history.sites))
    ]
    text, beside = page.page.locator(".list").bounding_box(), panel.bounding_box()
    assert beside["x"] >= text["x"] + text["width"]  # it hides no token of a wide window
    page.page.keyboard.press("Escape")
    assert panel.is_hidden()


def test_tokens_have_the_colours_of_the_experts_of_the_site_that_is_chosen(
    opened, file: Path, history: RoutingHistory
) -> None:
    page = opened(file)
    show(page, "tokens")

    def colours() -> list[int]:
        names = page.page.eval_on_selector_all(".list .token", "tokens => tokens.map(t => t.className)")
        return [int(next(part[1:] for part in name.split() if part[0] == "x")) for name in names]

    assert colours() == history.mean[:6].argmax(1).tolist()
    for site in (0, 4):
        page.page.locator(".chooser [role=option]").nth(site + 1).click()
        assert colours() == history.expert[:6, site].tolist()
    page.page.locator(".token[tabindex='0']").focus()
    for key in ("End", "ArrowLeft", "Enter"):
        page.page.keyboard.press(key)
    assert page.page.locator(".list [aria-selected=true]").get_attribute("data-i") == "4"


def test_every_part_is_without_serious_fault_light_and_dark_wide_and_narrow(opened, file: Path) -> None:
    light, dark = opened(file), opened(file, dark=True, width=360, height=640)
    assert light.colour("body") != dark.colour("body")
    for page in (light, dark):
        assert page.page.locator("[role=tab]").count() == len(VIEWS)
        for view in VIEWS:
            show(page, view)
            if view == "tokens":
                page.page.click(".token[data-i='1']")
            assert page.page.locator(".view:visible").count() == 1
            assert not page.overflows(), view
            assert page.faults() == [], view


def test_after_a_resize_the_map_and_the_charts_fit_the_window(opened, file: Path) -> None:
    page = opened(file)
    show(page, "sites")
    page.page.set_viewport_size({"width": 500, "height": 700})
    page.page.wait_for_timeout(400)
    assert not page.overflows()
    box = page.page.locator("#map").bounding_box()
    assert page.page.evaluate("document.getElementById('map').width / devicePixelRatio") == pytest.approx(
        box["width"], abs=3
    )
    assert page.page.locator("#chart-load").bounding_box()["width"] < 500


def test_colours_of_charts_follow_the_reader_who_turns_dark(opened, file: Path) -> None:
    page = opened(file)
    show(page, "losses")
    ink = "Chart.getChart(document.getElementById('chart-losses')).options.scales.x.ticks.color"
    before = page.page.evaluate(ink)
    page.page.emulate_media(color_scheme="dark")
    page.until(f"{ink} !== '{before}'")


def test_phases_are_marked_on_every_time_axis(opened, file: Path) -> None:
    page = opened(file)
    for view, count in (("losses", 2), ("sites", 1), ("gates", 3)):
        show(page, view)
        marked = page.page.evaluate(
            "[...document.querySelectorAll('.view:not([hidden]) .chart canvas')]"
            ".map((one) => Chart.getChart(one).config.plugins.map((plugin) => plugin.id))"
        )
        assert marked == [["phases"]] * count


def test_without_scripts_and_in_print_the_pictures_and_tables_of_today_are_there(opened, file: Path) -> None:
    plain, scripted = opened(file, scripts=False), opened(file)
    assert plain.page.locator("img:visible").count() == 4 and plain.page.locator("canvas:visible").count() == 0
    assert plain.page.locator("[role=tablist]").is_hidden() and plain.page.locator(".side").is_hidden()
    heads = plain.page.locator("h2:visible").all_inner_texts()
    assert heads == [
        *("What ran", "Validation loss by domain", "Loss curves", "Load by site", "Load by domain"),
        *("Experts that work together", "Routing", "Where things are", "Try next"),
    ]
    assert scripted.page.locator("img:visible").count() == 0
    scripted.page.emulate_media(media="print")
    assert scripted.page.locator("img:visible").count() == 4 and scripted.page.locator("canvas:visible").count() == 0
    assert scripted.page.locator("h2:visible").all_inner_texts() == heads


def test_a_run_without_routers_has_a_page_of_its_losses(opened, tmp_path: Path, history: RoutingHistory) -> None:
    bare = summary_of(history, site_load={})
    page = opened(write_page(bare, {"train/loss": [(1, 2.0), (2, 1.5)]}, {}, tmp_path))
    assert page.page.locator("[role=tab]").all_inner_texts() == ["What ran", "Losses", "Figures and files"]
    show(page, "losses")
    assert page.faults() == [] and page.page.locator(".side").is_hidden()


def test_one_router_for_the_model_and_any_text_show_as_they_are(opened, tmp_path: Path) -> None:
    texts = [[EVIL, "x" * 10_000, "\u2067\u202e", "</script><!--"] * 64] * 16
    history = replace(made_up((3,), texts=texts, phases={EVIL: 0}, domains=(EVIL,)), sites=["model"])
    page = opened(written(tmp_path, history, name=EVIL, collapsed=[EVIL], backbone=EVIL))
    for view in VIEWS:
        show(page, view)
    show(page, "tokens")
    assert page.page.locator(".list .token").count() == 256
    assert page.page.locator(".list .token").all_text_contents()[:4] == [as_shown(text) for text in texts[0][:4]]
    assert page.page.locator("script[src], .list script, img[src=x]").count() == 0
    assert page.page.inner_text("h1") == visible(EVIL) and not page.overflows()
    assert page.page.locator(".warning").text_content() == f"Collapse. {visible(EVIL)}"


def test_a_run_of_90_sites_and_a_thousand_steps_opens_within_two_seconds(opened, tmp_path: Path) -> None:
    texts = [["word "] * 76] * 16
    history = made_up((8,) * 90, steps=200, every=5, validations=21, domains=[f"d{n}" for n in range(8)], texts=texts)
    metrics: Curves = {"train/loss": [(step, 3.0) for step in range(1, 1001)]}
    file = written(tmp_path, history, metrics)
    assert file.stat().st_size <= 1_500_000
    page = opened(file)
    session = page.page.context.new_cdp_session(page.page)
    session.send("Performance.enable")

    def spent() -> float:
        """Seconds that the page has computed, whatever else the machine does."""
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "ProcessTime")

    seconds = {}
    for name in ("opening", "sites", "gates", "domains", "tokens"):
        before, begun = spent(), time.monotonic()
        page.page.reload() if name == "opening" else show(page, name)
        seconds[name] = spent() - before
        seconds[f"{name}, by the clock"] = time.monotonic() - begun
    print(f"{file.stat().st_size:,} bytes; {', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())}")
    assert 0 < seconds["opening"] < 2
    assert max(seconds[name] for name in ("sites", "gates", "domains", "tokens")) < 2
