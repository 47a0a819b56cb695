"""`lmoe study` from its command to its tables, on the micro backbone; and one clear message for what cannot be."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from typer.testing import CliRunner

from benchmarks.torture import not_finite
from lmoe.cli.launchers import exit_code_of
from lmoe.cli.main import app
from lmoe.cli.study import compose_arms, read_study
from lmoe.cli.study_job import main as do_job
from lmoe.cli.study_jobs import JobLauncher, JobTask, reason
from lmoe.cli.study_work import do_study
from lmoe.cli.train import main as train
from lmoe.config.study import JudgingConfig
from lmoe.errors import ConfigError, StudyError
from lmoe.evaluate.loss_rows import prepare_judging
from lmoe.evaluate.row_losses import read_row_losses, row_losses
from lmoe.evaluate.subject import subject_of
from lmoe.evaluate.training_rows import data_of
from lmoe.files.adapter_files import WEIGHTS_FILE
from lmoe.files.resources import resource_dir
from lmoe.injection.tracing import adapters_off
from lmoe.report.summary import FINISHED
from lmoe.resume.stopping import Stopped
from lmoe.run.finish import finish
from lmoe.study.jobs import (
    DIVERGED_CODE,
    PRUNED_FILE,
    SECONDS_FILE,
    Job,
    failure_of,
    finished,
    has_diverged,
    read_job,
    write_job,
)
from lmoe.study.results.result import StudyResult
from lmoe.study.sampling import Watch
from lmoe.training.module import AdapterModule
from tests.conftest import process_state
from tests.micro import DOMAINS, ROOT, Micro
from tests.study.studies import HERE

ESTIMATE = "dry_run=estimate"
STUDY = """\
# A small study.
name: small
question: Does anything help?
baseline: lora
arms:
  lora: {title: LoRA, overrides: [injection=dense_lora]}
  apart: {title: LoRAs apart, overrides: [injection=dense_lora], apart: true}
  permuted: {title: permuted, overrides: [moe=oracle, injection.num_experts=3, phase=joint, data.permute_domains=true]}
