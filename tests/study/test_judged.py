"""The rows that all models were judged on."""

import pytest

from lmoe.config.study import JudgingConfig
from lmoe.errors import StudyError
from lmoe.study.jobs import ROWS_FILE
from lmoe.study.judged import read_judged
from lmoe.study.run import run_study
from tests.study.studies import ROWS, Written, config, study_of, write_rows


@pytest.mark.parametrize("short", ["plain", "other"])
def test_rows_that_an_arm_lacks_are_counted_whichever_arm_it_is(tmp_path, short):
    given = config(space={}, judging=JudgingConfig(seeds=[0, 1]))
    progress = run_study(study_of(given, tmp_path), Written(tmp_path, lambda job: 2.0).tools)
    write_rows(tmp_path / progress.judged[short][0].place / ROWS_FILE, 2.0, rows=ROWS - 4)
    found = read_judged(progress.judged, tmp_path)
    assert len(found.rows) == ROWS - 4 and found.left_out == 4


def test_where_nothing_was_judged_the_reason_is_said(tmp_path):
    def failing(job):
        raise ArithmeticError

    given = config(space={}, judging=JudgingConfig(seeds=[0]))
    progress = run_study(study_of(given, tmp_path), Written(tmp_path, failing).tools)
    with pytest.raises(StudyError, match="2 have failed, the first, other as_given seed 0, with: no memory"):
        read_judged(progress.judged, tmp_path)
    with pytest.raises(StudyError, match="none was begun"):
        read_judged({}, tmp_path / "nothing")
