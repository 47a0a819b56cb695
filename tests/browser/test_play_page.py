"""The page of `lmoe play` in a browser, over a scripted engine and over a real one."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from transformers import AutoModelForCausalLM

from lmoe.report.tokens import visible
from lmoe.serve.http.auth import Keys
from lmoe.serve.http.playground import Playground
from lmoe.serve.request import Mixable, Refused, RefusedError, Request
from tests.browser.harness import OpenPage
from tests.explain.explained import EVIL
from tests.peft_experts import write_peft
from tests.serve.fake_engine import SAID, FakeEngine, FakeRunning, prompts, service
from tests.serve.running import running_service

ROOT = Path(__file__).resolve().parents[2]
Open = Callable[..., OpenPage]
HOSTILE = EVIL.replace("\ud800", "")
"""What a tokenizer can write."""
QUOTED = "o'\"><img src=x onerror=alert(1)>"
"""A name of an expert."""


class Speaking(FakeEngine):
    """Says what it is mixed of."""

    __slots__ = ()

    async def submit(self, request: Request) -> FakeRunning:
        if request.mixture is not None and "{}" in self.said:
            own, self.said = self.said, self.said.format(json.dumps(request.mixture))
            try:
                return await super().submit(request)
            finally:
                self.said = own
        return await super().submit(request)


class Playing:
    """A playground under test.

    Args:
        address: of its server.
        link: with the key.
        engine: what answers.
    """

    def __init__(self, address: str, made: Any) -> None:
        self.address, self.service, self.engine = address, made, made.engine
        self.link = made.playground.link(address)
        self.key = {"Authorization": f"Bearer {made.playground.secret}"}

    def api(self, **body: Any) -> dict:
        """What the API answers to the same."""
        given = {"messages": [{"role": "user", "content": "Hi!"}], "temperature": 0, "max_tokens": 64} | body
        answer = httpx.post(f"{self.address}/v1/chat/completions", json=given | {"lmoe": "tokens"}, headers=self.key)
        return answer.json()


@contextmanager
def playing(engine: FakeEngine | None = None, keys: Keys | None = None, **settings: Any) -> Iterator[Playing]:
    playground = Playground(keys or Keys())
    given: dict[str, Any] = {"port": 0, "upload_size": 100_000, "warm_up": False, "max_tokens": 500} | settings
    made = service(engine or Speaking(), playground=playground, **given)
    with running_service(made) as (server, _):
        yield Playing(server.address, made)


def opened(open_page: Open, play: Playing, fragment: str = "", **options: Any) -> OpenPage:
    """The page once it is there."""
    found = open_page(play.link + (f"&{fragment}" if fragment else ""), **options)
    found.page.locator("#app:not([hidden])").wait_for()
    return found


def ask(page: Any, text: str = "Hi!", *, answers: int = 1) -> None:
    """Send a message and wait until all answers to it are over."""
    page.fill("#message", text)
    page.keyboard.press("Enter")
    page.locator("#send").wait_for()
    page.locator(".answer[aria-busy]").first.wait_for(state="detached")
    assert page.locator(".side:not([hidden]) .exchange:last-child .answer .said").count() >= answers


def said(page: Any, side: str = "a") -> str:
    """The last answer of a side."""
    return page.locator(f"#side-{side} .answer > .said").last.inner_text()


def refusals_alone(page: OpenPage) -> None:
    """Of the console's errors, those that a browser writes of every answer that is none."""
    assert page.errors and all(error.startswith("Failed to load resource") for error in page.errors), page.errors
    page.errors.clear()


def experts_shown(page: Any) -> list[int | None]:
    """The expert by which each token of the last answer is coloured."""
    names = page.eval_on_selector_all(".answer:last-child > .said > span", "all => all.map(one => one.className)")
    marks = [{part[0]: int(part[1:]) for part in name.split() if part[1:].isdigit()} for name in names]
    return [mark["p"] * 8 + mark["x"] if mark else None for mark in marks]