judging: {seeds: [0, 1, 2], resamples: 200}
timing: {steps: 0}
"""
JOB = Job(arm="a", values=(), seed=0, place="runs/a/as_given/seed_0", runs=(), judging=None)


def settings(micro: Micro) -> list[str]:
    """Of all runs: two steps, a share of the rows kept for judging."""
    kept = [text for text in micro.overrides if not text.startswith(("moe", "trainer.max_steps", "logger"))]
    return [*kept, "trainer.max_steps=2", "logger=none", "data.judge_fraction=0.2"]


def in_this_process(self, jobs):
    """What a launcher does, without starting Python anew for each job."""
    for job in jobs:
        write_job(job, self.folder)
        assert do_job(self.folder / job.place) == 0


def study(micro: Micro, folder: Path, *more: str, text: str = STUDY, without: tuple[str, ...] = ()):
    """The command, with a folder of studies of its own.

    Args:
        without: beginnings of `settings` that the study itself has.
    """
    (folder / "mine" / "study").mkdir(parents=True, exist_ok=True)
    (folder / "mine" / "study" / "small.yaml").write_text(text, encoding="utf-8")
    usual = [one for one in settings(micro) if not one.startswith(without)]
    command = ["study", "--config-dir", "mine", "study=small", *usual, *more]
    return CliRunner().invoke(app, command)


@pytest.fixture(scope="module")
def done(micro: Micro, tmp_path_factory: pytest.TempPathFactory):
    """A study that has been done once: its folder, and what it has said."""
    folder = tmp_path_factory.mktemp("study")
    with process_state(folder) as patch:
        patch.setattr(JobLauncher, "__call__", in_this_process)
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        found = study(micro, folder)
    assert found.exit_code == 0, found.output
    return folder, found.output


@pytest.fixture
def own(done, restored, tmp_path, monkeypatch) -> Path:
    """A copy of its folder, in the working directory."""
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(JobLauncher, "__call__", in_this_process)
    return tmp_path


def test_a_study_ends_with_a_verdict_on_every_arm(done):
    folder, said = done
    result = StudyResult.read(folder / "outputs/study/small")
    assert [arm.name for arm in result.arms] == ["lora", "apart", "permuted"]
    assert [found.arm for found in result.primary] == ["apart", "permuted"]
    assert {len(arm.losses) for arm in result.arms} == {3} and list(result.domains) == sorted(DOMAINS)
    for found in result.primary:
        assert found.low is not None and found.high is not None and found.low <= found.estimate <= found.high
        difference = sum(result.arm(found.arm).losses) / 3 - sum(result.arm("lora").losses) / 3
        assert found.estimate == pytest.approx(difference)
        assert found.sentence in " ".join(said.split()) or found.verdict == "undecided"
    assert len(result.secondary) == 2 * len(DOMAINS)
    assert set(result.base_domain_losses) == set(DOMAINS)
    places = [folder / "outputs/study/small" / place for place in result.commands]
    assert len(places) == 9 and all(place.is_dir() for place in places)
    accuracy = result.arm("apart").classifier_accuracy
    assert accuracy is not None and f"{100 * accuracy:.1f}%" in (folder / "outputs/study/small/study.md").read_text()
    assert "Does anything help?" in said and result.judged_before == {"small": 9}
    files = {file.name for file in (folder / "outputs/study/small").iterdir()}
    assert {"study.json", "study.html", "study.md", "study.tex", "verdicts.csv", "matched.csv", "domains.csv"} <= files


def test_a_command_of_the_result_makes_its_model_again_to_the_bit(own):
    folder = own / "outputs/study/small"
    commands = json.loads((folder / "study.json").read_text())["commands"]
    (place,) = (place for place in commands if place.startswith("runs/apart/") and place.endswith("seed_2"))
    program, verb, *settings = shlex.split(commands[place][1])
    assert (program, verb) == ("lmoe", "train")
    assert train([*settings, "hydra.run.dir=again"]) == 0
    kept, again = (run / "adapter" / WEIGHTS_FILE for run in (folder / place / "domains/01", own / "again"))
    assert kept.read_bytes() == again.read_bytes()


def test_an_arm_that_trains_apart_is_judged_by_the_run_of_the_domain_that_its_classifier_names(done):
    folder = done[0] / "outputs/study/small"
    (job,) = folder.glob("runs/apart/*/seed_0")
    report = json.loads((job / "classifier.json").read_text())
    assert report["domains"] == sorted(DOMAINS) and 0 <= report["accuracy"] <= 1
    assert len(list((job / "domains").iterdir())) == len(DOMAINS)
    (other,) = folder.glob("runs/lora/*/seed_0")
    mine, theirs = (read_row_losses(place / "judged_rows.csv") for place in (job, other))
    assert [row.row for row in mine] == [row.row for row in theirs]
    assert [row.labels for row in mine] == [row.labels for row in theirs]


def test_rows_keep_their_own_domain_where_domains_are_dealt_anew(done):
    folder = done[0] / "outputs/study/small"
    found = {}
    for arm in ("lora", "permuted"):
        (job,) = folder.glob(f"runs/{arm}/*/seed_1")
        found[arm] = read_row_losses(job / "judged_rows.csv")
    assert [(row.row, row.domain) for row in found["lora"]] == [(row.row, row.domain) for row in found["permuted"]]


def test_compare_takes_the_losses_that_judging_has_left(own):
    """Its other comparisons cost no forward."""
    runs = sorted(str(run) for arm in ("lora", "permuted") for run in own.glob(f"outputs/study/small/runs/{arm}/*/*"))
    found = CliRunner().invoke(app, ["compare", *runs, "--output", "found"])
    assert found.exit_code == 0 and "losses on" not in found.output, found.output
    (other,) = json.loads(Path("found/compare.json").read_text())["primary"]
    (known,) = (one for one in StudyResult.read(own / "outputs/study/small").primary if one.arm == "permuted")
    assert other["estimate"] == known.estimate and other["by_seed"] == known.by_seed


def test_more_rows_are_compared_alone_and_count_in_no_mean(restored, micro, tmp_path, monkeypatch):
    monkeypatch.setattr(JobLauncher, "__call__", in_this_process)
    monkeypatch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
    rows = [{"text": f"seven green birds and {number} stones in the river", "domain": "x"} for number in range(4)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    forgetting = "".join(line for line in STUDY.splitlines(keepends=True) if "permuted" not in line)
    more = ["data.domains=[code,math]", "study.judging.seeds=[0]", "+study.judging.more.plain=text.jsonl"]
    found = study(micro, tmp_path, *more, "study.judging.domains=[words]", text=forgetting)
    assert found.exit_code == 0, found.output
    result = StudyResult.read(tmp_path / "outputs/study/small")
    assert list(result.domains) == ["words"] and result.more_domains == {"code": 2, "math": 2, "plain": 4}
    assert set(result.base_domain_losses) == {*DOMAINS, "plain"}
    assert result.arm("lora").loss == pytest.approx(result.arm("lora").domain_losses["words"])
    assert {found.domain for found in result.secondary} == {*DOMAINS, "plain"}
    assert result.primary[0].verdict == "too few seeds" and result.primary[0].low is None
    domains = (tmp_path / "outputs/study/small/domains.csv").read_text()
    assert ",plain,false,4," in domains and ",words,true," in domains
    assert "(plain)" in (tmp_path / "outputs/study/small/study.md").read_text()
    found = study(micro, tmp_path, "study.name=other", "+study.judging.more.plain=text.jsonl")
    assert found.exit_code == 1 and "of the arms permuted has no expert for plain" in found.output


def test_an_arm_that_goes_by_domain_is_refused_rows_of_a_domain_that_it_does_not_train(restored, micro, tmp_path):
    found = study(micro, tmp_path, "data.domains=[code,math]")
    assert found.exit_code == 1
    assert "arm permuted: moe.router=oracle has no expert for words of the judging rows" in found.output


def test_a_metric_that_no_run_logs_is_refused_before_any_run(restored, micro, tmp_path):
    tuned = ["+study.space.optim.lr=[0.001,0.002]", "study.tuning.metric=val/codes/loss"]
    found = study(micro, tmp_path, *tuned)
    assert found.exit_code == 1 and "runs of arm lora do not log it; they log val/loss, val/code/loss" in found.output
    found = study(micro, tmp_path, tuned[0], "study.tuning.metric=val/code/loss")
    assert found.exit_code == 1 and "runs of arm apart do not log it; they log val/loss" in found.output
    assert not list(tmp_path.glob("outputs/study/small/runs"))


def refuse(self, jobs):
    raise AssertionError("nothing is left to do")


def test_a_study_that_is_done_is_only_written_anew(done, own, micro, monkeypatch):
    monkeypatch.setattr(JobLauncher, "__call__", refuse)
    before = (own / "outputs/study/small/study.json").read_text().replace(str(done[0]), str(own))
    found = study(micro, own)
    assert found.exit_code == 0, found.output
    after = (own / "outputs/study/small/study.json").read_text()
    assert {**json.loads(before), "finished": 0} == {**json.loads(after), "finished": 0}


def test_a_changed_study_is_refused_with_the_difference(own, micro):
    found = study(micro, own, "study.judging.margin=0.1")
    assert found.exit_code == 1
    assert "study.judging.margin is 0.1, was 0.01" in found.output and "study.name=…" in found.output
    found = study(micro, own, "optim.weight_decay=0.5")
    assert found.exit_code == 1 and "optim.weight_decay is 0.5, was not set" in found.output, found.output


def test_a_study_in_which_another_process_works_is_refused(own, micro, monkeypatch):
    monkeypatch.setattr("lmoe.run.claim.taken_by_others", lambda file: True)
    found = study(micro, own)
    assert found.exit_code == 1 and "study.name=…" in found.output, found.output


def one_row(file: Path, number: int) -> None:
    messages = [{"role": "user", "content": f"a row of its own {number}"}, {"role": "assistant", "content": "so it is"}]
    with file.open("a", encoding="utf-8") as text:
        text.write(json.dumps({"messages": messages}) + "\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["study.judging.domains=[nosuch]"],
            "study.judging.domains names nosuch, and the judging rows have code, math",
        ),
        (["data.judge_path=judge", "data.judge_fraction=0"], "few: fewer than 2 judging rows"),
        (["+study.judging.more.code=judge/many.jsonl"], "the judging rows have a domain code already"),
        (["+study.judging.more.plain=judge/few.jsonl"], "plain: fewer than 2 judging rows"),
        (["+study.judging.more.plain=TRAIN"], "judging rows are training rows too"),
        (
            ["study.arms.permuted.overrides=['data.judge_path=TRAIN','data.judge_fraction=0']"],
            "arm permuted: 30 of 30 judging",
        ),
        (
            ["study.arms.permuted.overrides=['data.judge_path=judge','data.judge_fraction=0']"],
            "arm permuted is judged on",
        ),
    ],
)
def test_rows_that_could_not_be_judged_are_refused_before_any_run(restored, micro, tmp_path, more, said):
    (tmp_path / "judge").mkdir()
    for number in range(5):
        one_row(tmp_path / "judge" / ("few.jsonl" if number == 4 else "many.jsonl"), number)
    text = STUDY.replace("moe=oracle, injection.num_experts=3, phase=joint, data.permute_domains=true", "moe=soft")
    text = text.replace("arms:", "common: [data.judge_fraction=0.2]\narms:", 1)
    without = ("data.judge",) if any("arms" in one for one in more) else ()
    found = study(
        micro, tmp_path, *[one.replace("TRAIN", str(micro.train)) for one in more], text=text, without=without
    )
    assert found.exit_code == 1, found.output
    assert said in " ".join(found.output.split()), found.output
    assert not list(tmp_path.glob("outputs/study/small/runs"))


def failing(self, jobs):
    for job in jobs:
        write_job(job, self.folder)
        (self.folder / job.place / "failed.json").write_text('{"exit_code": 1, "reason": "no memory"}')


def test_a_baseline_that_fails_leaves_a_result_that_says_so(own, micro, monkeypatch):
    folder = own / "outputs/study/small"
    for file in folder.glob("runs/lora/*/*/judged_rows.csv"):
        file.unlink()
    monkeypatch.setattr(JobLauncher, "__call__", failing)
    found = study(micro, own)
    assert found.exit_code == 0 and "the baseline lora was not judged" in " ".join(found.output.split()), found.output
    result = StudyResult.read(folder)
    assert not result.primary and result.arm("lora").loss is None and len(result.arm("lora").failures) == 3
    assert result.judged_before == {"small": 6}


def test_longer_runs_that_all_fail_leave_the_result_of_the_others(own, micro, monkeypatch):
    folder = own / "outputs/study/small"
    kept = json.loads((folder / "study_config.json").read_text())
    kept["study"]["longer"]["arms"] = 5
    (folder / "study_config.json").write_text(json.dumps(kept))
    monkeypatch.setattr(JobLauncher, "__call__", failing)
    found = study(micro, own, "study.longer.arms=5")
    assert found.exit_code == 0, found.output
    result = StudyResult.read(folder)
    assert len(result.primary) == 2 and not result.longer
    assert "none of the longer runs is done, so that they are not compared" in result.notes


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_report_of_a_classifier_is_refused_with_its_file(own, micro, content):
    (file,) = (own / "outputs/study/small").glob("runs/apart/*/seed_1/classifier.json")
    file.write_text(content)
    found = study(micro, own)
    said = " ".join(found.output.split())
    assert found.exit_code == 1 and "classifier.json: " in said and "it is judged again" in said


def test_a_run_with_a_damaged_summary_is_done_again_to_the_same_losses(own, micro):
    folder = own / "outputs/study/small"
    (summary,) = folder.glob("runs/lora/*/seed_2/report/summary.json")
    before = json.loads((folder / "study.json").read_text())
    summary.write_text('{"name": ')
    found = study(micro, own)
    assert found.exit_code == 0, found.output
    after = json.loads((folder / "study.json").read_text())
    assert after["primary"] == before["primary"] and json.loads(summary.read_text())["ended"] == FINISHED


@pytest.mark.parametrize(("key", "said"), [("colour", "In outputs/study/small"), ("seconds", "seconds (missing)")])
def test_a_run_whose_summary_another_version_has_written_is_never_trained_anew(own, micro, monkeypatch, key, said):
    (file,) = (own / "outputs/study/small").glob("runs/lora/*/seed_2/report/summary.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name != key} | {"colour": "red"}))
    before = file.read_bytes()
    monkeypatch.setattr(JobLauncher, "__call__", failing)
    found = study(micro, own)
    assert said in " ".join(found.output.split()) and found.exit_code == int(key == "seconds"), found.output
    assert file.read_bytes() == before and not list(file.parents[4].glob("*/*/failed.json"))
    assert do_job(file.parents[1]) == found.exit_code and file.read_bytes() == before


def test_a_study_without_adapters_and_checkpoints_goes_on_and_measures_the_same_base(done, own, micro, monkeypatch):
    folder = own / "outputs/study/small"
    before = (folder / "study.json").read_text().replace(str(done[0]), str(own))
    losses = (folder / "base_rows.csv").read_bytes()
    gone = [place for name in ("adapter", "checkpoints") for place in folder.glob(f"**/{name}")]
    assert len(gone) == 2 * (3 + 3 + 3 * len(DOMAINS))
    for place in gone:
        shutil.rmtree(place)
    (folder / "base_rows.csv").unlink()
    monkeypatch.setattr(JobLauncher, "__call__", refuse)
    found = study(micro, own)
    assert found.exit_code == 0, found.output
    assert (folder / "base_rows.csv").read_bytes() == losses
    after = (folder / "study.json").read_text()
    assert {**json.loads(before), "finished": 0} == {**json.loads(after), "finished": 0}


@pytest.mark.parametrize("arm", ["lora", "permuted"])
def test_the_losses_of_the_base_are_those_of_a_run_with_its_adapters_off_to_the_bit(done, restored, arm):
    folder = done[0] / "outputs/study/small"
    (run,) = folder.glob(f"runs/{arm}/*/seed_0")
    subject = subject_of(run, batch_size=JudgingConfig().batch_size)
    config, seed = data_of(run, subject)
    rows = prepare_judging(config, subject.tokenizer, seed=seed, bundled=resource_dir("data"), length_name="length")
    with adapters_off(subject.model):
        assert row_losses(subject, rows) == read_row_losses(folder / "base_rows.csv")


def test_a_base_with_other_weights_than_that_of_the_runs_is_not_measured(own, micro, monkeypatch):
    folder = own / "outputs/study/small"
    (folder / "base_rows.csv").unlink()
    monkeypatch.setattr("lmoe.study.judge.fingerprint", lambda model: "f" * 32)
    found = study(micro, own)
    assert found.exit_code == 1 and "put back the base of the runs" in " ".join(found.output.split()), found.output
    assert not (folder / "base_rows.csv").exists()


@pytest.mark.parametrize(("arm", "gone"), [("lora", ["."]), ("apart", ["domains/00", "domains/02"])])
def test_a_run_that_is_to_be_judged_and_has_no_adapter_is_trained_again_to_the_same_losses(own, arm, gone):
    (place,) = (own / "outputs/study/small").glob(f"runs/{arm}/*/seed_1")
    rows = (place / "judged_rows.csv").read_bytes()
    (place / "judged_rows.csv").unlink()
    kept = {file: file.stat().st_mtime_ns for file in place.glob(f"**/adapter/{WEIGHTS_FILE}")}
    for run in gone:
        for folder in ("adapter", "checkpoints"):
            shutil.rmtree(place / run / folder)
    assert do_job(place) == 0
    assert (place / "judged_rows.csv").read_bytes() == rows
    again = {file for file, written in kept.items() if file.stat().st_mtime_ns != written}
    assert again == {place / run / "adapter" / WEIGHTS_FILE for run in gone}


def test_a_model_whose_loss_is_no_number_fails_its_job_and_leaves_no_rows(own, monkeypatch, capsys):
    (place,) = (own / "outputs/study/small").glob("runs/lora/*/seed_0")
    (place / "judged_rows.csv").unlink()
    nothing = [replace(loss, loss=float("nan")) for loss in read_row_losses(place.parent / "seed_1/judged_rows.csv")]
    monkeypatch.setattr("lmoe.study.judge.row_losses", lambda subject, data: nothing)
    assert do_job(place) == DIVERGED_CODE
    assert "6 of 6 judging rows have a loss that is no finite number" in capsys.readouterr().err
    assert not (place / "judged_rows.csv").exists()


def test_a_job_waits_until_another_process_of_it_has_ended(own, monkeypatch, capsys):
    (place,) = (own / "outputs/study/small").glob("runs/lora/*/seed_0")
    answers = [True, True, False]
    monkeypatch.setattr("lmoe.files.lock.taken_by_others", lambda file: answers.pop(0))
    monkeypatch.setattr("lmoe.cli.study_job.LOOK_AGAIN", 0.0)
    assert do_job(place) == 0 and not answers
    monkeypatch.setattr("lmoe.files.lock.taken_by_others", lambda file: True)
    monkeypatch.setattr("lmoe.cli.study_job.LONGEST_WAIT", -1.0)
    assert do_job(place) == 1 and "is in use by another process" in capsys.readouterr().err


@pytest.fixture
def watched(own, monkeypatch) -> Path:
    """The folder of a job of tuning that is watched all the time, and whose run is to be done once more."""
    (place,) = (own / "outputs/study/small").glob("runs/lora/*/seed_0")
    watch = Watch(arm="lora", trial=0, tries=2, several_keys=False, from_step=0, metric="mean")
    write_job(replace(read_job(place), judging=None, watch=watch), own / "outputs/study/small")
    shutil.rmtree(place / "report")
    shutil.rmtree(place / "checkpoints")
    monkeypatch.setattr("lmoe.cli.study_job.LOOK_EVERY", 0.01)
    return place


def test_a_run_that_has_done_its_last_step_is_not_pruned(watched, monkeypatch):
    ending = threading.Event()

    def finish_late(*args, **kwargs):
        ending.set()
        time.sleep(0.5)
        finish(*args, **kwargs)

    monkeypatch.setattr("lmoe.run.train.finish", finish_late)
    monkeypatch.setattr("lmoe.study.sampling.should_prune", lambda *args: ending.is_set())
    assert do_job(watched) == 0 and ending.is_set()
    assert finished(watched) is not None and not (watched / PRUNED_FILE).exists()


def test_a_job_that_falls_behind_is_pruned_also_before_its_run_listens_to_signals(watched, monkeypatch):
    def train_slowly(*args, **kwargs):
        time.sleep(60)

    monkeypatch.setattr("lmoe.cli.study_job.train", train_slowly)
    monkeypatch.setattr("lmoe.study.sampling.should_prune", lambda *args: True)
    assert do_job(watched) == 0
    assert (watched / PRUNED_FILE).exists() and finished(watched) is None


def test_what_goes_wrong_while_a_job_is_watched_is_said_once_and_looked_at_again(watched, monkeypatch, capsys):
    looks = []

    def fails_at_first(*args):
        looks.append(1)
        if len(looks) < 4:
            raise OSError("the journal is locked")
        return True

    monkeypatch.setattr("lmoe.cli.study_job.train", lambda *args, **kwargs: time.sleep(60))
    monkeypatch.setattr("lmoe.study.sampling.should_prune", fails_at_first)
    assert do_job(watched) == 0 and (watched / PRUNED_FILE).exists()
    assert capsys.readouterr().err.count("cannot be told: OSError: the journal is locked") == 1


def test_judging_rows_that_are_trained_on_are_refused(restored, micro, tmp_path):
    found = study(micro, tmp_path, f"data.judge_path={micro.train}", "data.judge_fraction=0")
    assert found.exit_code == 1
    assert f"30 of 30 judging rows are training rows too, the first {micro.train / 'code.jsonl'}:1;" in found.output
    assert not list(tmp_path.glob("outputs/study/small/runs"))


def test_a_judging_row_of_the_second_source_is_named_by_its_own_file(restored, micro, tmp_path):
    (tmp_path / "val").mkdir()
    shutil.copy(micro.train / "math.jsonl", tmp_path / "val" / "math.jsonl")
    sources = [f"+data.sources.{name}.path={micro.train / name}.jsonl" for name in ("code", "math")]
    text = STUDY.replace("injection.num_experts=3", "injection.num_experts=2")
    found = study(micro, tmp_path, *sources, "data.val_path=val", text=text, without=("data.path", "data.val_path"))
    assert found.exit_code == 1
    said = re.search(r"judging rows are validation rows too, the first (\S+):(\d+);", " ".join(found.output.split()))
    assert said is not None, found.output
    assert said[1] == f"{micro.train / 'math.jsonl'}" and 1 <= int(said[2]) <= 10


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["seed=3"], "seed=3: a study sets seed itself"),
        (["--dry_run=estimate"], "--dry_run=estimate: a study has no such option; it takes key=value, --config-dir"),
        (["--cfg", "job"], "--cfg: a study has no such option"),
        (["-m", "optim.weight_decay=0,0.1"], "-m: a study takes no -m"),
        (["hydra.run.dir=x"], "of Hydra a study takes hydra/launcher and hydra.launcher.* alone"),
        (["dry_run=preflight"], "dry_run=preflight: a study has none, config, estimate"),
        (["trainer.max_time=00:00:01:00"], "all arms: trainer.max_time=00:00:01:00 ends runs before their last step"),
        (["callbacks=early_stopping", "trainer.val_every_n_steps=1"], "all arms: callbacks.early_stopping ends runs"),
        (["injection=mixture_lora"], "of the arms lora, apart set injection themselves"),
        (["study.arms.lora.overrides=['moe=sfot']"], "arm lora: moe=sfot: no such choice; did you mean soft"),
        (["+study.space.optim.lr=[0.001,0.002]", "optim.lr=0.1"], "optim.lr=0.1: it is tuned"),
        (["+study.space.moe.temperature=[1,2]"], "with moe.temperature=2"),
        (["study.baseline=nobody"], "study.baseline is nobody, which is no arm"),
        (["optim.lrr=1"], "optim.lrr: no such key"),
        (["study.judging.seed=1"], "study.judging.seed: no such key"),
        (["study.judging.rows_per_domain=1"], "rows_per_domain is 1, must be 0 for all or at least 2"),
        (["study.name=judged.json"], "study.name is judged.json, the file beside the studies"),
        (["study.arms.permuted.overrides=['injection=dense_lora']"], "arms lora and permuted have the same runs"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(restored, micro, tmp_path, more, said):
    found = study(micro, tmp_path, *more)
    assert found.exit_code == 1
    assert said in " ".join(found.output.split()), found.output
    assert not (tmp_path / "outputs").exists()


def test_a_problem_is_said_once_and_by_what_was_written(restored, micro, tmp_path):
    found = study(micro, tmp_path, "study.arms.lora.overrides=['optim.lr=${nosuch}']")
    assert "which cannot be resolved" in found.output and "Unread" not in found.output, found.output
    found = CliRunner().invoke(app, ["study", "--config-dir", "nowhere", "study=x"])
    assert found.exit_code == 1 and found.output.count("nowhere: no such folder") == 1, found.output


def test_a_value_that_changes_nothing_is_no_tuning(restored, micro, tmp_path):
    found = study(micro, tmp_path, "+study.space.trainer.devices=[1,'1']")
    assert found.exit_code == 1 and "change nothing" in found.output, found.output


def test_runs_of_an_arm_find_experiments_of_the_users_own_folder(restored, micro, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\noptim: {lr: 0.25}\n", "utf-8")
    text = STUDY.replace("  apart: {", "  own: {overrides: [injection=dense_lora, experiment=own]}\n  apart: {")
    found = study(micro, tmp_path, "dry_run=config", text=text)
    assert found.exit_code == 0 and "4 arms: lora, own" in found.output, found.output
    command = ["--config-dir", "mine", "study=small", *settings(micro)]
    config, given, _, _ = read_study(command)
    _, arms = compose_arms(config, given, command[:2])
    found = CliRunner().invoke(app, ["train", *arms["own"].settings, "dry_run=config"])
    assert found.exit_code == 0, found.output


def test_arms_set_keys_of_phases_as_a_command_does(restored, micro, tmp_path):
    """Without a plus where the phase is there; a phase that is not is named."""
    text = STUDY.replace("[injection=dense_lora]}", "[injection=dense_lora, phase.phases.PHASE.lr=0.25]}")
    found = study(micro, tmp_path, "dry_run=config", text=text.replace("PHASE", "adapters"))
    assert found.exit_code == 0 and "3 arms: lora" in found.output, found.output
    config, given, _, _ = read_study(["--config-dir", "mine", "study=small", *settings(micro)])
    configs, _ = compose_arms(config, given, ["--config-dir", "mine"])
    assert configs["lora"].phase.phases["adapters"].lr == 0.25
    found = study(micro, tmp_path, "dry_run=config", text=text.replace("PHASE", "adaptors"))
    assert found.exit_code == 1 and "there is no phase.phases.adaptors; did you mean" in found.output, found.output


def test_a_learning_rate_that_every_role_overrides_is_no_tuning(restored, micro, tmp_path):
    roles = "+optim.roles.lora.lr=0.001, +optim.roles.attn_lora.lr=0.001"
    text = STUDY.replace("[injection=dense_lora]}", f"[injection=dense_lora, {roles}]}}")
    found = study(micro, tmp_path, "+study.space.optim.lr=[0.001,0.002]", "dry_run=config", text=text)
    assert found.exit_code == 1, found.output
    assert re.search(r"arm lora: optim.lr is in the space, and its values\s+change nothing", found.output), found.output


@pytest.mark.parametrize(
    ("mine", "alike"), [("[0.001, 0.002]", True), ("[0.002, 0.001]", True), ("[0.001, 0.004]", False)]
)
def test_arms_are_alike_by_what_they_try_not_by_where_it_is_written(restored, micro, tmp_path, mine, alike):
    same = f"  same: {{overrides: [injection=dense_lora], space: {{optim: {{lr: {mine}}}}}}}"
    text = STUDY.replace("  apart: {", f"{same}\n  apart: {{")
    found = study(micro, tmp_path, "+study.space.optim.lr=[0.001,0.002]", "dry_run=config", text=text)
    said = "arms lora and same have the same runs with the same seeds" in " ".join(found.output.split())
    assert said is alike and found.exit_code == int(alike), found.output


def test_the_study_of_the_page_composes(restored, micro, tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/STUDY.md").read_text("utf-8"), flags=re.DOTALL)
    text = block.replace("my.jsonl", str(micro.train))
    kept = [one for one in settings(micro) if not one.startswith(("data.path", "data.val_path", "data.judge"))]
    (tmp_path / "mine" / "study").mkdir(parents=True)
    (tmp_path / "mine" / "study" / "mine.yaml").write_text(text, encoding="utf-8")
    found = CliRunner().invoke(app, ["study", "--config-dir", "mine", "study=mine", *kept, "dry_run=config"])
    assert found.exit_code == 0 and "2 arms: four, eight" in found.output, found.output


def test_without_a_study_the_command_says_which_there_are(restored):
    found = CliRunner().invoke(app, ["study", "optim.lr=1"])
    assert found.exit_code == 1 and "study is required" in found.output and "routing" in found.output
    assert "study=routing" in CliRunner().invoke(app, ["study", "--help"]).output


def test_config_and_estimate_start_nothing(restored, micro, tmp_path):
    found = study(micro, tmp_path, "dry_run=config")
    assert found.exit_code == 0 and "3 arms: lora, apart, permuted" in found.output
    found = study(micro, tmp_path, "dry_run=estimate")
    assert found.exit_code == 0 and "9 jobs, 1 beside one another: about" in found.output, found.output
    assert not (tmp_path / "outputs").exists()


def test_values_may_be_drawn_within_a_limit_of_time(restored, micro, tmp_path):
    pytest.importorskip("optuna")
    drawn = ["+study.space.optim.lr=[0.001,0.002]", "study.tuning.sampler=tpe", "study.max_time=00:01:00:00"]
    found = study(micro, tmp_path, *drawn, ESTIMATE)
    assert found.exit_code == 0, found.output
    assert "study.max_time" in " ".join(found.output.split())


def test_the_estimate_of_a_study_subtracts_what_is_done(own, micro):
    found = study(micro, own, "dry_run=estimate")
    assert found.exit_code == 0 and "9 jobs, all of them done" in found.output, found.output
    (file,) = (own / "outputs/study/small").glob("runs/lora/*/seed_2/judged_rows.csv")
    file.unlink()
    found = study(micro, own, "dry_run=estimate")
    said = " ".join(found.output.split())
    assert "3 jobs, 2 of them done" in said and "1 of 9 jobs are left, 1 beside one another: about" in said, said


def test_an_estimate_refuses_what_the_study_would_refuse(own, micro):
    found = study(micro, own, "study.name=other", f"data.judge_path={micro.train}", "data.judge_fraction=0", ESTIMATE)
    assert found.exit_code == 1 and "30 of 30 judging rows are training rows too" in found.output, found.output
    found = study(micro, own, "study.judging.margin=0.1", ESTIMATE)
    assert found.exit_code == 1 and "study.judging.margin is 0.1, was 0.01" in found.output, found.output
    assert not (own / "outputs/study/other").exists()


def test_rows_are_not_read_to_look_at_a_config(restored, micro, tmp_path, monkeypatch):
    monkeypatch.setattr("lmoe.cli.study_work.rows_of_arms", None)
    found = study(micro, tmp_path, f"data.judge_path={micro.train}", "data.judge_fraction=0", "dry_run=config")
    assert found.exit_code == 0 and "no problems" in found.output, found.output


def test_the_time_of_a_study_begins_before_its_rows_are_read(restored, tmp_path, monkeypatch):
    now = [10.0]

    def read(composed):
        now[0] = 70.0
        return composed, {}

    def begin(study, tools, began):
        raise StudyError(f"began at {began:g}")

    monkeypatch.setattr("lmoe.cli.study_work.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("lmoe.cli.study_work._read", read)
    monkeypatch.setattr("lmoe.cli.study_work.keep_config", lambda study, hashes: None)
    monkeypatch.setattr("lmoe.cli.study_work.run_study", begin)
    launcher = SimpleNamespace(alone=None, parallel=1, machine=HERE)
    with pytest.raises(StudyError, match="began at 10"):
        do_study(SimpleNamespace(folder=tmp_path), launcher)  # type: ignore[arg-type]


def test_the_reason_of_a_failure_is_the_last_thing_that_was_said(tmp_path):
    (tmp_path / "job.log").write_text("Loading\nconfig: 1 problem\n  - x is 3\n\n", encoding="utf-8")
    assert reason(tmp_path, 1) == "x is 3"
    assert "memory" in reason(tmp_path, -9)
    (tmp_path / "job.log").write_text("Loading\nno such file\n", encoding="utf-8")
    assert reason(tmp_path, 1) == "no such file"


@pytest.mark.parametrize(("jobs", "parallel"), [("n_jobs=2", 2), ("n_jobs=-1", 4), ("n_jobs=-2", 3), ("n_jobs=-9", 1)])
def test_jobs_beside_one_another_are_counted_as_joblib_does_within_the_quota(restored, monkeypatch, jobs, parallel):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setattr("lmoe.cli.threads.own_cores", lambda: 16)
    monkeypatch.setattr("lmoe.cli.threads.core_quota", lambda: 4)
    launcher = JobLauncher(["hydra/launcher=joblib", f"hydra.launcher.{jobs}"], Path("study"))
    assert launcher.parallel == parallel


@pytest.mark.parametrize(
    ("launcher", "parallel", "sharing"),
    [
        (["submitit_slurm", "array_parallelism=8"], 8, 1),
        (["submitit_slurm"], 256, 1),
        (["submitit_local"], 4, 3),
        (["joblib", "n_jobs=2"], 2, 2),
        (["basic"], 1, 1),
    ],
)
def test_jobs_beside_one_another_are_those_of_the_launcher_and_only_on_this_machine_share_its_cores(
    restored, tmp_path, monkeypatch, launcher, parallel, sharing
):
    """A launch of three jobs; the plugins compose, and none of them is started."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setattr("lmoe.cli.study_jobs.usable_cores", lambda: 4)
    tasks: list[JobTask] = []

    def instantiate(self, hydra_context, task_function, config):
        tasks.append(task_function)
        done = JobReturn(status=JobStatus.COMPLETED)
        return SimpleNamespace(launch=lambda overrides, first: [done] * len(overrides))

    monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate)
    name, *more = launcher
    found = JobLauncher([f"hydra/launcher={name}", *(f"hydra.launcher.{text}" for text in more)], tmp_path)
    assert found.parallel == parallel
    found([replace(JOB, place=f"runs/a/as_given/seed_{seed}") for seed in range(3)])
    (task,) = tasks
    assert task.sharing == sharing and task.parallel == (3 if name == "submitit_local" else parallel)
    assert task.machine == found.machine and (task.machine == name) is (name == "submitit_slurm")


