"""`lmoe doctor` says what there is, keeps secrets, asks no network, and never ends in a traceback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lmoe.cli.main import app
from lmoe.run.packages import installed_version, stated_packages
from tests.micro import bare_environment

SECRETS = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_nobody_else", "WANDB_BASE_URL": "https://me:mine@host"}


@pytest.fixture
def doctor(restored, monkeypatch):
    """The command, in this process, without network."""
    reached = []
    monkeypatch.setattr(socket.socket, "connect", lambda _self, address: reached.append(address))

    def command(*arguments: str):
        done = CliRunner().invoke(app, ["doctor", *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert not reached
        return done.exit_code, done.output

    return command


def test_in_json_it_names_every_package_and_here_nothing_is_broken(doctor):
    code, output = doctor("--json")
    report = json.loads(output)
    found = {one["name"]: one for one in report["findings"]}
    assert len(found) == len(report["findings"]) > 40
    assert (code, report["broken"]) == (0, [])
    assert {one["state"] for one in found.values()} <= {"fine", "note"}, found
    stated = stated_packages()
    for requirement in stated.needed:
        assert found[requirement.name]["value"] == installed_version(requirement.name)
    for extra, requirements in stated.extras.items():
        assert all(r.name in found[f"extra {extra}"]["value"] for r in requirements)
    assert found["threads of torch"]["value"] == str(torch.get_num_threads())
    assert found["W&B run"]["value"] == "would be offline"
    assert found["runs"]["value"].startswith(str(Path.cwd() / "outputs"))


def test_through_a_pipe_it_is_plain_lines_without_secrets_and_what_is_broken_comes_last(doctor, monkeypatch):
    for name, value in (SECRETS | {"WANDB_MODE": "of"}).items():
        monkeypatch.setenv(name, value)
    code, output = doctor()
    assert code == 1
    assert not [secret for secret in (*SECRETS.values(), "mine") if secret in output]
    lines = output.splitlines()
    assert "  W&B API key: yes" in lines
    assert "  hub token: yes" in lines
    assert f"  torch: {torch.__version__}" in lines
    assert lines[-2] == "1 broken:"
    assert lines[-1].startswith("  W&B run: broken: WANDB_MODE=of: no such mode of W&B")
    assert lines[-1].endswith("-> logger=none trains without W&B")


def test_on_a_terminal_it_is_a_table(doctor, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("lmoe.run.doctor.code", lambda: iter(()[0]))  # the base is then left out as well
    code, output = doctor()
    assert code == 1
    assert "│ torch " in output
    assert "1 broken:\n  code: broken: fails: IndexError" in output


def test_with_libraries_that_cannot_be_imported_the_rest_is_still_said(tmp_path):
    blocked = ("torch", "omegaconf", "lightning")
    call = f"import sys; sys.modules |= dict.fromkeys({blocked})\nfrom lmoe.cli.main import main; main()"
    environment = bare_environment() | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    place = tmp_path / "Ärger"  # which ASCII lacks
    place.mkdir()
    command = [sys.executable, "-c", call, "doctor"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "  torch: broken: fails: ModuleNotFoundError: import of torch halted" in done.stdout
    assert "  code: broken: fails: ModuleNotFoundError: import of " in done.stdout
    assert "  base: unknown: not tried, as the code cannot be imported\n" in done.stdout
    assert all(f"  {module}: {installed_version(module)}\n" in done.stdout for module in blocked)
    assert "  free: " in done.stdout
    assert f"  OMP_NUM_THREADS: {os.environ['OMP_NUM_THREADS']}\n" in done.stdout
