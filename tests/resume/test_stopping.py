"""Signals and the time limit: the run stops at a safe place, says how to go on, and nothing is lost."""

import os
import signal
from pathlib import Path

import pytest
import torch

from lmoe.files.run_folder import resume_setting
from lmoe.report.summary import RunSummary
from lmoe.training.callbacks.stop_request import StopRequest
from lmoe.training.callbacks.validation import Validation
from lmoe.training.module import AdapterModule
from tests.metric_names import rows
from tests.resume.test_exactness import EXACT, adapter, losses


@pytest.fixture(scope="module")
def uninterrupted(micro, tmp_path_factory) -> Path:
    from lmoe.cli.train import main
    from tests.conftest import process_state

    base = tmp_path_factory.mktemp("whole")
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        assert main([*micro.changed(*EXACT, "checkpoint.every_n_steps=100"), f"hydra.run.dir={base / 'run'}"]) == 0
    return base / "run"


def send_in_training(monkeypatch: pytest.MonkeyPatch, signum: int, micro_batch: int) -> None:
    """Send this process a signal in the middle of the forward of a micro-batch, counted from 0."""
    original = AdapterModule.training_step

    def training_step(self, batch, batch_idx):
        if batch_idx == micro_batch:
            os.kill(os.getpid(), signum)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(AdapterModule, "training_step", training_step)


