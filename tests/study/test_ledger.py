"""How often rows have judged is counted for all studies, also where two end at once."""

import json
from typing import IO

import pytest

from lmoe.errors import StudyError
from lmoe.study.ledger import models_judged


def test_a_study_waits_until_another_has_written_its_number_down(tmp_path, monkeypatch):
    file = tmp_path / "judged.json"

    def taken(lock: IO) -> bool:
        if file.exists():
            return False
        file.write_text(json.dumps({"rows": {"other": 3}}))
        return True

    monkeypatch.setattr("lmoe.files.lock.taken_by_others", taken)
    assert models_judged(tmp_path, "mine", "rows", 2) == {"other": 3, "mine": 2}
    assert json.loads(file.read_text()) == {"rows": {"other": 3, "mine": 2}}


def test_a_ledger_that_is_kept_for_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lmoe.files.lock.taken_by_others", lambda lock: True)
    monkeypatch.setattr("lmoe.study.ledger.LONGEST_WAIT", 0.0)
    with pytest.raises(StudyError, match=r"\.judged\.json\.lock is held by another process"):
        models_judged(tmp_path, "mine", "rows", 2)
    assert not (tmp_path / "judged.json").exists()
