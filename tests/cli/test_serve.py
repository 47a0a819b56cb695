"""`lmoe serve`: what is wrong is said before a model is loaded; what speaks is served until a signal."""

import importlib.util
import json
import os
import signal
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

from lmoe.cli import serve as verb
from lmoe.cli.main import app
from lmoe.cli.speak import SpeakerFlags
from lmoe.errors import ConfigError
from lmoe.serve.settings import ServeSettings
from tests.serve.fake_engine import SAID, FakeEngine


def starting(engine: FakeEngine):
    async def start(speaker, settings) -> FakeEngine:
        return engine

    return start


@pytest.fixture
def no_keys(monkeypatch):
    for name in ("LMOE_API_KEY", "LMOE_API_KEY_FILE", "LMOE_ADMIN_TOKEN", "LMOE_ADMIN_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def given(monkeypatch):
    """What the verb makes of its arguments."""
    found = {}

    def run(flags, settings, *, config):
        found.update(flags=flags, settings=settings, config=config)
        return 0

    monkeypatch.setattr(verb, "run", run)

    def command(*arguments: str) -> dict:
        done = CliRunner().invoke(app, ["serve", *arguments])
        assert done.exit_code == 0, done.output
        return found

    return command


def test_only_what_is_given_wins_over_a_file(given):
    found = given("--config", "f.yaml", "--port", "0", "--no-warm-up", "--allow-origin", "*", "--model", "tiny")
    assert found["config"] == "f.yaml"
    assert found["settings"] == {"port": 0, "warm_up": False, "allow_origin": ("*",)}
    assert found["flags"] == {"model": "tiny"}


def test_the_help_states_the_defaults():
    shown = " ".join(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output.split())
    for name in (
        "port",
        "max_batch_tokens",
        "max_requests",
        "max_queue",
        "max_tokens",
        "max_n",
        "room",
    ):
        assert f"without: {getattr(ServeSettings(), name)}." in shown, name


def test_a_file_says_what_speaks_and_flags_win_over_it(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: tiny\nexperts: {code: A, chat: B}\nweights: {code: 1, chat: 0.5}\nport: 1\nroom: 8\n")
    found = verb.settled({"weights": "0.2,0.8"}, {"port": 2}, str(file))
    assert found.speaks == SpeakerFlags(model="tiny", experts="code=A,chat=B", weights="0.2,0.8")
    assert found.settings == ServeSettings(port=2, room=8)


def test_problems_of_flags_settings_and_file_come_together(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: 3\nexperts: {'a,b': C}\n")
    with pytest.raises(ConfigError) as caught:
        verb.settled({}, {"port": -1}, str(file))
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["model", "experts", "port"]
    with pytest.raises(ConfigError, match="give --checkpoint RUN"):
        verb.settled({}, {}, None)


def test_no_expert_has_the_name_of_the_whole_model():
    flags = {"model": "tiny", "experts": "code=a,lmoe=b"}
    with pytest.raises(ConfigError, match="an expert has the name lmoe"):
        verb.settled(flags, {}, None)
    assert verb.settled(flags, {"name": "other"}, None).settings.name == "other"


@pytest.mark.parametrize("name", ["user/x", "a*2", "a+b", "..", "a\x07b"])
def test_no_expert_has_a_name_that_the_api_could_not_carry(name):
    with pytest.raises(ConfigError) as caught:
        verb.settled({"model": "tiny", "experts": f"{name}=DIR,chat=B"}, {}, None)
    (problem,) = caught.value.problems
    assert "an expert's name is 1 to 200 printable characters" in problem and repr(name) in problem


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"checkpoint": "RUN"}, "with --checkpoint"),
        ({"model": "tiny"}, "without --experts"),
        ({"model": "tiny", "experts": "code=a", "router": "encoder", "head": "a"}, "with --head"),
        ({"model": "tiny", "experts": "code=a", "router": "arrow"}, "with --router arrow"),
    ],
)
def test_settings_for_experts_that_come_later_are_refused_where_none_can(flags, why, tmp_path):
    with pytest.raises(ConfigError) as caught:
        verb.settled(flags, {"room": 64}, None)
    assert caught.value.problems[0].startswith(f"room has no effect {why}") and len(caught.value.problems) == 1
    (tmp_path / "f.yaml").write_text("upload_size: 1000\n")
    with pytest.raises(ConfigError, match=f"upload_size has no effect {why}"):
        verb.settled(flags, {}, str(tmp_path / "f.yaml"))
    nothing = verb.settled(flags, {"room": 0, "upload_size": 0}, None, {"upload_size": 5})
    assert (nothing.settings.room, nothing.settings.upload_size) == (0, 0)
    assert verb.settled(flags, {}, None, {"upload_size": 5}).settings.upload_size == 5


