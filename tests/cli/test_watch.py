"""`lmoe watch` says where the page is, opens it, and ends with Ctrl-C; what is no run is refused in words."""

import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmoe.cli import watch
from lmoe.cli.main import app
from tests.micro import ROOT, start


def test_it_serves_a_run_until_it_is_interrupted(own_run: Path) -> None:
    # A shell lets what it starts in the background ignore the signal.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = ("-c", f"{heeds}from lmoe.cli.main import main; main()", "watch", "--checkpoint", own_run, "--no-browser")
    process = start(sys.executable, *command, cwd=ROOT)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert found is not None, said
        with urllib.request.urlopen(found[0], timeout=30) as answer:
            assert b"<!DOCTYPE html>" in answer.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["watch", "--checkpoint", str(tmp_path / "nowhere"), "--no-browser"])
    assert done.exit_code == 1 and "nowhere: no such run directory" in done.stderr
    done = CliRunner().invoke(app, ["watch", "--checkpoint", str(tmp_path), "--no-browser"])
    assert done.exit_code == 1 and "no run: it has no config.yaml" in done.stderr


def test_a_place_where_it_cannot_listen_is_said_with_its_flags(own_run: Path) -> None:
    done = CliRunner().invoke(
        app, ["watch", "--checkpoint", str(own_run), "--no-browser", "--host", "no.such.host.invalid"]
    )
    assert done.exit_code == 1 and "--host no.such.host.invalid" in done.stderr and "no such host" in done.stderr


@pytest.mark.parametrize(
    ("flags", "screen", "opened"), [((), True, True), ((), False, False), (("--no-browser",), True, False)]
)
def test_the_browser_is_opened_where_there_is_a_screen(own_run: Path, monkeypatch, flags, screen, opened) -> None:
    asked: list[str] = []
    monkeypatch.setattr(watch.webbrowser, "open", asked.append)
    monkeypatch.setattr(watch, "has_screen", lambda: screen)
    monkeypatch.setattr("lmoe.watch.server.PageServer.serve_forever", lambda self: None)
    done = CliRunner().invoke(app, ["watch", "--checkpoint", str(own_run), *flags])
    assert done.exit_code == 0, done.output
    assert bool(asked) is opened
