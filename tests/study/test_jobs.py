"""The files of jobs: what is damaged is named, and what only estimates hang on is passed over."""

import json
from dataclasses import replace

import pytest

from lmoe.config.study import JudgingConfig
from lmoe.errors import StudyError
from lmoe.files.run_folder import SUMMARY_FILE
from lmoe.study.jobs import (
    JOB_FILE,
    SECONDS_FILE,
    check_begun,
    failure_of,
    finished,
    is_done,
    seconds_of,
    write_job,
)
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


def test_a_job_goes_on_with_its_settings_in_another_order_and_with_no_other_ones(tmp_path, jobs):
    first, *rest = jobs[0].runs[0].settings
    again = replace(jobs[0], runs=(replace(jobs[0].runs[0], settings=("name=x", *rest, first)),))
    assert first == "logger=none" and any(text.startswith("name=") for text in rest)
    write_job(again, tmp_path)
    other = replace(jobs[0], runs=(replace(jobs[0].runs[0], settings=(first, *rest, "logger=wandb")),))
    with pytest.raises(StudyError, match="holds a job with other settings"):
        write_job(other, tmp_path)


def test_damaged_seconds_of_a_job_are_passed_over(tmp_path, jobs):
    first, second = (tmp_path / job.place for job in jobs)
    (first / SECONDS_FILE).write_text('{"sec')
    (second / SECONDS_FILE).write_text('{"seconds": 3}')
    assert seconds_of(tmp_path, machine="here", parallel=2) == [(jobs[1], 3.0)]
    (second / JOB_FILE).write_text("{}")
    assert seconds_of(tmp_path, machine="here", parallel=2) == []


def test_seconds_of_another_machine_or_of_more_beside_one_another_do_not_count_here(tmp_path, jobs):
    first, second = (tmp_path / job.place / SECONDS_FILE for job in jobs)
    first.write_text('{"seconds": 3, "machine": "here", "parallel": 2}')
    second.write_text('{"seconds": 4, "machine": "there", "parallel": 2}')
    assert seconds_of(tmp_path, machine="here", parallel=2) == [(jobs[0], 3.0)]
    assert seconds_of(tmp_path, machine="there", parallel=2) == [(jobs[1], 4.0)]
    assert seconds_of(tmp_path, machine="here", parallel=1) == []


def test_a_damaged_reason_of_a_failure_is_said(tmp_path, jobs):
    file = tmp_path / jobs[0].place / "failed.json"
    file.write_text('{"reas')
    assert failure_of(jobs[0], tmp_path) == f"it failed, and {file} cannot be read"


def changed(file, **changes):
    """Write a summary anew with other keys; those of None are taken out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("content", ["", '{"name": ', "[]"])
def test_a_run_whose_summary_is_damaged_has_not_done_its_steps(tmp_path, jobs, content):
    (tmp_path / jobs[0].place / SUMMARY_FILE).write_text(content)
    assert not is_done(jobs[0], tmp_path) and is_done(jobs[1], tmp_path)
    check_begun(tmp_path)


def test_a_run_whose_summary_a_later_version_has_written_is_done(tmp_path, jobs):
    targets = {"kind": "domain", "targets": ["a"], "sites": 1, "rows": [1], "chosen": [[1.0]], "colour": "red"}
    file = tmp_path / jobs[0].place / SUMMARY_FILE
    changed(file, colour="red", targets=targets)
    assert is_done(jobs[0], tmp_path)
    summary = finished(file.parents[1])
    assert summary is not None and summary.after_mean == 2.0 and summary.targets is not None


def test_a_summary_that_this_version_cannot_read_is_refused_and_not_taken_for_no_run(tmp_path, jobs):
    changed(tmp_path / jobs[0].place / SUMMARY_FILE, seconds=None)
    said = r"summary\.json is no summary .* seconds \(missing\); go on with the version of lmoe that has written it"
    with pytest.raises(StudyError, match=said):
        is_done(jobs[0], tmp_path)
    with pytest.raises(StudyError, match=said):
        check_begun(tmp_path)
