"""The page of `lmoe explain` in a browser."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lmoe.explain.explanation import ExpertProfile, Profiles, SeenToken
from lmoe.explain.page import explanation_page, signed
from lmoe.report.tokens import visible
from tests.browser.harness import OpenPage
from tests.explain.explained import EVIL, made_up

Open = Callable[..., OpenPage]
TEXTS = ("<|im_start|>", "user", "\n", "say ", EVIL, " or a word of some length", "\n", "Well", ", ", "then", ".", "é")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of ten experts with hostile text, profiles, and another run beside it; its JSON is beside it."""
    experts = (EVIL, *map(str, range(1, 10)))
    seen = SeenToken(before="what stands before", text=EVIL, after=" and behind", domain="code", row=0, weight=0.5)
    profile = ExpertProfile(weight=0.1, by_domain={"code": 0.2, "sql": 0.1}, loss_without={"code": 0.3}, tokens=(seen,))
    found = made_up(TEXTS, experts=experts)
    profiles = Profiles(experts=(profile,) * 10, rows="the first rows", losses="measured here")
    found = replace(found, profiles=profiles, other=made_up(TEXTS, experts=experts, name="another run"))
    page, text = explanation_page(found)
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.json").write_text(text, encoding="utf-8")
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


@pytest.fixture(scope="module")
def data(file: Path) -> dict:
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def test_a_click_on_a_token_shows_the_numbers_of_the_json(open_page: Open, file: Path, data: dict) -> None:
    page, text = open_page(file).page, data["texts"][0]
    page.click(".token[data-i='9']")
    panel = page.locator("#detail")
    assert panel.is_visible() and panel.locator("h2").inner_text() == "Token “then”"
    logs = panel.locator("table").nth(0).locator("td").all_inner_texts()
    assert logs == [signed(text[name][9]) for name in ("mixture", "base", "none")]
    rows = panel.locator("table").nth(1).locator("tbody tr")
    assert rows.count() == 10
    for expert in (0, 7):
        cells = rows.nth(expert).locator("td").all_inner_texts()
        changes = (signed(text[name][9][expert]) for name in ("text", "token"))
        assert cells == [f"{text['mean'][9][expert]:.3f}", *changes]
    panel.locator("select").select_option("7")
    grid = panel.locator("table.sites tbody")
    assert grid.locator("td").all_inner_texts() == [f"{site[9][7]:.3f}" for site in text["weights"]]
    assert grid.locator("th").all_inner_texts() == ["layer 0", "layer 1"]


def test_the_keyboard_reaches_tokens_opens_them_and_closes_them(open_page: Open, file: Path) -> None:
    page = open_page(file).page
    assert page.locator(".token[tabindex='0']").count() == 1  # one stop of Tab for all tokens
    page.locator(".token[tabindex='0']").focus()
    for key in ("End", "ArrowLeft", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#detail h2").inner_text() == "Token “then”"
    assert page.locator("[aria-selected=true]").get_attribute("data-i") == "9"
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden() and page.locator("[aria-selected=true]").count() == 0
    assert page.evaluate("document.activeElement.dataset.i") == "9"


def test_colours_follow_the_site_that_is_chosen(open_page: Open, file: Path, data: dict) -> None:
    page, text = open_page(file).page, data["texts"][0]

    def shown() -> list[int]:
        names = page.eval_on_selector_all(".token", "tokens => tokens.map(t => t.className)")
        marks = [{part[0]: int(part[1:]) for part in name.split() if part[1:].isdigit()} for name in names]
        return [mark["p"] * 8 + mark["x"] for mark in marks]

    def most(weights: list[list[float]]) -> list[int]:
        return [row.index(max(row)) for row in weights]

    assert shown() == most(text["mean"])
    page.select_option("#site", label="layer 1, mlp.up_proj")
    assert shown() == most(text["weights"][2])
    page.select_option("#site", label="layer 0, mean")
    both = zip(text["weights"][0], text["weights"][1], strict=True)
    assert shown() == most([[a + b for a, b in zip(*rows, strict=True)] for rows in both])
    page.select_option("#whose", "other")
    page.select_option("#site", label="mean over all sites")
    assert shown() == most(data["other"]["texts"][0]["mean"])
    page.select_option("#whose", "difference")
    change = data["other"]["texts"][0]["mixture"][5] - text["mixture"][5]
    assert page.get_attribute(".token[data-i='5']", "data-who") == signed(change, 1)


def test_a_click_on_an_expert_opens_what_it_does(open_page: Open, file: Path) -> None:
    page = open_page(file).page
    assert not page.locator("#expert-3 table").first.is_visible()
    page.click(".experts a[href='#expert-3']")
    page.locator("#expert-3[open]").wait_for()
    assert page.locator("#expert-3 tbody").first.locator("tr").first.inner_text().split("\t") == [
        "code",
        "0.200",
        "+0.300",
    ]
    assert page.locator("#expert-3 mark").inner_text() == visible(EVIL)


def test_dark_mode_and_a_phone_and_no_serious_fault(open_page: Open, file: Path) -> None:
    light = open_page(file)
    dark = open_page(file, dark=True, width=360, height=640)
    assert light.colour("body") == "rgb(255, 255, 255)" and dark.colour("body") != light.colour("body")
    assert not light.overflows() and not dark.overflows()
    dark.page.click(".token[data-i='5']")
    assert not dark.overflows()
    for page in (light, dark):
        page.page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert page.faults() == []
        assert not page.overflows()


def test_without_scripts_text_tables_and_experts_are_there(open_page: Open, file: Path) -> None:
    page = open_page(file, scripts=False).page
    assert page.locator("noscript").is_visible() and page.locator(".controls").is_hidden()
    assert page.locator(".token").all_text_contents()[4] == visible(EVIL)
    page.click("details.tokens-table summary")
    assert page.locator("details.tokens-table tbody tr").count() == len(TEXTS)


def test_a_base_alone_shows_log_probabilities(open_page: Open, tmp_path: Path) -> None:
    found = made_up(("a ", "b ", "c"))
    [text] = found.texts
    nothing = text.text[:, :0]
    bare = replace(found, experts=(), sites=(), texts=(replace(text, text=nothing, token=nothing, weights={}),))
    (tmp_path / "page.html").write_text(explanation_page(bare)[0], encoding="utf-8")
    page = open_page(tmp_path / "page.html").page
    page.click(".token[data-i='2']")
    assert page.locator("#detail td").all_inner_texts() == [signed(float(x[2])) for x in (text.mixture, text.base)]
    assert page.locator(".token.routed").count() == 0
