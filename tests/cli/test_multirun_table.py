"""What differs from job to job, how many jobs there are, and what a table says of jobs that left little."""

import json
from dataclasses import asdict

import pytest

from lmoe.cli.launchers import JobError
from lmoe.cli.multirun_table import (
    DONE,
    JobNote,
    JobNotes,
    JobResult,
    job_notes,
    next_lines,
    print_table,
    state_of,
    swept_settings,
)
from lmoe.errors import ConfigError
from lmoe.files.run_folder import path_from_here
from lmoe.report.summary import TIME_OVER
from lmoe.resume.stopping import Stopped


def note(number: int, **changes) -> JobNote:
    usual = {
        "number": number,
        "total": 3,
        "label": f"seed={number}",
        "folder": "nowhere",
        "seconds": 2.0,
        "state": DONE,
    }
    return JobNote(**(usual | changes))


@pytest.mark.parametrize(
    ("settings", "keys", "jobs"),
    [
        (["seed=0", "moe=soft,top_k", "injection.num_experts=2,4,8"], ("moe", "injection.num_experts"), 6),
        (["moe=soft,top_k", "moe=soft"], (), 1),  # the command line counts, not the sweep's file
        (["seed=range(0,5)", "++phase.phases.experts.lr=0.1,0.2"], ("seed", "++phase.phases.experts.lr"), 10),
        (["moe=glob(*)", "seed=1,2"], ("moe", "seed"), None),
        (["name='a,b'", "data.domains=[a,b]"], (), 1),
    ],
)
def test_jobs_are_counted_and_named_by_what_differs(settings, keys, jobs):
    swept = swept_settings(settings)
    assert (swept.keys, swept.jobs) == (keys, jobs)


def test_a_job_is_named_by_its_settings_that_differ():
    swept = swept_settings(["moe=soft,top_k", "seed=3", "++phase.phases.experts.lr=0.1,0.2"])
    assert swept.of_job(["seed=3", "moe=soft", "++phase.phases.experts.lr=0.2"]) == [
        "moe=soft",
        "phase.phases.experts.lr=0.2",
    ]


def test_a_job_says_of_how_many_it_is_where_that_is_known():
    assert note(1, total=6, label="seed=4").line == "job 1 (2 of 6): seed=4"
    assert note(1, total=None, label="").line == "job 1"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (
            JobError("job 1 failed (seed=0)\nconfig: 2 problems\n  - a is wrong\n  - b is"),
            "failed: a is wrong (and 1 more)",
        ),
        (ConfigError("a is wrong"), "failed: a is wrong"),
        (JobError("its run ended with exit code 1"), "failed: its run ended with exit code 1"),
        (ValueError("any bug"), "failed: ValueError: any bug"),
        (Stopped(15), "stopped by SIGTERM"),
    ],
)
def test_why_a_job_has_ended_is_a_line(error, state):
    assert state_of(error) == state


def test_the_table_says_which_jobs_were_lost_and_which_never_began(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with job_notes(True, []) as notes:
        assert notes.folder is not None
        place = notes.folder
        for one in (note(0), note(1, state="failed: it ended without an answer", seconds=float("nan"))):
            (place / f"{one.number}.json").write_text(json.dumps(asdict(one)))
    said = capsys.readouterr().out
    assert "failed: it ended without an answer" in said and "1 of 3 jobs have not begun" in said
    assert "compare them" not in said and not place.exists()


def test_runs_that_prefer_answers_are_not_offered_to_a_comparison_that_refuses_them(capsys, finished_run, sft_dpo_run):
    def said(*runs) -> str:
        print_table([note(number, folder=str(run), label=f"moe.top_k={number}") for number, run in enumerate(runs)])
        return " ".join(capsys.readouterr().out.split())

    assert "compare them: lmoe compare" in said(finished_run, finished_run)
    for runs in ((sft_dpo_run, sft_dpo_run), (finished_run, sft_dpo_run)):
        text = said(*runs)
        assert "compare them" not in text
        assert all(f"lmoe evaluate --checkpoint {path_from_here(run)}" in text for run in runs)


def result(number: int, label: str, *, ended: str = "") -> JobResult:
    done = note(number, label=label, folder=f"run_{number}")
    return JobResult(note=done, before=2.0, after=1.0, ended=ended, finished=True)


@pytest.mark.parametrize("labels", [["seed=0", "seed=1"], ["seed=0 logger=none", "seed=1 logger=none name=x"]])
def test_jobs_that_are_one_arm_are_told_to_be_compared_beside_others(labels):
    [line] = next_lines([result(number, label) for number, label in enumerate(labels)])
    assert line.startswith("they are one arm") and line.endswith("lmoe compare run_0 run_1 RUN …")


def test_jobs_of_several_arms_are_compared_without_those_whose_time_was_over():
    jobs = [result(number, f"moe={moe} seed={number}") for number, moe in enumerate(("soft", "top_k"))]
    over = result(2, "moe=sigmoid seed=2", ended=TIME_OVER)
    stopped = result(3, "moe=oracle seed=3", ended="early stopping")
    assert next_lines([*jobs, over, stopped]) == ["compare them: lmoe compare run_0 run_1 run_3"]
    assert next_lines([jobs[0], over]) == []


def test_a_single_run_and_a_multirun_without_jobs_have_no_table(capsys):
    with job_notes(False, []) as notes:
        assert notes == JobNotes()
    with job_notes(True, []):
        pass
    assert capsys.readouterr().out == ""
