"""`dry_run=estimate` of a study: what is done is subtracted, and what cannot be known is said."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmoe.config.study import LongerConfig, StudyConfig, TuningConfig
from lmoe.errors import StudyError
from lmoe.study.estimate import estimate_lines
from lmoe.study.jobs import SECONDS_FILE, Job
from lmoe.study.matched import ArmSize
from lmoe.study.run import run_study
from lmoe.vocabulary import AtEdge, Sampler
from tests.study.studies import HERE, Written, config, study_of

REPORT = TuningConfig(at_edge=AtEdge.report)


class Stop(Exception):
    """The study is stopped."""


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The lines of a study of 10 steps of 6 s each, of one job at a time."""
    size = ArmSize(total_parameters=10, active_parameters=5, flops_per_token=3e6, reading_share=0.0)
    monkeypatch.setattr("lmoe.study.estimate.arm_size", lambda run, runs: size)
    monkeypatch.setattr("lmoe.study.estimate.rates", lambda precision: {"this CPU": 1e6})

    def said(given: StudyConfig, *, max_epochs: float | None = None, parallel: int = 1) -> list[str]:
        study = study_of(given, tmp_path)
        trainer = SimpleNamespace(max_steps=10, max_epochs=max_epochs, accumulate_grad_batches=1, precision="32-true")
        run = SimpleNamespace(trainer=trainer, data=SimpleNamespace(batch_size=1, max_length=2))
        return list(estimate_lines(replace(study, configs=dict.fromkeys(study.arms, run)), parallel, HERE))  # type: ignore[arg-type]

    return said


def by_distance(job: Job) -> float:
    return 2.0 + abs(dict(job.values)["optim.lr"] - 0.002)


def done(folder: Path, given: StudyConfig, loss=by_distance, *, jobs: int | None = None) -> None:
    """Do a study, or the first jobs of it, each in 30 s or 40 where it judges."""

    def stopping(job: Job) -> float:
        if len(written.launched) - 1 == jobs:
            raise Stop
        return loss(job)

    written = Written(folder, stopping)
    with suppress(Stop):
        run_study(study_of(given, folder), written.tools)
    for file in folder.glob("runs/*/*/*/job.json"):
        if (file.parent / "report").exists():
            seconds = 40.0 if json.loads(file.read_text())["judging"] else 30.0
            (file.parent / SECONDS_FILE).write_text(json.dumps({"seconds": seconds}))


def test_nothing_done_is_estimated_by_the_operations_of_all_steps(lines):
    found = lines(config(tuning=REPORT), parallel=2)
    assert found[1:3] == [
        f"  {name}: 10 parameters, 5 active, 3.0 MFLOP a token, 9 jobs" for name in ("plain", "other")
    ]
    assert found[3].startswith("18 jobs, 2 beside one another: about 9.0 min (on this CPU") and len(found) == 4


def test_a_finished_study_has_nothing_left(lines, tmp_path):
    done(tmp_path, config(tuning=REPORT))
    assert lines(config(tuning=REPORT))[-1] == "18 jobs, all of them done"
    assert lines(config(tuning=REPORT))[1].endswith("9 jobs, 9 of them done")


def test_what_is_left_of_a_study_takes_as_long_as_its_jobs_took(lines, tmp_path):
    """3 jobs of tuning of 30 s are left, and 6 of judging, each taken to last half as long again."""
    done(tmp_path, config(tuning=REPORT), jobs=9)
    last = lines(config(tuning=REPORT))[-1]
    assert last == "9 of 18 jobs are left, 1 beside one another: about 6.0 min (as the jobs took that are done)"


@pytest.mark.parametrize(
    ("limit", "said"), [(None, "about 3.2 min ("), ("00:01:00:00", "about 3.5 min, at most 1.0 h")]
)
def test_places_that_stay_empty_beside_the_last_jobs_count(lines, tmp_path, limit, said):
    """3 jobs of 30 s and 6 of 45, two at a time: 195 s where whoever is free takes the next, 210 in groups."""
    done(tmp_path, config(tuning=REPORT), jobs=9)
    assert (
        f"9 of 18 jobs are left, 2 beside one another: {said}"
        in lines(config(tuning=REPORT, max_time=limit), parallel=2)[-1]
    )