@pytest.mark.parametrize(
    ("launcher", "why"),
    [
        ("submitit_slurm", "may let them wait in a queue"),
        ("ray", "may let them wait in a queue"),
        ("submitit_local", "begins all of them at once"),
        ("joblib", None),
        ("basic", None),
    ],
)
def test_a_limit_of_time_is_refused_with_a_launcher_that_decides_itself_when_jobs_run(tmp_path, launcher, why):
    found = JobLauncher([f"hydra/launcher={launcher}"], tmp_path)
    found.check_limit(None)
    if why is None:
        found.check_limit("00:01:00:00")
    else:
        with pytest.raises(ConfigError, match=f"study.max_time=00:01:00:00: .*hydra/launcher={launcher} {why}"):
            found.check_limit("00:01:00:00")


@pytest.mark.parametrize(("whom", "ends"), [("$$", False), ("$PPID", True)])
def test_a_signal_that_a_job_alone_is_sent_fails_it_and_one_to_its_launcher_ends_all(own, monkeypatch, whom, ends):
    (place,) = (own / "outputs/study/small").glob("runs/lora/*/seed_0")
    python = own / "python"
    python.write_text(f"#!/bin/sh\nkill -TERM {whom}\nsleep 60\n", encoding="utf-8")
    python.chmod(0o755)
    runtime = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(place)), job=SimpleNamespace(num=0))
    monkeypatch.setattr("lmoe.cli.study_jobs.HydraConfig.get", lambda: runtime)
    monkeypatch.setattr(sys, "executable", str(python))
    if ends:
        with pytest.raises(Stopped, match="SIGTERM"):
            JobTask(1, 1, 1, HERE)(DictConfig({}))
        assert not (place / "failed.json").exists()
    else:
        assert JobTask(1, 1, 1, HERE)(DictConfig({})) == -signal.SIGTERM
        assert "it was stopped by SIGTERM, which the study was not sent" in (place / "failed.json").read_text()


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Do a job whose process is a shell script, beside another one; its folder comes back."""

    def do(script: str) -> Path:
        write_job(JOB, tmp_path)
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\ncd {tmp_path / JOB.place}\n{script}\n", encoding="utf-8")
        python.chmod(0o755)
        runtime = SimpleNamespace(output_dir=str(tmp_path / JOB.place))
        here = SimpleNamespace(runtime=runtime, job=SimpleNamespace(num=0))
        monkeypatch.setattr("lmoe.cli.study_jobs.HydraConfig.get", lambda: here)
        monkeypatch.setattr(sys, "executable", str(python))
        JobTask(1, 2, 2, HERE)(DictConfig({}))
        return tmp_path / JOB.place

    return do


def test_the_seconds_of_a_job_come_with_what_it_ran_on_and_how_many_ran_beside_it(task):
    kept = json.loads((task("exit 0") / SECONDS_FILE).read_text())
    assert kept.pop("seconds") >= 0 and kept == {"machine": HERE, "parallel": 2}


def test_a_job_that_was_pruned_does_not_say_how_long_one_takes(task):
    place = task(f"touch {PRUNED_FILE}")
    assert (place / PRUNED_FILE).exists() and not (place / SECONDS_FILE).exists()


@pytest.mark.parametrize("code", [1, DIVERGED_CODE])
def test_a_job_that_would_diverge_once_more_is_marked(task, code):
    place = task(f"echo a loss of step 3 is not finite; exit {code}")
    assert failure_of(JOB, place.parents[3]) == "a loss of step 3 is not finite"
    assert has_diverged(JOB, place.parents[3]) is (code == DIVERGED_CODE)


def test_a_training_that_diverges_says_so_to_its_job(own, monkeypatch, capsys):
    (place,) = (own / "outputs/study/small").glob("runs/lora/*/seed_0")
    shutil.rmtree(place / "report")
    shutil.rmtree(place / "checkpoints")
    monkeypatch.setattr(AdapterModule, "losses", AdapterModule.losses)  # put back afterwards
    monkeypatch.setattr(not_finite, "BAD_STEP", 1)
    not_finite.poison("nan loss")
    assert do_job(place) == DIVERGED_CODE and "a loss of step 1 is not finite" in capsys.readouterr().err


def test_a_job_whose_files_cannot_be_written_ends_the_study_with_the_cause(restored, tmp_path):
    (tmp_path / JOB.place / "job.log").mkdir(parents=True)
    with pytest.raises(StudyError, match=r"seed 0 could not be done: IsADirectoryError: .*job\.log") as ended:
        JobLauncher([], tmp_path)([JOB])
    assert "the same command goes on" in str(ended.value)


def test_a_signal_that_comes_while_a_job_is_started_is_passed_on_to_it(monkeypatch):
    """The study would end, and leave the job behind."""
    started = []

    def start(*args, **settings):
        started.append(popen(*args, **settings))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr("lmoe.cli.launchers.subprocess.Popen", start)
    with pytest.raises(Stopped, match="SIGTERM"):
        exit_code_of(["sleep", "60"])
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(("count", "more"), [(2, ""), (6, "; and 2 more")])
def test_the_reason_of_a_failure_has_several_problems_of_a_config_and_how_many_more(tmp_path, count, more):
    error = ConfigError([f"key.{number} is {number}" for number in range(count)])
    (tmp_path / "job.log").write_text(f"config: 1 problem\n  - of an earlier try\nLoading\n{error}\n", encoding="utf-8")
    assert reason(tmp_path, 1) == "; ".join(f"key.{number} is {number}" for number in range(min(count, 4))) + more