def test_what_is_shown_is_what_the_api_says_token_by_token(open_page: Open) -> None:
    def weigh(number: int) -> Mapping[str, float]:
        return [{"code": 0.6, "chat": 0.4}, {"code": 0.1, "chat": -0.9}, {}][number % 3]

    with playing(Speaking(weigh=weigh)) as play:
        page = opened(open_page, play).page
        ask(page)
        answer = play.api()
        choice = answer["choices"][0]
        assert said(page) == choice["message"]["content"] == SAID
        spans = page.locator(".answer > .said > span")
        tokens = choice["lmoe"]["tokens"]
        ends = [token["offset"] for token in tokens[1:]] + [len(SAID)]
        texts = [SAID[token["offset"] : end] for token, end in zip(tokens, ends, strict=True)]
        assert spans.all_text_contents() == texts
        most = [max(token["weights"].items(), key=lambda pair: abs(pair[1]), default=None) for token in tokens]
        expected = [
            None if one is None or not text else ["code", "chat"].index(one[0])
            for one, text in zip(most, texts, strict=True)
        ]
        assert experts_shown(page) == expected and set(expected) == {0, 1, None}
        assert f"{answer['usage']['completion_tokens']} tokens" in page.locator(".answer > .of").last.inner_text()
        asked = play.engine.asked[0].request
        assert (asked.sampling.temperature, asked.max_tokens, asked.mixture) == (0, 256, None)
        page.click(".answer summary >> nth=0")
        page.locator(".answer table").first.wait_for()
        rows = page.locator(".answer table").first.locator("tbody tr").all_inner_texts()
        means = [sum(token["weights"].get(name, 0) for token in tokens) / len(tokens) for name in ("code", "chat")]
        assert rows == [
            f"{n} {name}\t{mean:.3f}\t0.000".replace("-", "−")
            for n, (name, mean) in enumerate(zip(("code", "chat"), means, strict=True))
        ]


def test_a_slider_that_is_moved_with_the_keyboard_gives_another_answer(open_page: Open) -> None:
    with playing(Speaking(said="mixed of {}")) as play:
        page = opened(open_page, play).page
        assert page.locator(".preset").first.locator("option:checked").inner_text() == "The server's own weights"
        ask(page)
        assert said(page) == "mixed of {}" and play.engine.asked[-1].request.mixture is None
        page.focus("#side-a .sliders input[type=range] >> nth=0")
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert page.locator(".preset").first.locator("option:checked").inner_text() == "Your own weights"
        page.click("#retry")
        page.locator("#send").wait_for()
        assert said(page) == 'mixed of {"code": 0.7, "chat": 0.5}'
        assert page.locator("#side-a .exchange").count() == 1
        assert page.locator(".answer > .of").first.inner_text() == "code 0.7 + chat 0.5"
        page.fill("#side-a .sliders input[type=number] >> nth=1", "-1.25")
        ask(page)
        assert said(page) == 'mixed of {"code": 0.7, "chat": -1.25}'
        turns = play.engine.asked[-1].request.prompt
        assert play.service.prompts.tokenizer.decode(turns).count("mixed of") == 1  # the answer before


@pytest.mark.parametrize(
    ("preset", "mixture"),
    [
        ("code alone", {"code": 1.0, "chat": 0.0}),
        ("All equal", {"code": 0.5, "chat": 0.5}),
        ("The base alone", {"code": 0.0, "chat": 0.0}),
        ("The server's own weights", None),
    ],
)
def test_presets_are_what_they_are_called(open_page: Open, preset: str, mixture: dict | None) -> None:
    with playing() as play:
        page = opened(open_page, play, 'a={"code":3}').page
        page.select_option("#side-a .preset", label=preset)
        ask(page)
        assert play.engine.asked[-1].request.mixture == mixture


