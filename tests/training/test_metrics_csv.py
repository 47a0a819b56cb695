"""metrics.csv: rows of the past stay, whatever happens to the process that writes the next one."""

import csv
from pathlib import Path

import pytest

from lmoe.errors import CheckpointError
from lmoe.report.curves import read_metrics
from lmoe.training.metrics_csv import MetricsCsv


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def dumb(path: Path, columns: list[str], rows: list[dict]) -> bytes:
    """The bytes of a file that is written at once."""
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


def test_the_bytes_are_those_of_a_file_that_is_written_at_once(path, tmp_path):
    metrics = MetricsCsv(path, None)
    metrics.log_metrics({"val/loss": 3.5, "epoch": 0}, 0)
    for step in (1, 2, 3):
        metrics.log_metrics({"train/loss": 1 / step, "a, b": float("nan")}, step)
        metrics.log_metrics({"val/loss": 2.0**-step}, step)
    metrics.log_metrics({"val/loss": 7.0}, 3)  # shorter than before
    metrics.log_metrics({"late": 1e-20}, 4)
    losses = [{"step": s, "train/loss": 1 / s, "a, b": float("nan"), "val/loss": 2.0**-s} for s in (1, 2, 3)]
    losses[-1]["val/loss"] = 7.0
    expected = [{"step": 0, "val/loss": 3.5}, *losses, {"step": 4, "late": 1e-20}]
    assert path.read_bytes() == dumb(tmp_path / "other", ["step", "val/loss", "train/loss", "a, b", "late"], expected)


def test_a_row_costs_what_it_holds_however_long_the_run_is(path, monkeypatch):
    """Only a new column writes the rows of the past again, and only the last row is kept in memory."""
    metrics = MetricsCsv(path, None)
    metrics.log_metrics({"train/loss": 1.0, "val/loss": 1.0}, 0)
    monkeypatch.setattr(metrics, "_write_anew", lambda rows: pytest.fail("written anew"))
    monkeypatch.setattr(metrics, "_rows", lambda end=None: pytest.fail("read"))
    for step in range(1, 50):
        metrics.log_metrics({"train/loss": 1.0}, step)
        metrics.log_metrics({"val/loss": 1.0}, step)
    assert len(path.read_text().splitlines()) == 51


def logged(path: Path, steps: int) -> bytes:
    metrics = MetricsCsv(path, None)
    for step in range(steps + 1):
        metrics.log_metrics({"train/loss": 0.5 + step}, step)
    return path.read_bytes()


def test_names_may_hold_characters_at_which_python_breaks_lines(path):
    names = [f"val/a{sign}b/loss" for sign in "\u2028\x85\x0c\x1e\r"]
    MetricsCsv(path, None).log_metrics(dict.fromkeys(names, 2.5), 1)
    assert read_metrics(path) == {name: [(1, 2.5)] for name in names}
    MetricsCsv(path, 1).log_metrics(dict.fromkeys(names, 1.5), 2)
    assert read_metrics(path) == {name: [(1, 2.5), (2, 1.5)] for name in names}


@pytest.mark.parametrize("torn", [1, 2, 5])
def test_a_run_that_resumes_keeps_the_rows_up_to_its_checkpoint_and_no_torn_one(path, torn):
    """The torn line begins with a number that a step before the checkpoint could have had."""
    whole = logged(path, 3)
    path.write_bytes(logged(path, 12)[:-torn])
    for step in (12, 11):
        resumed = MetricsCsv(path, step)
        assert resumed._last is not None and int(resumed._last["step"]) == 11
    MetricsCsv(path, 3)
    assert path.read_bytes() == whole


def test_a_resumed_row_is_completed_as_if_nothing_had_happened(path):
    logged(path, 2)
    metrics = MetricsCsv(path, 2)
    metrics.log_metrics({"val/loss": 9.0}, 2)
    metrics.log_metrics({"train/loss": 3.5}, 3)
    assert path.read_text().splitlines() == ["step,train/loss,val/loss", "0,0.5,", "1,1.5,", "2,2.5,9.0", "3,3.5,"]


def test_what_is_taken_back_leaves_no_row_behind_that_would_be_empty(path):
    metrics = MetricsCsv(path, None)
    metrics.log_metrics({"train/loss": 1.0, "val/loss": 2.0}, 1)
    metrics.log_metrics({"val/loss": 3.0}, 2)
    metrics.forget("val/", 2)
    metrics.forget("val/", 2)
    assert path.read_text().splitlines() == ["step,train/loss,val/loss", "1,1.0,2.0"]
    metrics = MetricsCsv(path, 1)
    metrics.forget("val/", 1)
    assert path.read_text().splitlines() == ["step,train/loss,val/loss", "1,1.0,"]


def test_what_is_taken_back_of_a_step_without_a_row_leaves_the_row_before_it(path):
    metrics = MetricsCsv(path, None)
    metrics.log_metrics({"train/loss": 1.0, "val/loss": 2.0}, 10)
    before = path.read_bytes()
    MetricsCsv(path, 13).forget("val/", 13)
    assert path.read_bytes() == before


def test_rows_that_are_no_text_are_named_and_stay(path):
    path.write_bytes(b"step,train/loss\r\n1,\xff\r\n")
    with pytest.raises(CheckpointError, match=r"metrics.csv: cannot be read.*move it away"):
        MetricsCsv(path, 1)
    assert path.exists()
