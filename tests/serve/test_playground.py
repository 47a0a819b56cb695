"""The page of a server: its key, the names that it is asked by, what its policy lets it do."""

import html
import re
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from starlette.testclient import TestClient

from lmoe.serve.http.app import make_app
from lmoe.serve.http.auth import Keys
from lmoe.serve.http.playground import Playground, has_display, page_url
from lmoe.serve.http.run import lines
from lmoe.serve.settings import ServeSettings
from tests.serve.fake_engine import FakeEngine, service


def client(playground: Playground, **settings) -> TestClient:
    made = service(FakeEngine(), playground=playground, **settings)
    return TestClient(make_app(made), base_url="http://127.0.0.1:8765")


def test_each_start_has_a_key_of_its_own_that_is_in_the_link_and_not_in_the_page():
    first, other = Playground(Keys()), Playground(Keys())
    assert first.secret != other.secret and len(first.secret) >= 32
    link = urlsplit(first.link("http://127.0.0.1:1"))
    assert (link.path, link.query, unquote(link.fragment)) == ("/", "", f"key={first.secret}")
    assert first.secret not in repr(first) and first.secret not in repr(first.keys)
    with client(first) as found:
        page = found.get("/")
        assert page.status_code == 200 and first.secret not in page.text
        key = {"Authorization": f"Bearer {first.secret}"}
        assert found.get("/v1/server").status_code == 401
        assert found.get("/v1/server", headers=key).json()["admin"] is True
        assert found.delete("/v1/experts/code", headers=key).status_code == 200
        assert found.get("/v1/server", headers={"Authorization": f"Bearer {other.secret}"}).status_code == 401


@pytest.mark.parametrize("keys", [Keys(api=(b"mine",)), Keys(admin=(b"mine",)), Keys(api=(b"a",), admin=(b"mine",))])
def test_keys_of_the_environment_are_the_only_ones(keys):
    made = Playground(keys)
    assert made.secret is None and made.keys is keys and made.link("http://x") == "http://x/"
    assert any("asks for a key" in line for line in made.lines("http://x"))
    with client(made) as found:
        about = found.get("/v1/server", headers={"Authorization": "Bearer mine"}).json()
        assert about["admin"] is bool(keys.admin)


def test_the_page_asks_its_own_server_alone_and_runs_its_own_scripts_alone():
    with client(Playground(Keys())) as found:
        page = found.get("/")
    text = html.unescape(page.text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    parts = dict(part.strip().partition(" ")[::2] for part in policy.split(";"))
    assert parts["default-src"] == "'none'" and parts["connect-src"] == "'self'"
    assert parts["script-src"].count("sha256-") == page.text.count("<script>") and "unsafe" not in parts["script-src"]
    assert page.headers["content-security-policy"] == "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-store"
    assert not re.search(r"(src|href|action)=\"(?!data:)", page.text) and "://" not in page.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("127.0.0.1", 200),
        ("localhost:9000", 200),  # through a tunnel
        ("LOCALHOST", 200),
        ("[::1]:8765", 200),
        ("192.168.0.7:8765", 200),
        ("my.box:8765", 200),
        ("evil.example:8765", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("[evil]", 421),
        ("[::1]", 200),
        ("[::1].evil.example", 421),
        ("[::1]:8765.evil.example", 421),
        ("[127.0.0.1]", 421),
        ("::1", 421),
        ("127.0.0.1:8765:evil.example", 421),
        ("my.box:", 200),
        ("", 421),
    ],
)
def test_a_request_under_the_name_of_another_site_is_turned_away(host, status):
    with client(Playground(Keys()), host="my.box") as found:
        for path in ("/", "/health"):
            assert found.get(path, headers={"host": host}).status_code == status, path


def test_a_server_without_a_page_has_none_and_answers_to_every_name():
    with TestClient(make_app(service(FakeEngine())), base_url="http://any.example") as found:
        assert found.get("/").status_code == 404 and found.get("/health").status_code == 200


def test_the_browser_gets_the_link_by_a_file_that_nobody_else_reads():
    opened: list[str] = []
    made = Playground(Keys(), browser=opened.append)
    made.open("http://127.0.0.1:1")
    deadline = time.monotonic() + 5
    while not opened and time.monotonic() < deadline:
        time.sleep(0.005)
    assert made.secret not in opened[0] and opened[0].startswith("file://")
    file = Path(unquote(urlsplit(opened[0]).path))
    assert file.parent.stat().st_mode & 0o077 == 0
    assert html.unescape(file.read_text()).count(made.link("http://127.0.0.1:1")) == 2
    made.close()
    assert not file.exists()


def test_it_says_where_the_page_is():
    playground = Playground(Keys())
    made = service(FakeEngine(), playground=playground)
    said = "\n".join(lines(made, ("127.0.0.1", 4321)))
    assert f"playground: http://127.0.0.1:4321/#key={playground.secret}" in said and "Ctrl-C" in said


def test_a_page_that_listens_everywhere_is_opened_on_this_machine():
    assert page_url(ServeSettings(host="0.0.0.0"), 1) == "http://127.0.0.1:1"
    assert page_url(ServeSettings(host="::"), 1) == "http://[::1]:1"
    assert page_url(ServeSettings(host="my.box"), 1) == "http://my.box:1"


def test_no_browser_is_opened_where_there_is_no_screen():
    assert not has_display({}, "linux") and has_display({"DISPLAY": ":0"}, "linux") and has_display({}, "darwin")