def test_a_preset_that_is_saved_is_there_after_a_reload_until_it_is_forgotten(open_page: Open) -> None:
    with playing() as play:
        page = opened(open_page, play).page
        page.fill("#side-a .sliders input[type=number] >> nth=0", "0.25")
        page.fill("#side-a .preset-name", QUOTED)
        page.click("#side-a .save button")
        page.reload()
        page.locator("#app:not([hidden])").wait_for()
        page.select_option("#side-a .preset", label="The base alone")
        page.select_option("#side-a .preset", label=f"Saved: {QUOTED}")
        ask(page)
        assert play.engine.asked[-1].request.mixture == {"code": 0.25, "chat": 0.5}
        page.click("#side-a .forget")
        assert QUOTED not in page.locator("#side-a .preset").inner_text()
        assert page.evaluate("localStorage.getItem('lmoe.play.presets')") == "[]"


def test_both_mixtures_answer_at_the_same_time_side_by_side(open_page: Open) -> None:
    together = asyncio.Event()

    async def step(number: int) -> None:
        if len(engine.asked) == 2:
            together.set()
        await together.wait()  # neither goes on before both are there

    engine = Speaking(said="mixed of {}", step=step)
    with playing(engine) as play:
        page = opened(open_page, play).page
        page.check("#both")
        page.select_option("#side-a .preset", label="code alone")
        page.select_option("#side-b .preset", label="chat alone")
        ask(page, answers=2)
        assert said(page, "a") == 'mixed of {"code": 1.0, "chat": 0.0}'
        assert said(page, "b") == 'mixed of {"code": 0.0, "chat": 1.0}'
        left, right = (page.locator(f"#side-{side} .answer").bounding_box() for side in "ab")
        assert abs(left["y"] - right["y"]) < 2 and right["x"] >= left["x"] + left["width"]
        ask(page, "And now?", answers=2)
        for running, own in zip(engine.asked[2:], ("1.0", "0.0"), strict=True):
            assert f'{{"code": {own}' in play.service.prompts.tokenizer.decode(running.request.prompt)
        page.uncheck("#both")
        ask(page, "A alone")
        page.check("#both")
        assert "Mixture B was not asked this" in page.locator("#side-b .exchange").last.inner_text()
        page.set_viewport_size({"width": 360, "height": 640})
        left, right = (page.locator(f"#side-{side}").bounding_box() for side in "ab")
        assert right["y"] >= left["y"] + left["height"] and right["x"] == left["x"]


def test_escape_stops_an_answer_and_its_row_is_free(open_page: Open) -> None:
    async def step(number: int) -> None:
        await asyncio.sleep(0 if number < 3 else 60)

    with playing(Speaking(step=step)) as play:
        page = opened(open_page, play).page
        page.fill("#message", "Hi!")
        page.keyboard.press("Enter")
        page.locator(".answer > .said > span >> nth=2").wait_for()
        assert page.locator("#stop").is_visible() and page.locator("#send").is_hidden()
        page.keyboard.press("Escape")
        page.locator("#send").wait_for()
        assert "stopped" in page.locator(".answer > .of").last.inner_text() and SAID.startswith(said(page))
        assert play.engine.asked[0].over.wait(5) and play.engine.asked[0].cancelled
        assert page.evaluate("document.activeElement.id") == "message"


def test_an_answer_is_drawn_frame_by_frame_and_not_token_by_token(open_page: Open) -> None:
    go_on = threading.Event()

    async def step(number: int) -> None:
        await asyncio.sleep(0)
        while number >= 40 and not go_on.is_set():
            await asyncio.sleep(0.005)

    text = "one more " * 60
    with playing(Speaking(said=text, step=step)) as play:
        shown = opened(open_page, play)
        page = shown.page
        page.evaluate(
            """() => {
                window.held = [];
                window.requestAnimationFrame = (draw) => window.held.push(draw);
                window.cancelAnimationFrame = () => { window.held = []; };
            }"""
        )
        page.fill("#message", "Hi!")
        page.keyboard.press("Enter")
        spans = page.locator(".answer > .said > span")
        shown.until("window.held.length > 0")  # page.wait_for_function would wait for frames itself
        page.wait_for_timeout(500)
        assert page.evaluate("window.held.length") == 1 and spans.count() == 0
        shown.until(
            """(() => {
                window.held.splice(0).forEach((draw) => draw(0));
                return document.querySelectorAll(".answer > .said > span").length >= 30;
            })()"""
        )
        go_on.set()
        page.locator(".answer[aria-busy]").wait_for(state="detached")
        assert said(page).strip() == text.strip() and spans.count() > 100


