"""`lmoe play`: the server of `lmoe serve` with a page, and what is another there than here."""

import os
import signal
import socket
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

from lmoe.cli import play as verb
from lmoe.cli import serve
from lmoe.cli.main import app
from lmoe.errors import ConfigError
from lmoe.serve.http.run import listening_socket
from lmoe.serve.settings import ServeSettings
from tests.serve.fake_engine import FakeEngine


@pytest.fixture
def no_keys(monkeypatch):
    for name in ("LMOE_API_KEY", "LMOE_API_KEY_FILE", "LMOE_ADMIN_TOKEN", "LMOE_ADMIN_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_it_is_the_verb_serve_with_other_defaults(monkeypatch):
    found = {}

    def run(flags, settings, *, config, play):
        found.update(flags=flags, settings=settings, config=config, play=play)
        return 0

    monkeypatch.setattr(serve, "run", run)
    arguments = ["play", "--model", "tiny", "--no-browser", "--max-tokens", "9", "--config", "f.yaml"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (
        found["flags"] == {"model": "tiny"} and found["settings"] == {"max_tokens": 9} and found["config"] == "f.yaml"
    )
    assert found["play"] == serve.Play(defaults=verb.DEFAULTS, browser=False)
    assert CliRunner().invoke(app, ["play", "--model", "tiny"]).exit_code == 0 and found["play"].browser


def test_what_is_given_wins_over_a_file_and_a_file_over_the_defaults(tmp_path):
    (tmp_path / "f.yaml").write_text("model: tiny\nexperts: {code: A}\nupload_size: 5\nmax_queue: 3\n")
    found = serve.settled({}, {"max_tokens": 7}, str(tmp_path / "f.yaml"), verb.DEFAULTS)
    assert found.settings == ServeSettings(port=8765, upload_size=5, max_queue=3, max_tokens=7)


def test_the_help_states_the_defaults():
    shown = " ".join(CliRunner().invoke(app, ["play", "--help"], env={"COLUMNS": "200"}).output.split())
    for name, value in verb.DEFAULTS.items():
        assert f"without: {value}" in shown, name


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    done = CliRunner().invoke(app, ["play", "--model", "tiny"])
    assert done.exit_code == 1 and "lmoe play needs uvicorn" in done.stderr


def test_its_own_port_gives_way_to_any_free_one_and_a_port_that_was_chosen_does_not():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServeSettings(port=taken.getsockname()[1])
        with listening_socket(settings, else_any=True) as found:
            assert found.getsockname()[1] not in (0, settings.port)
        with pytest.raises(ConfigError, match="in use; choose another port"):
            listening_socket(settings)


def test_a_port_that_somebody_chose_is_an_error_where_it_is_taken_also_where_it_is_the_usual_one(
    no_keys, monkeypatch, tmp_path
):
    def load(*_, **__):
        raise LookupError("loaded")

    async def start(speaker, settings) -> FakeEngine:
        raise AssertionError

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(verb, "DEFAULTS", {**verb.DEFAULTS, "port": port})
        (tmp_path / "f.yaml").write_text(f"port: {port}\n")
        play = serve.Play(defaults=verb.DEFAULTS, browser=False)
        for settings, config in (({"port": port}, None), ({}, str(tmp_path / "f.yaml"))):
            with pytest.raises(ConfigError, match="in use; choose another port"):
                serve.serve({"model": "tiny"}, settings, config=config, start=start, play=play, open_it=load)
        with pytest.raises(LookupError, match="loaded"):
            serve.serve({"model": "tiny"}, {}, config=None, start=start, play=play, open_it=load)


def test_the_page_of_a_base_is_there_until_a_signal(no_keys, monkeypatch):
    said: list[str] = []
    got: list[httpx.Response] = []
    monkeypatch.setattr(serve, "say", said.append)

    async def start(speaker, settings) -> FakeEngine:
        return FakeEngine(places={}, own_mixture="the base alone")

    def ask() -> None:
        deadline = time.monotonic() + 60
        while not any(line.startswith("playground") for line in said) and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            url, _, key = next(line.split(": ")[1] for line in said if line.startswith("playground")).partition(
                "/#key="
            )
            got.append(httpx.get(f"{url}/"))
            got.append(httpx.get(f"{url}/v1/server", headers={"Authorization": f"Bearer {key}"}))
            got.append(httpx.get(f"{url}/v1/server"))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    play = serve.Play(defaults=verb.DEFAULTS, browser=False)
    serve.serve({"model": "tiny"}, {"port": 0, "patience": 1.0}, config=None, start=start, play=play)
    thread.join()
    page, about, refused = got
    assert "<title>Playground</title>" in page.text and refused.status_code == 401
    assert about.json() | {"version": ""} == {
        "object": "server",
        "version": "",
        "model": "lmoe",
        "chat": True,
        "context": 512,
        "max_tokens": 2048,
        "own_mixture": "the base alone",
        "own_weights": {},
        "experts": [],
        "weights_by_request": True,
        "experts_change": True,
        "admin": True,
        "upload_size": 200_000_000,
    }
