"""The templates of pages, and where a page may be written."""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from lmoe.errors import ConfigError
from lmoe.report.files import write_bytes
from lmoe.report.html import MARK, PAGES, environment, json_text, page_place, policy, render, script_source

PAIRS = {
    ("ink", "paper"),
    ("ink", "panel"),
    ("quiet", "paper"),
    ("quiet", "panel"),
    ("link", "paper"),
    ("learnt-ink", "learnt-paper"),
    ("learnt-line", "learnt-paper"),
    ("cut-ink", "paper"),
    ("cut-ink", "panel"),
    ("warning-ink", "warning-paper"),
}
"""Colours of text and of what it stands on."""


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme: str) -> None:
    style = (PAGES / "style.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    assert light.keys() == dark.keys() and {name for pair in PAIRS for name in pair} <= light.keys()
    colours = light if scheme == "light" else dark
    for ink, paper in PAIRS:
        brighter, darker = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
        least = 3 if ink.endswith("-line") else 4.5  # of lines and marks, and of text
        assert (brighter + 0.05) / (darker + 0.05) >= least, (scheme, ink, paper)


def test_templates_escape_what_they_are_given_and_miss_nothing() -> None:
    names = environment().list_templates()
    assert {"base.html.jinja", "samples.html.jinja", "style.css", "tokens.html.jinja"} <= {*names}
    scripts = [name for name in names if name.endswith(".js")]
    assert {"page.js", "explain.js", "vendor/chart.umd.min.js"} <= {*scripts}
    for name in names:
        if name.startswith("vendor/"):
            continue
        source = (PAGES / name).read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|autoescape|<script|https?:", source), name
        if name not in scripts:
            environment().get_template(name)
    assert "<title>&lt;i&gt;</title>" in render("base.html.jinja", title="<i>")
    with pytest.raises(UndefinedError, match="title"):
        render("base.html.jinja")


def test_a_page_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert page_place(str(page)) == page
    write_bytes(page, render("base.html.jinja", title="a").encode())
    assert MARK in page.read_text() and page_place(str(page)) == page
    page.write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match=r"page\.html` exists and is no page of lmoe; name another file"):
        page_place(str(page))
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match="is no page of lmoe"):
        page_place(str(tmp_path / "folder.html"))


def test_a_name_or_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`output=.*page\.txt` .*name a file that ends in \.html"):
        page_place(str(tmp_path / "page.txt"))
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; make it, or name another place"):
        page_place(str(tmp_path / "nowhere" / "page.html"))


def test_a_page_runs_its_own_scripts_alone() -> None:
    plain = render("base.html.jinja", title="a")
    assert "<script" not in plain and "script-src" not in plain and "default-src 'none'" in html.unescape(plain)
    source = script_source("page.js")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    page = render("base.html.jinja", title="a", scripts=["page.js"])
    assert f"script-src 'sha256-{digest}'" in html.unescape(page) and page.count("<script>") == 1
    assert "connect-src" not in policy([source]) and policy([source], asks_server=True).endswith("; connect-src 'self'")
    assert "unsafe-inline" not in policy([source]).partition("script-src")[2] and "unsafe-eval" not in policy([source])


def test_scripts_of_pages_make_no_html_of_text_and_ask_for_nothing() -> None:
    scripts = sorted(PAGES.glob("*.js"))
    assert len(scripts) >= 2
    for script in scripts:
        source = script_source(script.name)
        if script.name == "watch.js":  # which stands in pages of `lmoe watch` alone, and asks its server
            assert source.count("fetch(") == 1 and "fetch(`data.json?" in source
            source = source.replace("fetch(", "")
        wrong = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|fetch\(|XMLHttp|import\b"
        if script.name == "play_api.js":  # of a page that a server gives, which asks it by paths alone
            assert source.count("fetch(") == source.count("fetch(path, ") == 1
            source = source.replace("fetch(path, ", "")
        assert not re.search(wrong, source) and "://" not in source, script.name


def test_data_cannot_end_the_element_it_stands_in() -> None:
    evil = {"</script>": ["<!--", "\u2028", "\ud800", "&", "<SCRIPT>", 1.5, None]}
    text = str(json_text(evil))
    assert not re.search(r"[<>&]", text) and text.isascii() and json.loads(text) == evil
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text([math.nan])
    page = render("base.html.jinja", title="a", data=evil, scripts=["page.js"])
    assert page.lower().count("</script>") == 2


def test_the_charting_library_is_one_file_with_its_licence_and_can_stand_in_a_page() -> None:
    licence = (PAGES / "vendor/chart.umd.min.js.licence.txt").read_text(encoding="utf-8")
    source = script_source("vendor/chart.umd.min.js")
    version = re.search(r"Chart\.js v(\d+\.\d+\.\d+)", source)
    assert version is not None and licence.startswith(f"chart.js {version[1]}, chart.umd.min.js\n")
    assert "MIT License" in licence and hashlib.sha256(source.encode()).hexdigest() in licence