def test_keys_send_make_lines_and_take_a_message_back(open_page: Open) -> None:
    with playing() as play:
        page = opened(open_page, play).page
        assert page.evaluate("document.activeElement.id") == "message"
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.locator("#send").wait_for()
        assert page.locator("#side-a .user").inner_text() == "one\ntwo"
        page.click("#edit")
        assert page.input_value("#message") == "one\ntwo" and page.locator("#side-a .exchange").count() == 0
        assert page.evaluate("document.activeElement.id") == "message" and page.locator("#edit").is_disabled()
        ask(page, "three")
        assert "one" not in play.service.prompts.tokenizer.decode(play.engine.asked[-1].request.prompt)
        page.click("#new")
        assert page.locator("#side-a .exchange").count() == 0
        stops = []
        page.focus("#both")
        stops.append("both")
        for _ in range(40):
            page.keyboard.press("Tab")
            stops.append(
                page.evaluate(
                    "document.activeElement.id || document.activeElement.className || document.activeElement.type"
                )
            )
        order = [
            stops.index(name) for name in ("both", "new", "preset", "range", "number", "preset-name", "message", "send")
        ]
        assert order == sorted(order)


def test_a_reader_of_the_screen_is_told_once_and_not_at_each_token(open_page: Open) -> None:
    with playing() as play:
        page = opened(open_page, play).page
        page.evaluate(
            "window.told = []; new MutationObserver(() => told.push(document.getElementById('status').textContent))"
            ".observe(document.getElementById('status'), {childList: true, characterData: true, subtree: true})"
        )
        ask(page)
        assert page.evaluate("told") == ["The answer is being written.", f"Answer: {SAID}"]
        assert page.locator(".log[aria-live], .log [aria-live], [role=log]").count() == 0


def test_the_link_holds_the_settings_and_the_message_and_never_the_key(open_page: Open) -> None:
    with playing() as play:
        shown = opened(open_page, play)
        page = shown.page
        assert play.service.playground.secret not in page.url
        page.check("#both")
        page.select_option("#side-b .preset", label="chat alone")
        page.click("#sampling summary")
        page.fill("#temperature", "0.7")
        page.fill("#seed", "5")
        page.click("#sharing summary")
        page.fill("#message", "What? &x=1")
        page.check("#with-message")
        link = page.input_value("#link")
        assert play.service.playground.secret not in link and link.startswith(f"{play.address}/#")
        held = {name: value[0] for name, value in parse_qs(urlsplit(link).fragment, keep_blank_values=True).items()}
        assert held == {
            "both": "1",
            "a": "own",
            "b": '{"code":0,"chat":1}',
            "temperature": "0.7",
            "top_p": "1",
            "max_tokens": "256",
            "seed": "5",
            "prompt": "What? &x=1",
        }
        page.click("#copy")
        shown.until("['Copied', 'Press Ctrl+C'].includes(document.getElementById('copy').innerText)")
        again = opened(open_page, play, urlsplit(link).fragment).page
        assert again.is_checked("#both") and again.input_value("#message") == "What? &x=1"
        assert again.input_value("#temperature") == "0.7" and again.input_value("#seed") == "5"
        assert again.locator("#side-b .preset option:checked").inner_text() == "chat alone"
        assert again.locator("#side-a .preset option:checked").inner_text() == "The server's own weights"
        again.reload()  # the key stays as long as the tab is open, and the settings in the address
        again.locator("#app:not([hidden])").wait_for()
        assert again.input_value("#temperature") == "0.7" and again.locator("#key").is_hidden()


