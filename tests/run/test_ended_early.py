"""A run that early stopping or a collapse has ended is over, also for whoever resumes it, until the rules change."""

import os
import signal

import pytest

from lmoe.report.summary import RunSummary
from lmoe.training.module import AdapterModule
from tests.metric_names import rows
from tests.micro import saved_config
from tests.resume.test_exactness import adapter

STOPS = (
    "callbacks=early_stopping",
    "callbacks.early_stopping.patience=1",
    "++callbacks.early_stopping.min_delta=100",
    "trainer.val_every_n_steps=1",
)


def steps(run) -> int:
    return int(max(row["step"] for row in rows(run)))


@pytest.fixture
def ended(train):
    """A run that early stopping ended."""
    done = train(*STOPS)
    assert done.code == 0, done.text
    assert steps(done.run) == 2
    return done.run


def test_the_report_says_how_far_the_run_came_and_why_it_ended(ended):
    summary = RunSummary.from_json(ended / "report" / "summary.json")
    assert (summary.steps, summary.max_steps) == (2, 6)
    assert summary.ended.startswith("early stopping. Monitored metric val/loss did not improve in the last 1 records")
    page = (ended / "report" / "index.html").read_text(encoding="utf-8")
    assert "<td>2 of 6</td>" in page and f"<td>{summary.ended}</td>" in page


def test_resuming_changes_nothing(train, ended):
    before = adapter(ended)
    for _ in range(2):
        again = train(f"resume={ended}", settings=False)
        assert again.code == 0, again.text
        assert "the run was ended after step 2" in again.text
        assert "2 of 6 steps in" in again.text and "ended before: early stopping." in again.text
        assert "train resume=" not in again.text
    assert (steps(ended), adapter(ended)) == (2, before)


def test_without_the_rule_the_run_goes_on_to_its_end(train, ended):
    assert train(f"resume={ended}", "callbacks=none", settings=False).code == 0
    assert saved_config(ended)["callbacks"] == {}
    assert steps(ended) == 6
    whole = train("trainer.val_every_n_steps=1", run="whole")
    assert adapter(ended) == adapter(whole.run)


def test_with_more_patience_too(train, ended):
    done = train(f"resume={ended}", "callbacks.early_stopping.patience=3", settings=False)
    assert done.code == 0, done.text
    assert saved_config(ended)["callbacks"]["early_stopping"]["patience"] == 3
    assert steps(ended) == 4


def test_the_same_of_a_collapse(train, monkeypatch):
    monkeypatch.setattr("lmoe.run.train.LOOK_EVERY_N_STEPS", 2)
    monkeypatch.setattr("lmoe.training.callbacks.collapse_watch.collapse_reason", lambda site, start: "so it is")
    run = train("trainer.stop_on_collapse=true").run
    again = train(f"resume={run}", settings=False)
    assert again.code == 0
    assert "ended before: routing collapse, with trainer.stop_on_collapse=true" in again.text
    assert steps(run) == 2
    assert train(f"resume={run}", "trainer.stop_on_collapse=false", settings=False).code == 0
    assert steps(run) == 6


def test_a_collapse_whose_validation_a_signal_breaks_off_ends_the_run_when_that_is_made_up(train, monkeypatch):
    monkeypatch.setattr("lmoe.run.train.LOOK_EVERY_N_STEPS", 2)
    monkeypatch.setattr("lmoe.training.callbacks.collapse_watch.collapse_reason", lambda site, start: "so it is")
    original = AdapterModule.evaluate

    def interrupted(self, *arguments, **options):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterModule, "evaluate", interrupted)
        stopped = train("trainer.stop_on_collapse=true", "trainer.val_every_n_steps=2")
    assert stopped.code == 130
    done = train(f"resume={stopped.run}", settings=False)
    assert done.code == 0, done.text
    assert steps(stopped.run) == 2 and "val/loss" in rows(stopped.run)[-1]
    assert "2 of 6 steps" in done.text and "routing collapse, with trainer.stop_on_collapse=true" in done.text


def test_time_that_is_over_ends_nothing_for_good(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lmoe.training.callbacks.stop_request.StopRequest._time_is_over", lambda self: True)
        run = train("trainer.max_time=00:00:00:01").run
    assert steps(run) == 1
    assert train(f"resume={run}", settings=False).code == 0
    assert steps(run) == 6
