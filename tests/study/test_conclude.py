"""What a study leaves of its jobs in its result: failures of tuning and judging, and the commands of all of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmoe.config.study import ArmConfig, JudgingConfig, LongerConfig, StudyConfig
from lmoe.errors import StudyError
from lmoe.study.conclude import NO_SCORE, conclude
from lmoe.study.jobs import JOB_FILE, Job
from lmoe.study.matched import ArmSize
from lmoe.study.results.csv_tables import csv_tables
from lmoe.study.results.result import StudyResult
from lmoe.study.results.tables import failures, tuning_rows, verdict_rows
from lmoe.study.run import run_study
from tests.study.studies import Written, config, study_of

SIZE = ArmSize(total_parameters=10, active_parameters=5, flops_per_token=1e6, reading_share=0.25)


@pytest.fixture
def concluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StudyResult]:
    """Does a study whose jobs lose what they are told to, without a backbone to count or to judge."""
    monkeypatch.setattr("lmoe.study.conclude.arm_size", lambda config, runs: SIZE)
    monkeypatch.setattr("lmoe.study.conclude.base_losses", lambda job, backbone, folder: {})
    monkeypatch.setattr("lmoe.study.conclude._curve", lambda runs: None)

    def conclude_after(loss: Callable[[Job], float], given: StudyConfig | None = None, **changes: Any) -> StudyResult:
        study = study_of(given or config(**changes), tmp_path / "study")
        return conclude(study, run_study(study, Written(tmp_path / "study", loss).tools))

    return conclude_after


def rate(job: Job) -> float:
    return dict(job.values)["optim.lr"]


def usual(job: Job) -> float:
    """Least at the middle learning rate, so that no grid is widened."""
    return 2.0 + abs(dict(job.values).get("optim.lr", 0.0) - 0.002)


def verdicts(result: StudyResult) -> dict[str, str]:
    return {row[0]: row[-1] for row in verdict_rows(result, result.primary)[1:]}


def test_an_arm_whose_every_try_failed_is_shown_as_failed_with_the_reason(concluded):
    def diverging(job: Job) -> float:
        if job.arm == "other":
            raise ArithmeticError
        return usual(job)

    result = concluded(diverging)
    other = result.arm("other")
    assert other.failed and other.chosen is None and not result.arm("plain").failed
    assert len(other.failures) == 6 and "other optim.lr=0.002 seed 101: no memory" in other.failures
    assert verdicts(result) == {"plain": "baseline", "other": "failed"}
    (said,) = failures(result)
    named = "other optim.lr=0.001 seed 100, other optim.lr=0.001 seed 101, other optim.lr=0.002 seed 100"
    assert said == f"failed: {named} and 3 more: no memory"
    assert [row[2:] for row in tuning_rows(result)[4:]] == [["failed"] * 3] * 3
    assert "seed 100: no memory; seed 101: no memory" in csv_tables(result)["tuning.csv"]


def test_one_failed_try_is_shown_with_its_reason_and_does_not_stop_its_arm(concluded):
    def failing_once(job: Job) -> float:
        if job.arm == "other" and job.seed == 101 and rate(job) == 0.004:
            raise ArithmeticError
        return usual(job)

    result = concluded(failing_once)
    other = result.arm("other")
    assert not other.failed and other.loss is not None
    assert other.failures == ["other optim.lr=0.004 seed 101: no memory"]
    assert [found.failures for found in other.tries] == [{}, {}, {"101": "no memory"}]
    assert tuning_rows(result)[6] == ["other", "optim.lr=0.004", "failed", "-", "failed"]
    assert failures(result) == ["failed: other optim.lr=0.004 seed 101: no memory"]


def test_a_try_whose_validation_loss_is_no_number_is_shown_with_that_reason(concluded):
    result = concluded(lambda job: float("nan") if job.arm == "other" and rate(job) == 0.001 else usual(job))
    found = result.arm("other").tries[0]
    assert found.mean is None and found.failures == {"100": NO_SCORE, "101": NO_SCORE}
    assert any(said.endswith(NO_SCORE) for said in failures(result))


def test_a_failure_of_judging_is_no_failure_of_a_try(concluded):
    def failing(job: Job) -> float:
        if job.arm == "other" and job.judging is not None:
            raise ArithmeticError
        return usual(job)

    result = concluded(failing)
    other = result.arm("other")
    assert other.failed and other.chosen == {"optim.lr": 0.002} and len(other.failures) == 3
    assert not any(found.failures for found in other.tries)
    assert verdicts(result)["other"] == "failed"


def test_seeds_of_judging_that_failed_are_named_beside_how_many_were_judged(concluded):
    def failing(job: Job) -> float:
        if job.judging is not None and job.seed in {"plain": [1], "other": [0, 2]}[job.arm]:
            raise ArithmeticError
        return usual(job)

    notes = concluded(failing).notes
    few = "fewer seeds than planned were judged of: plain 2 (seed 1 has failed), other 1 (seeds 0, 2 have failed)"
    assert few in notes


def test_an_arm_that_was_dropped_though_a_try_was_done_is_not_called_failed(concluded):
    losses = {"plain": 2.0, "other": 2.01, "worse": 2.5}

    def failing_once(job: Job) -> float:
        if job.arm == "worse" and rate(job) == 0.004:
            raise ArithmeticError
        return losses[job.arm]

    arms = {name: ArmConfig(overrides=[f"moe.temperature={i + 1}"]) for i, name in enumerate(losses)}
    result = concluded(failing_once, config(arms=arms, max_time="00:01:00:00"))
    assert result.arm("worse").failures and not result.arm("worse").failed
    assert verdicts(result)["worse"] == "not judged"


def test_an_arm_that_failed_its_screening_is_called_failed(concluded):
    def diverging(job: Job) -> float:
        if job.arm == "other":
            raise ArithmeticError
        return usual(job)

    result = concluded(diverging, max_time="00:01:00:00")
    assert result.arm("other").failed and len(result.arm("other").failures) == 3


def test_what_failed_with_longer_runs_is_no_failure_of_the_others(concluded):
    def failing(job: Job) -> float:
        if job.place.startswith("longer") and job.arm == "other":
            raise ArithmeticError
        return usual(job)

    result = concluded(failing, space={}, longer=LongerConfig(arms=2))
    assert result.arm("other").failures == [] and not result.arm("other").failed
    longer = next(arm for arm in result.longer_arms if arm.name == "other")
    assert longer.failed and len(longer.failures) == 3


def test_every_job_has_its_commands_in_the_result(concluded):
    arms = {"plain": ArmConfig(), "apart": ArmConfig(overrides=["moe=soft"], apart=True)}
    judging, longer = JudgingConfig(seeds=[0, 9, 10]), LongerConfig(arms=1)
    result = concluded(usual, arms=arms, longer=longer, judging=judging)
    tuned = [place for place in result.commands if "seed_10" in place and not place.endswith("seed_10")]
    assert len(tuned) == 12 and len(result.commands) == 12 + 6 + 3
    seeds = [place for place in result.commands if place.startswith("runs/plain/optim.lr=0.002/")]
    assert [place.rpartition("_")[2] for place in seeds] == ["0", "9", "10", "100", "101"]
    assert all(len(commands) == (2 if "/apart/" in place else 1) for place, commands in result.commands.items())
    first, second = result.commands["runs/apart/optim.lr=0.002/seed_9"]
    assert first.startswith("lmoe train ") and "seed=9" in first and "optim.lr=0.002" in first
    assert "code" in first and "math" in second
    assert result.arm("apart").commands == result.commands["runs/apart/optim.lr=0.002/seed_0"]
    longer = [place for place in result.commands if place.startswith("longer/")]
    assert all("trainer.max_steps=" in result.commands[place][0] for place in longer) and len(longer) == 3


def test_a_damaged_job_is_refused_with_its_file(concluded, tmp_path):
    concluded(usual)
    file = next((tmp_path / "study").glob(f"runs/other/*/seed_100/{JOB_FILE}"))
    file.write_text("{")
    with pytest.raises(StudyError, match=r"job\.json: .*remove the folder of this job"):
        concluded(usual)


def test_where_tuning_has_left_nothing_to_judge_its_reason_is_said(concluded):
    def failing(job: Job) -> float:
        raise ArithmeticError

    with pytest.raises(
        StudyError, match=r"12 have failed, the first, other optim\.lr=0\.001 seed 100, with: no memory"
    ):
        concluded(failing)


def test_what_a_router_reads_first_is_in_the_result(concluded):
    result = concluded(usual)
    assert {arm.reading_share for arm in result.arms} == {0.25}
    assert {arm.flops_per_token for arm in result.arms} == {1e6}


def test_rows_of_which_one_domain_is_compared_have_all_judged(concluded):
    whole = concluded(usual, name="whole")
    part = concluded(usual, name="part", judging=JudgingConfig(seeds=[0, 1, 2], domains=["code"]))
    assert whole.judging_rows > part.judging_rows
    assert part.judged_before == {"whole": 6, "part": 6}


def test_what_lies_there_of_an_arm_that_the_study_does_not_have_is_passed_over(concluded, tmp_path):
    first = concluded(usual)
    runs = tmp_path / "study" / "runs"
    shutil.copytree(runs / "other", runs / "gone")
    for file in (runs / "gone").rglob(JOB_FILE):
        file.write_text(file.read_text("utf-8").replace("other", "gone"), encoding="utf-8")
    again = concluded(usual)
    assert replace(again, finished=first.finished) == first
