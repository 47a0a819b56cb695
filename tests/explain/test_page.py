"""The page and the JSON of an explanation: everything shows as text, and numbers are those of the explanation."""

import json
import re
from dataclasses import replace

import pytest
import torch

from lmoe.explain.as_json import as_json
from lmoe.explain.explanation import ExpertProfile, Profiles, SeenToken
from lmoe.explain.page import explanation_page
from lmoe.report.tokens import visible
from tests.explain.explained import EVIL, made_up
from tests.report.html_page import ParsedPage

PLAIN = made_up(("a", "b", "<c>", "d"))


def page_and_data(found) -> tuple[ParsedPage, dict, dict]:
    page, text = explanation_page(found)
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert inside is not None
    return ParsedPage(page), json.loads(inside[1]), json.loads(text)


def test_numbers_of_the_file_and_of_the_page_are_those_of_the_explanation() -> None:
    page, inside, file = page_and_data(PLAIN)
    assert file == as_json(PLAIN) and inside["texts"][0]["token"] == file["texts"][0]["token"]
    [text], [own] = file["texts"], PLAIN.texts
    assert text["mixture"][0] is None and text["mixture"][1] == pytest.approx(float(own.mixture[1]), abs=1e-6)
    for site, weights in zip(file["sites"], text["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(weights), own.weights[site["name"]], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(text["mean"]), own.mean_weights(2), atol=1e-6, rtol=0)
    row = next(row for row in page.rows if row and row[0] == "<c> 2")
    assert row[3] == f"{text['mixture'][2]:.3f}".replace("-", "−")


def test_prompt_and_answer_stand_apart_and_no_expert_is_told_by_colour_alone() -> None:
    page, _, _ = page_and_data(PLAIN)
    assert page.text("list", "part") == "PromptGenerated"
    assert page.text("list", "answer") == "<c>d"
    numbers = page.values("data-who")
    assert numbers and all(number in ("0", "1") for number in numbers)
    many = made_up(("a",) * 4, experts=tuple(map(str, range(64))))
    _, inside, _ = page_and_data(many)
    marks = {(e % 8, e // 8 % 8) for e in range(len(inside["experts"]))}
    assert len(marks) == 64  # a colour and a line of their own


def test_hostile_text_is_shown_as_text_everywhere() -> None:
    profile = ExpertProfile(
        weight=0.5,
        by_domain={EVIL: 0.5},
        loss_without={EVIL: 0.1},
        tokens=(SeenToken(before=EVIL, text=EVIL, after=EVIL, domain=EVIL, row=0, weight=0.9),),
    )
    found = made_up(("a", EVIL, "\u202e", "\u2028"), experts=(EVIL, "1"), name=EVIL, domain=EVIL)
    found = replace(found, notes=(EVIL,), profiles=Profiles(experts=(profile, profile), rows=EVIL, losses="here"))
    found = replace(found, other=replace(found, profiles=None))
    content, file = explanation_page(found, EVIL)
    content.encode("utf-8")
    page = ParsedPage(content)
    assert page.tags.count("script") == 4 and "style" in page.tags and page.tags.count("noscript") == 1
    assert not {"\x1b", "\x00", "\u202e", "\u2028"} & {*content}
    assert visible(EVIL) in page.text("list", "token") and visible(EVIL) in page.text("dl")
    assert page.text("mark") == visible(EVIL) * 2
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', content, re.S)
    assert inside is not None and json.loads(inside[1])["texts"][0]["tokens"][1] == visible(EVIL)
    assert "<" not in inside[1] and inside[1].isascii()
    assert json.loads(file)["texts"][0]["tokens"][1] == EVIL and file.isascii()


def test_where_two_differ_the_largest_differences_are_listed_first() -> None:
    other = made_up(("a", "b", "<c>", "d"), name="another run")
    page, inside, file = page_and_data(replace(PLAIN, other=other))
    changes = [row[3] for row in page.rows if len(row) == 6 and row[0] != "token"]
    assert len(changes) == 3  # nothing predicts the first token
    sizes = [abs(float(change.replace("−", "-"))) for change in changes]
    assert sizes == sorted(sizes, reverse=True)
    assert inside["other"]["name"] == file["other"]["name"] == "another run"


def test_the_longest_text_that_is_explained_makes_a_page() -> None:
    found = made_up(tuple(f"w{i} " for i in range(4096)))
    page, file = explanation_page(found)
    assert page.count('class="token ') == 4096 and json.loads(file)["texts"][0]["tokens"][-1] == "w4095 "
