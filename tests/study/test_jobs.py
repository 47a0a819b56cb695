"""The files of jobs: what is damaged is named, and what only estimates hang on is passed over."""

import pytest

from lmoe.config.study import JudgingConfig
from lmoe.errors import StudyError
from lmoe.study.jobs import JOB_FILE, SECONDS_FILE, failure_of, seconds_of, write_job
from lmoe.study.run import run_study
from tests.study.studies import Written, config, study_of


@pytest.fixture
def jobs(tmp_path):
    given = config(space={}, judging=JudgingConfig(seeds=[0]))
    progress = run_study(study_of(given, tmp_path), Written(tmp_path, lambda job: 2.0).tools)
    return [job for own in progress.judged.values() for job in own]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"arm": 1, "values": 3, "runs": [2]}', '{"runs": null}'])
def test_a_damaged_job_is_refused_with_its_file(tmp_path, jobs, content):
    file = tmp_path / jobs[0].place / JOB_FILE
    file.write_text(content)
    with pytest.raises(StudyError, match=r"job\.json: .*remove the folder of this job"):
        write_job(jobs[0], tmp_path)


def test_damaged_seconds_of_a_job_are_passed_over(tmp_path, jobs):
    first, second = (tmp_path / job.place for job in jobs)
    (first / SECONDS_FILE).write_text('{"sec')
    (second / SECONDS_FILE).write_text('{"seconds": 3}')
    assert seconds_of(tmp_path) == [(jobs[1], 3.0)]
    (second / JOB_FILE).write_text("{}")
    assert seconds_of(tmp_path) == []


def test_a_damaged_reason_of_a_failure_is_said(tmp_path, jobs):
    file = tmp_path / jobs[0].place / "failed.json"
    file.write_text('{"reas')
    assert failure_of(jobs[0], tmp_path) == f"it failed, and {file} cannot be read"