def test_a_link_of_nonsense_is_opened_all_the_same(open_page: Open) -> None:
    with playing() as play:
        nonsense = "a={&b=[1]&temperature=hot&top_p=&both=yes&prompt=%00%E2%80%AE&seed=NaN&x=" + "y" * 5000
        page = opened(open_page, play, nonsense).page
        assert page.input_value("#temperature") == "0" and not page.is_checked("#both")
        ask(page)
        assert said(page) == SAID


def test_without_the_key_the_page_asks_for_it_and_takes_the_whole_link(open_page: Open) -> None:
    with playing() as play:
        found = open_page(f"{play.address}/")
        page = found.page
        page.locator("#key").wait_for()
        assert page.locator("#app").is_hidden() and page.evaluate("document.activeElement.id") == "key-text"
        assert found.faults() == []
        page.fill("#key-text", "wrong")
        page.keyboard.press("Enter")
        page.locator("#key").wait_for()
        page.fill("#key-text", play.link)
        page.keyboard.press("Enter")
        page.locator("#app:not([hidden])").wait_for()
        ask(page)
        assert said(page) == SAID
        refusals_alone(found)


def test_who_may_only_ask_cannot_change_experts(open_page: Open) -> None:
    with playing(keys=Keys(api=(b"mine",), admin=(b"other",))) as play:
        found = open_page(f"{play.address}/#key=mine")
        found.page.locator("#app:not([hidden])").wait_for()
        found.page.click("#experts > summary")
        assert found.page.locator("#adding").is_hidden() and found.page.locator("#shelf button").count() == 0
        assert "admin token" in found.page.locator("#fixed").inner_text()
        found.page.click("#fixed button")
        found.page.fill("#key-text", "other")
        found.page.keyboard.press("Enter")
        found.page.locator("#adding").wait_for()


@pytest.mark.parametrize("key", ["ab#cd", "key=zz", "a&key=b"])
def test_a_key_may_look_like_a_link(open_page: Open, key: str) -> None:
    with playing(keys=Keys(api=(key.encode(),))) as play:
        found = open_page(f"{play.address}/")
        page = found.page
        page.fill("#key-text", key)
        page.keyboard.press("Enter")
        page.locator("#app:not([hidden])").wait_for()
        ask(page)
        assert said(page) == SAID
        refusals_alone(found)


def test_a_key_that_no_header_can_hold_is_asked_for_again(open_page: Open) -> None:
    with playing() as play:
        found = open_page(f"{play.address}/")
        found.page.fill("#key-text", "abc…")
        found.page.keyboard.press("Enter")
        found.page.locator("#key").wait_for()
        assert found.page.input_value("#key-text") == "" and found.page.locator("#about").inner_text() == ""
        refusals_alone(found)


def test_numbers_are_what_the_server_takes_and_are_checked_before_anything_is_sent(open_page: Open) -> None:
    with playing(max_tokens=100) as play:
        page = opened(open_page, play).page
        assert page.input_value("#max_tokens") == "100"
        page.click("#sampling summary")
        page.fill("#temperature", "0.25")
        ask(page)
        assert play.engine.asked[-1].request.max_tokens == 100
        assert play.engine.asked[-1].request.sampling.temperature == 0.25
        page.fill("#temperature", "5")
        page.click("#retry")
        assert page.locator("#side-a .answer").count() == 1 and len(play.engine.asked) == 1


def test_an_expert_that_another_tab_has_removed_goes_from_the_sliders(open_page: Open) -> None:
    with playing() as play:
        found = opened(open_page, play, 'a={"code":1}')
        page = found.page
        httpx.delete(f"{play.address}/v1/experts/chat", headers=play.key).raise_for_status()
        ask(page)
        assert "chat" in page.locator(".answer [role=alert]").inner_text()
        page.locator("#side-a .sliders li").nth(1).wait_for(state="detached")
        page.click("#retry")
        page.locator("#send").wait_for()
        assert said(page) == SAID and play.engine.asked[-1].request.mixture == {"code": 1}
        refusals_alone(found)


