"""What `lmoe study` leaves once its jobs are done."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmoe.cli import study_work
from lmoe.study.result import StudyResult
from tests.study.results import bare_result
from tests.study.studies import config


def test_the_files_of_a_result_are_written_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_work, "study_rows", lambda run: SimpleNamespace(domains=["all"], data_hashes={}))
    monkeypatch.setattr(study_work, "keep_config", lambda study, hashes: None)
    monkeypatch.setattr(study_work, "run_study", lambda study, tools: None)
    monkeypatch.setattr(study_work, "conclude", lambda study, progress: bare_result())
    launcher: Any = SimpleNamespace(alone=None, parallel=1)
    configs: Any = {"plain": None}
    study_work.do_study(config(), [], tmp_path, {}, configs, "lmoe study study=micro", launcher)
    named = capsys.readouterr().out.rpartition("In ")[2].replace("\n", " ").partition(": ")[2].split(", ")
    assert {name.strip() for name in named} | {"study.json"} == {file.name for file in tmp_path.iterdir()}
    assert "study.html" in named
    assert StudyResult.read(tmp_path) == bare_result()