def test_what_nobody_may_use_is_refused_before_a_model_is_loaded(no_keys, monkeypatch):
    def load(*_, **__):
        raise LookupError("loaded")

    def served(settings, play=None):
        flags = {"model": "tiny", "experts": "code=a"}
        given = {"port": 0} | settings
        verb.serve(flags, given, config=None, start=starting(FakeEngine()), open_it=load, play=play)

    with pytest.raises(ConfigError) as caught:
        served({"upload_size": 1000, "room": 64})
    nobody = "has no effect without LMOE_ADMIN_TOKEN or LMOE_ADMIN_TOKEN_FILE: nobody may"
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        f"room {nobody} add an expert",
        f"upload_size {nobody} upload one",
    ]
    page = verb.Play(defaults={"upload_size": 1000}, browser=False)
    for settings, play in (({}, None), ({"upload_size": 0, "room": 0}, None), ({"upload_size": 2000}, page)):
        with pytest.raises(LookupError, match="loaded"):
            served(settings, play)
    monkeypatch.setenv("LMOE_ADMIN_TOKEN", "a-token")
    with pytest.raises(LookupError, match="loaded"):
        served({"upload_size": 1000, "room": 64})
    monkeypatch.delenv("LMOE_ADMIN_TOKEN")
    monkeypatch.setenv("LMOE_API_KEY", "a-key")  # so that the page makes none of its own
    with pytest.raises(LookupError, match="loaded"):
        served({}, page)
    with pytest.raises(ConfigError, match="upload_size has no effect without LMOE_ADMIN_TOKEN"):
        served({"upload_size": 2000}, page)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    done = CliRunner().invoke(app, ["serve", "--model", "tiny"])
    assert done.exit_code == 1
    assert 'lmoe serve needs uvicorn: pip install "lmoe[serve]"' in done.stderr


def test_what_is_wrong_is_said_before_a_model_is_loaded(no_keys, monkeypatch):
    def load(_):
        raise AssertionError("loaded")

    monkeypatch.setenv("LMOE_API_KEY", "")
    with pytest.raises(ConfigError, match="LMOE_API_KEY is set and holds no key"):
        verb.serve({"model": "tiny"}, {}, config=None, start=starting(FakeEngine()), open_it=load)
    monkeypatch.delenv("LMOE_API_KEY")
    settings = {"host": "no.such.host.invalid"}
    with pytest.raises(ConfigError, match="no such host"):
        verb.serve({"model": "tiny"}, settings, config=None, start=starting(FakeEngine()), open_it=load)


def test_the_base_speaks_until_a_signal(no_keys, monkeypatch, capfd, tmp_path):
    engine, got = FakeEngine(places={}, own_mixture="the base alone"), []
    said: list[str] = []
    monkeypatch.setattr(verb, "say", said.append)

    def ask() -> None:
        deadline = time.monotonic() + 60
        while not any(line.startswith("serving") for line in said) and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            url = next(line.split(" at ")[1] for line in said if line.startswith("serving"))
            messages = [{"role": "user", "content": "Hi!"}]
            got.append(httpx.post(f"{url}/chat/completions", json={"model": "tiny-base", "messages": messages}))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    settings = {"port": 0, "name": "tiny-base", "patience": 1.5, "log_file": str(tmp_path / "log.jsonl")}
    verb.serve({"model": "tiny"}, settings, config=None, start=starting(engine))
    thread.join()
    assert got[0].json()["choices"][0]["message"]["content"] == SAID
    assert engine.stopped == 1.5
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["status"] == 200