@pytest.mark.parametrize("stopped", [None, 14])
def test_grids_that_were_widened_count_with_what_was_tried_in_them(lines, tmp_path, stopped):
    def rising(job: Job) -> float:
        return 2.0 + abs(dict(job.values)["optim.lr"] - 0.008)

    done(tmp_path, config(), rising, jobs=stopped)
    found = lines(config())
    if stopped is None:
        assert found[-1] == "26 jobs, all of them done"
    else:
        assert found[-2].startswith("8 of 22 jobs are left") and "up to 8 jobs more" in found[-1]


def test_a_try_that_failed_does_not_hide_that_grids_were_widened(lines, tmp_path):
    """All of five values of two arms, with two seeds, and three seeds of judging are done but for the try that failed,
    which is tried again."""

    def rising(job: Job) -> float:
        rate = dict(job.values)["optim.lr"]
        if (job.arm, job.seed, rate) == ("plain", 101, 0.001):
            raise ArithmeticError
        return 2.0 + abs(rate - 0.008)

    done(tmp_path, config(), rising)
    assert lines(config())[-1].startswith("1 of 26 jobs are left")


def test_an_arm_that_a_screening_has_dropped_has_no_more_jobs(lines, tmp_path):
    """Three values of each arm with the first seed, those of the baseline with the second, and three seeds of it."""
    given = config(tuning=REPORT, max_time="00:01:00:00")
    done(tmp_path, given, lambda job: by_distance(job) + (job.arm == "other"))
    found = lines(given)
    assert found[1].endswith(", 9 jobs, 9 of them done") and found[2].endswith(", 3 jobs, 3 of them done")
    assert found[-1] == "12 jobs, all of them done"


def test_an_estimate_refuses_to_draw_values_without_optuna(lines, monkeypatch):
    monkeypatch.setattr("lmoe.study.sampling.find_spec", lambda name: None)
    with pytest.raises(StudyError, match="needs Optuna, which is not installed"):
        lines(config(tuning=TuningConfig(sampler=Sampler.tpe)))


def test_it_is_said_how_many_jobs_widening_may_add(lines):
    """Twice two more values of each of two arms, with two seeds."""
    assert lines(config())[-1] == (
        "where the best value of an arm is outermost, every arm gets more tries, twice at most: up to 16 jobs more, "
        "not counted here"
    )
    assert not any("outermost" in line for line in lines(config(tuning=TuningConfig(sampler=Sampler.tpe))))


def test_the_time_of_runs_of_epochs_is_left_out_until_a_job_tells_it(lines, tmp_path):
    given = config(tuning=REPORT)
    last = lines(given, max_epochs=2.0)[-1]
    assert "for a time that is not known yet (trainer.max_epochs of plain, other: known once a job is done)" in last
    done(tmp_path, given, jobs=2)
    assert "16 of 18 jobs are left, 1 beside one another: about 9.5 min" in lines(given, max_epochs=2.0)[-1]


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("00:01:00:00", "about 18.0 min, at most 1.0 h (study.max_time)"),
        (
            "00:00:10:00",
            "about 18.0 min for all of it, at most 10.0 min (study.max_time): time for judging with 3 seeds",
        ),
        ("00:00:05:00", "study.max_time=00:00:05:00 may be too short: judging with 3 seeds alone takes about 6.0 min"),
    ],
)
def test_a_time_limit_bounds_the_estimate_or_is_called_too_short(lines, limit, said):
    assert said in lines(config(max_time=limit, tuning=REPORT))[-1]
    assert "at most" in lines(config(max_time="00:01:00:00", tuning=REPORT), max_epochs=1.0)[-1]


def test_values_that_are_drawn_count_as_many_as_are_asked_for(lines, tmp_path):
    given = config(tuning=TuningConfig(sampler=Sampler.tpe, tries=5))
    assert lines(given)[-1].startswith("26 jobs, ")
    done(tmp_path, given, jobs=4)
    assert lines(given)[-1].startswith("22 of 26 jobs are left")


def test_longer_runs_that_are_done_are_subtracted(lines, tmp_path):
    given = config(space={}, tuning=TuningConfig(), longer=LongerConfig(arms=1, times=4))
    assert lines(given)[-1].startswith("12 jobs, 1 beside one another: about 30.0 min")
    done(tmp_path, given, lambda job: 2.0, jobs=8)
    assert lines(given)[-1].startswith("4 of 12 jobs are left") and "6 jobs, 2 of them done" in lines(given)[-2]