def test_experts_are_added_from_a_folder_and_from_files_and_removed(open_page: Open, tmp_path: Path) -> None:
    with playing() as play:
        found = opened(open_page, play)
        page = found.page
        page.click("#experts > summary")
        page.fill("#add-name", "sql")
        page.fill("#add-place", "some/folder")
        page.click("#add button")
        page.get_by_text("sql is there.").wait_for()
        assert play.engine.places["sql"] == ["some/folder"]
        assert page.locator("#side-a .sliders .name").all_inner_texts() == ["0 code", "1 chat", "2 sql"]
        page.select_option("#side-a .preset", label="sql alone")
        folder = tmp_path / "run" / "adapter"
        folder.mkdir(parents=True)
        for name in ("lmoe_config.json", "tokenizer.json", "adapter.safetensors", "notes.txt"):
            (folder / name).write_bytes(name.encode())
        (tmp_path / "run" / "other.safetensors").write_bytes(b"no")
        page.fill("#upload-name", "own")
        page.set_input_files("#upload-folder", tmp_path / "run")
        page.click("#upload button")
        page.get_by_text("own is there.").wait_for()
        place = Path(play.engine.places["own"][0])
        assert {file.name for file in place.iterdir()} == {"lmoe_config.json", "adapter.safetensors"}
        assert (place / "adapter.safetensors").read_bytes() == b"adapter.safetensors"
        ask(page)
        assert play.engine.asked[-1].request.mixture == {"code": 0, "chat": 0, "sql": 1, "own": 0}
        page.get_by_role("button", name="Remove own").click()
        page.get_by_text("own is gone.").wait_for()
        assert not place.exists() and page.locator("#side-a .sliders li").count() == 3
        assert page.locator("#side-a .preset option:checked").inner_text() == "sql alone"


