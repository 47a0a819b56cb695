"""What a run measures of its routers, and what it does when one collapses."""

import json

import pytest

from tests.metric_names import names, rows
from tests.wandb_file import records, run_files


def test_knock_out_at_the_end_is_logged_by_expert_and_domain_and_kept_for_the_report(train):
    done = train("analysis.knock_out=experts")
    assert done.code == 0, done.text
    assert "silencing experts one at a time" in done.out
    found = [name for name in names(done.run) if name.startswith("val/routing/knock_out/")]
    summary = json.loads((done.run / "report" / "summary.json").read_text())
    domains, experts = summary["domains"], 4
    assert sorted(found) == sorted(f"val/routing/knock_out/{e}/{d}" for e in range(experts) for d in domains)
    last = rows(done.run)[-1]
    assert {f"all sites/{e}": {d: last[f"val/routing/knock_out/{e}/{d}"] for d in domains} for e in range(experts)} == (
        summary["knock_out"]
    )
    most = {expert: max(changes, key=lambda d: changes[d]) for expert, changes in summary["knock_out"].items()}
    needed = {expert: domain if summary["knock_out"][expert][domain] > 0 else None for expert, domain in most.items()}
    assert summary["specialisation"] == needed
    assert "What each expert is for" in (done.run / "report" / "index.html").read_text(encoding="utf-8")


def test_the_report_says_how_often_the_tokens_of_one_expert_use_another_too(finished_run):
    """top_k = 2: each token of an expert uses itself and one other, so that a row adds up to 2."""
    summary = json.loads((finished_run / "report" / "summary.json").read_text())
    assert len(summary["coactivation"]) == 6
    rows_of_used = [(e, row) for site in summary["coactivation"].values() for e, row in enumerate(site) if any(row)]
    assert len(rows_of_used) > 12
    for e, row in rows_of_used:
        assert row[e] == 1 and sum(row) == pytest.approx(2)


def test_validation_logs_what_experts_know_of_domains_beside_what_chance_shows(train):
    done = train("trainer.val_every_n_steps=2")
    assert done.code == 0, done.text
    validated = [row for row in rows(done.run) if "val/loss" in row and row["step"]]
    assert len(validated) >= 2
    for number, row in enumerate(validated):
        assert 0 < row["val/routing/domain_information_p"] <= 1
        assert row["val/routing/domain_information"] >= 0 and row["val/routing/domain_information_null"] > 0
        assert -1 <= row["val/routing/expert_cosine"] <= 1
        assert ("val/routing/saturation" in row) == (number > 0)
    assert 0.2 < validated[-1]["val/routing/saturation"] <= 1


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site counts as collapsed at the first look, after two steps."""
    monkeypatch.setattr("lmoe.run.train.LOOK_EVERY_N_STEPS", 2)
    monkeypatch.setattr(
        "lmoe.training.callbacks.collapse_watch.collapse_reason", lambda site, start: "the test says so"
    )


def test_a_collapse_ends_the_run_with_its_report_where_that_is_asked_for(train, collapsing):
    going_on, stopped = train(run="on"), train("trainer.stop_on_collapse=true", run="stopped")
    assert going_on.code == stopped.code == 0, stopped.text
    last = max(row["step"] for row in rows(going_on.run))
    assert max(row["step"] for row in rows(stopped.run)) == 2 < last
    assert "the test says so" in stopped.out
    summary = json.loads((stopped.run / "report" / "summary.json").read_text())
    assert len(summary["collapsed"]) == 6


def test_a_run_that_a_collapse_ends_between_validations_reports_the_losses_of_its_end(train, collapsing, monkeypatch):
    monkeypatch.setattr("lmoe.run.train.LOOK_EVERY_N_STEPS", 4)
    stopped = train("trainer.stop_on_collapse=true", "trainer.val_every_n_steps=3", "phase=joint")
    assert stopped.code == 0, stopped.text
    validated = [row for row in rows(stopped.run) if "val/code/loss" in row]
    assert [row["step"] for row in validated] == [0, 3, 4]
    summary = json.loads((stopped.run / "report" / "summary.json").read_text())
    assert summary["after"]["code"] == validated[-1]["val/code/loss"]


def test_a_collapse_is_a_wandb_alert(train, collapsing):
    done = train("logger=wandb", "logger.project=tests")
    assert done.code == 0, done.text
    (file,) = run_files(done.run / "wandb")
    alerts = [record.alert for record in records(file) if record.HasField("alert")]
    assert len(alerts) >= 6
    assert {alert.title for alert in alerts} == {"routing collapse"}
    assert all("the test says so" in alert.text for alert in alerts)


def test_stopping_on_collapse_with_a_router_that_learns_nothing_is_refused(train):
    done = train("moe=uniform", "phase=joint", "trainer.stop_on_collapse=true")
    assert done.code == 1
    assert "trainer.stop_on_collapse has no effect with moe.router=uniform" in done.text