@pytest.mark.parametrize(
    ("signum", "code", "micro_batch", "saved_step"),
    [
        pytest.param(signal.SIGTERM, 143, 4, 2, id="SIGTERM in the middle of a window"),
        pytest.param(signal.SIGTERM, 143, 5, 3, id="SIGTERM in the last micro-batch before a phase boundary"),
        pytest.param(signal.SIGINT, 130, 6, 3, id="SIGINT in the first micro-batch of a phase"),
        pytest.param(signal.SIGTERM, 143, 11, 6, id="SIGTERM in the last micro-batch of the run"),
    ],
)
def test_a_signal_saves_stops_and_loses_nothing(
    train, uninterrupted, monkeypatch, signum, code, micro_batch, saved_step
):
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        send_in_training(patch, signum, micro_batch)
        stopped = train(*EXACT, "checkpoint.every_n_steps=100")
    assert stopped.code == code, stopped.text
    said = f"stopped by {signum.name} after step {saved_step} of 6; lmoe train resume={stopped.run} goes on"
    assert said in stopped.text
    assert signal.getsignal(signum) is before
    assert torch.load(stopped.run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved_step
    done = train(f"resume={stopped.run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(stopped.run) == adapter(uninterrupted)
    assert losses(stopped.run) == losses(uninterrupted)


def test_a_signal_before_the_first_step_leaves_a_run_that_starts_anew(train, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        send_in_training(patch, signal.SIGTERM, 0)
        stopped = train(*EXACT, "checkpoint.every_n_steps=100")
    assert stopped.code == 143
    assert "stopped by SIGTERM before the end of the first step; lmoe train resume=" in stopped.text
    assert not (stopped.run / "checkpoints").exists()
    done = train(f"resume={stopped.run}", settings=False)
    assert done.code == 0, done.text
    assert losses(stopped.run) == losses(uninterrupted)


@pytest.mark.parametrize("nth", [1, 3])
def test_a_validation_that_a_signal_breaks_off_is_made_up(train, uninterrupted, monkeypatch, nth):
    """The first one is that of step 0, with the adapters off."""
    original, calls = AdapterModule.evaluate, []

    def evaluate(self, *arguments, **options):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterModule, "evaluate", evaluate)
        stopped = train(*EXACT, "checkpoint.every_n_steps=100")
    assert stopped.code == 143, stopped.text
    done = train(f"resume={stopped.run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(stopped.run) == adapter(uninterrupted)
    assert losses(stopped.run) == losses(uninterrupted)


def test_a_signal_of_slurm_counts_only_inside_a_job(train, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "1")
        send_in_training(patch, signal.SIGUSR1, 5)
        stopped = train(*EXACT, "checkpoint.every_n_steps=100")
    assert stopped.code == 128 + signal.SIGUSR1, stopped.text
    done = train(f"resume={stopped.run}", settings=False)
    assert adapter(done.run) == adapter(uninterrupted)


def test_what_listened_to_a_signal_before_hears_of_it_once_the_run_is_saved(train, monkeypatch, tmp_path):
    """As submitit does, which then puts the job into the queue again."""
    heard = []

    def before(signum, frame):
        heard.append((signum, (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()))

    monkeypatch.setenv("SLURM_JOB_ID", "1")
    own = signal.signal(signal.SIGUSR2, before)
    try:
        send_in_training(monkeypatch, signal.SIGUSR2, 5)
        stopped = train(*EXACT, "checkpoint.every_n_steps=100")
    finally:
        signal.signal(signal.SIGUSR2, own)
    assert stopped.code == 128 + signal.SIGUSR2
    assert heard == [(signal.SIGUSR2, True)]


@pytest.mark.parametrize(
    ("micro_batch", "step"),
    [
        pytest.param(6, 3, id="at the end of a step, which is validated"),
        pytest.param(2, 1, id="at the end of a step, which is not"),
        pytest.param(11, 5, id="in the middle of a step"),
    ],
)
def test_after_max_time_there_is_an_adapter_and_the_run_goes_on(train, uninterrupted, monkeypatch, micro_batch, step):
    """And nothing is left of the validation that was made for the report alone."""
    with monkeypatch.context() as patch:
        looks = iter([False] * (micro_batch - 1) + [True])
        patch.setattr(StopRequest, "_time_is_over", lambda self: next(looks))
        stopped = train(
            *EXACT, "checkpoint.every_n_steps=100", "trainer.max_time=00:00:00:50", "analysis.knock_out=experts"
        )
    assert stopped.code == 0, stopped.text
    assert f"trainer.max_time is over after step {step} of 6" in stopped.text
    assert f"{step} of 6 steps in" in stopped.text and "ended before: trainer.max_time was over" in stopped.text
    assert f"Try next: lmoe train {resume_setting('run')} lmoe generate" in stopped.text
    summary = RunSummary.from_json(stopped.run / "report" / "summary.json")
    assert (summary.steps, summary.max_steps, summary.ended) == (step, 6, "trainer.max_time was over")
    page = (stopped.run / "report" / "index.html").read_text(encoding="utf-8")
    assert f"<td>{step} of 6</td>" in page and "<td>trainer.max_time was over</td>" in page
    assert f"val/routing/knock_out/0/{summary.domains[0]}" in rows(stopped.run)[-1]
    done = train(f"resume={stopped.run}", "trainer.max_time=null", "analysis.knock_out=none", settings=False)
    assert done.code == 0, done.text
    assert adapter(stopped.run) == adapter(uninterrupted)
    assert losses(stopped.run) == losses(uninterrupted)


def test_time_that_is_over_before_the_first_step_leaves_the_row_of_the_adapters_off(train, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "_time_is_over", lambda self: True)
        stopped = train(*EXACT, "trainer.max_time=00:00:00:50")
    assert stopped.code == 0, stopped.text
    assert "0 of 6 steps in" in stopped.text
    assert losses(stopped.run) == losses(uninterrupted)[:1]


def test_resume_auto_starts_a_run_and_goes_on_with_it(train, uninterrupted, monkeypatch, tmp_path):
    run = tmp_path / "run"
    auto = (*EXACT, "checkpoint.every_n_steps=100", "resume=auto", f"hydra.run.dir={run}")
    with monkeypatch.context() as patch:
        send_in_training(patch, signal.SIGTERM, 7)
        assert train(*auto).code == 143
    done = train(*auto)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(uninterrupted)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_holds_it(train, micro, tmp_path):
    from tests.micro import start

    holding = (
        "import sys, time; from pathlib import Path; from lmoe.run.claim import claimed\n"
        "with claimed(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    import sys

    process = start(sys.executable, "-c", holding, tmp_path / "run", cwd=tmp_path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        done = train()
        assert done.code == 1
        assert f"{done.run} is in use: process {process.pid} on " in done.text
        assert sorted(p.name for p in done.run.iterdir()) == ["run.lock"]
    finally:
        process.kill()
        process.communicate()
    assert train().code == 0  # the lock goes with the process, however it ends


def test_ten_steps_in_a_row_that_are_no_numbers_end_the_run(train, monkeypatch):
    original = AdapterModule.losses

    def losses_of(self, batch):
        found = original(self, batch)
        return found._replace(values=found.values * float("nan")) if self.model.training else found

    monkeypatch.setattr(AdapterModule, "losses", losses_of)
    monkeypatch.setattr(Validation, "due", lambda self, step, module: False)
    done = train("trainer.nonfinite=skip", "trainer.max_steps=20", "phase=joint")
    assert done.code == 1
    assert "for the 10th time in a row" in done.text


def test_a_run_whose_last_step_spoils_the_weights_leaves_no_adapter(train):
    done = train("optim.lr=1e30", "trainer.max_steps=1", "phase=joint")
    assert done.code == 1
    assert "the validation loss after step 1 is not finite" in done.text and "Lower optim.lr" in done.text
    assert not (done.run / "adapter").exists()