def test_an_expert_that_cannot_be_is_said_where_it_was_asked_for(open_page: Open, tmp_path: Path) -> None:
    with playing() as play:
        found = opened(open_page, play)
        page = found.page
        page.click("#experts > summary")
        page.fill("#add-name", "x")
        page.fill("#add-place", "broken")
        page.click("#add button")
        page.get_by_text("the expert does not fit").wait_for()
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
        (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 200_000)
        page.fill("#upload-name", "y")
        page.set_input_files("#upload-files", [tmp_path / "adapter_config.json", tmp_path / "adapter_model.bin"])
        page.click("#upload button")
        page.get_by_text("No expert is among these files").wait_for()
        page.set_input_files(
            "#upload-files", [tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"]
        )
        page.click("#upload button")
        page.get_by_text("These files have 0.2 MB, and at most 0.1 MB may be uploaded").wait_for()
        assert {*play.engine.places} == {"code", "chat"} and found.faults() == []
        refusals_alone(found)


def test_hostile_texts_and_names_are_shown_as_text(open_page: Open) -> None:
    names = {QUOTED: ["a"], HOSTILE: ["b"], "__proto__": ["c"]}
    engine = Speaking(said=HOSTILE + " مرحبا 🎉\ttab\nline", places=names, own_mixture=HOSTILE)
    with playing(engine) as play:
        found = opened(open_page, play)
        page = found.page
        page.check("#both")
        for side in "ab":
            page.fill(f"#side-{side} .sliders input[type=number] >> nth=2", "1")
        page.fill("#message", HOSTILE.replace("\x00", ""))
        page.focus("#message")
        page.keyboard.press("Enter")
        page.locator("#send").wait_for()
        for side in "ab":
            assert said(page, side) == engine.said.translate({c: f"[U+{c:04X}]" for c in (0x202E, 0x2028, 0x1B, 0)})
        assert engine.asked[-1].request.mixture["__proto__"] == 1
        assert page.locator("#side-a .sliders .name").all_inner_texts() == [
            f"0 {QUOTED}",
            f"1 {visible(HOSTILE)}",
            "2 __proto__",
        ]
        page.click("#experts > summary")
        assert page.locator("#shelf li span").first.inner_text() == f"{QUOTED}, rank 8"
        page.get_by_role("button", name=f"Remove {QUOTED}").click()
        page.get_by_text(f"{QUOTED} is gone.").wait_for()
        assert QUOTED not in engine.places
        assert page.locator("main img, main script, main style").count() == 0 and not found.overflows()
        assert found.faults() == []


def test_a_long_answer_without_a_blank_stays_inside_the_page(open_page: Open) -> None:
    with playing(Speaking(said="x" * 400 + " wörd" * 60, context=2000)) as play:
        found = opened(open_page, play, width=360, height=640)
        ask(found.page, "y" * 500)
        assert said(found.page).startswith("xxxx") and not found.overflows()
        end = "[scrollY + innerHeight, document.documentElement.scrollHeight]"
        at, whole = found.page.evaluate(end)
        assert whole - at < 130  # it was followed


def test_what_the_server_refuses_is_said_in_its_words(open_page: Open) -> None:
    engine = Speaking(refusal=RefusedError(Refused.full, "64 requests wait already <b>"))
    with playing(engine) as play:
        found = opened(open_page, play)
        page = found.page
        ask(page)
        assert page.locator(".answer [role=alert]").inner_text() == "64 requests wait already <b>"
        engine.refusal = None
        page.click("#retry")
        page.locator(".answer > .of >> nth=1").wait_for()
        assert said(page) == SAID and page.locator("[role=alert]").count() == 0
        page.click("#sampling summary")
        page.fill("#temperature", "9")
        page.click("#sampling summary")
        page.fill("#message", "hot")
        page.keyboard.press("Enter")
        assert len(engine.asked) == 1 and page.input_value("#message") == "hot"  # the field says why
        assert page.evaluate("document.activeElement.id") == "temperature"
        refusals_alone(found)


def test_an_answer_that_breaks_off_keeps_what_came_and_says_why(open_page: Open) -> None:
    async def step(number: int) -> None:
        if number == 3:
            raise RefusedError(Refused.failed, "no memory")

    with playing(Speaking(step=step)) as play:
        page = opened(open_page, play).page
        ask(page)
        assert SAID.startswith(said(page)) and said(page)
        assert "the server failed at this request" in page.locator(".answer [role=alert]").inner_text()


def test_a_trained_mixture_has_its_routers_choice_and_load_and_no_sliders(open_page: Open) -> None:
    mixable = Mixable(names=("0", "1"), own_weights=None, by_request=False, changes=False)
    engine = Speaking(places={}, own_mixture="router top_k", mixable_of=mixable, weigh=lambda n: {"0": 0.2, "1": 0.8})
    with playing(engine) as play:
        page = opened(open_page, play, 'a={"0":0.5}').page  # of another server
        assert page.locator("#side-a .summary-text").inner_text() == "router top_k"
        assert page.locator(".weighable").first.is_hidden() and page.locator(".sliders li:visible").count() == 0
        assert page.locator("#side-a .experts li").all_inner_texts() == ["0", "1"]
        assert "The router chooses" in page.locator("#side-a .note").inner_text()
        ask(page)
        assert engine.asked[-1].request.mixture is None
        assert {expert for expert in experts_shown(page) if expert is not None} == {1}
        page.click(".answer summary >> nth=0")
        page.locator(".answer table").first.wait_for()
        rows = page.locator(".answer table").first.locator("tbody tr").all_inner_texts()
        assert rows == ["0\t0.200\t0.250", "1\t0.800\t0.750"]  # mean weight, and the API's load
        page.click("#experts > summary")
        assert page.locator("#adding").is_hidden()


def test_a_blend_whose_router_decides_by_the_prompt_takes_weights_too(open_page: Open) -> None:
    mixable = Mixable(names=("code", "chat"), own_weights=None, by_request=True, changes=True)
    with playing(Speaking(own_mixture="router encoder", mixable_of=mixable)) as play:
        page = opened(open_page, play).page
        assert page.locator("#side-a .preset option:checked").inner_text() == "The router decides"
        ask(page)
        assert play.engine.asked[-1].request.mixture is None
        page.select_option("#side-a .preset", label="code alone")
        ask(page)
        assert play.engine.asked[-1].request.mixture == {"code": 1, "chat": 0}


def test_a_model_without_a_chat_template_continues_texts(open_page: Open) -> None:
    with playing() as play:
        made = prompts()
        made.tokenizer.chat_template, kept = None, made.tokenizer.chat_template
        try:
            page = opened(open_page, play).page
            assert page.locator("label[for=message]").inner_text() == "Text to continue"
            ask(page, "Once upon a time")
            ask(page, "Then")
        finally:
            made.tokenizer.chat_template = kept
        assert said(page) == SAID
        decoded = [play.service.prompts.tokenizer.decode(one.request.prompt) for one in play.engine.asked]
        assert [text.strip() for text in decoded] == ["Once upon a time", "Then"]


def test_dark_mode_a_phone_and_both_sides_have_no_serious_fault(open_page: Open) -> None:
    with playing(Speaking(places={f"expert {n}": ["a"] for n in range(10)})) as play:
        light = opened(open_page, play)
        dark = opened(open_page, play, dark=True, width=360, height=640)
        assert light.colour("body") == "rgb(255, 255, 255)" and dark.colour("body") != light.colour("body")
        for found in (light, dark):
            page = found.page
            page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
            for both in (False, True):
                page.set_checked("#both", both)
                ask(page, answers=1 + both)
                page.evaluate(
                    "document.querySelectorAll('.answer details').forEach((details) => { details.open = true; })"
                )
                assert found.faults() == [] and not found.overflows()


def test_without_scripts_the_page_says_what_it_needs(open_page: Open) -> None:
    with playing() as play:
        page = open_page(play.link, scripts=False).page
        assert page.locator("noscript").is_visible() and page.locator("#app").is_hidden()


@pytest.fixture(scope="module")
def experts(micro: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two PEFT adapters that change what the micro model says."""
    base, folder = AutoModelForCausalLM.from_pretrained(micro.model), tmp_path_factory.mktemp("experts")
    return {name: write_peft(base, folder / name, seed=seed, lora_alpha=16) for seed, name in enumerate(("one", "two"))}


@contextmanager
def command(*arguments: str) -> Iterator[str]:
    """The link of `lmoe play` in a process of its own, which Ctrl-C ends well."""
    program = [sys.executable, "-c", "from lmoe.cli.main import main; main()", "play", "--no-browser", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMOE_")}
    running = subprocess.Popen([*program, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert running.stderr is not None
    try:
        lines = iter(running.stderr.readline, "")
        yield next(line.split(": ")[1].strip() for line in lines if line.startswith("playground: "))
    finally:
        running.send_signal(signal.SIGINT)
        left = running.communicate(timeout=60)[1]
    assert running.returncode == 0, left


def test_the_command_serves_a_real_model_whose_answer_follows_the_sliders_and_an_uploaded_expert(
    open_page: Open, micro: Any, experts: dict[str, Path]
) -> None:
    with command("--model", str(micro.model), "--experts", f"one={experts['one']}", "--weights", "0") as link:
        address, _, key = link.partition("/#key=")
        page = open_page(link).page
        page.locator("#app:not([hidden])").wait_for(timeout=30_000)
        page.click("#experts > summary")
        page.fill("#upload-name", "two")
        page.set_input_files("#upload-folder", experts["two"])
        page.click("#upload button")
        page.get_by_text("two is there.").wait_for()
        page.click("#experts > summary")
        found = {}
        for preset, mixture in (("The base alone", {"one": 0}), ("one alone", {"one": 1}), ("two alone", {"two": 1})):
            page.select_option("#side-a .preset", label=preset)
            page.click("#new")
            ask(page, "red")
            body = {
                "messages": [{"role": "user", "content": "red"}],
                "experts": mixture,
                "temperature": 0,
                "max_tokens": 256,
            }
            answer = httpx.post(
                f"{address}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
            )
            found[preset] = page.locator(".answer > .said").text_content()
            assert found[preset] == visible(answer.json()["choices"][0]["message"]["content"]).replace("↵\n", "\n")
        assert len(set(found.values())) == 3
