import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe.errors import CheckpointError, TrainingError
from lmoe.report.summary import RunSummary


def test_json_round_trip_is_the_identity(summary: RunSummary, tmp_path: Path) -> None:
    summary.name = "naïve <run> 日本"
    summary.peak_memory_mb = None
    summary.after["code"] = 0.1 + 0.2
    read = RunSummary.from_json(summary.to_json(tmp_path / "deep" / "summary.json"))
    assert read == summary
    assert list(read.phases) == ["router_warmup", "experts"]


def test_means_are_over_the_measured_domains(summary: RunSummary) -> None:
    assert (summary.before_mean, summary.after_mean) == (5.0, pytest.approx((3.0 + 4.5 + 6.25) / 3))
    del summary.before["sql"]
    assert summary.before_mean == 4.5
    summary.before = {}
    assert summary.before_mean is None


def test_a_key_that_is_missing_or_unknown_is_named(summary: RunSummary, tmp_path: Path) -> None:
    path = summary.to_json(tmp_path / "summary.json")
    content = json.loads(path.read_text())
    content["colour"] = content.pop("seconds")
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"summary\.json .*colour \(unknown\), seconds \(missing\)"):
        RunSummary.from_json(path)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_what_is_no_summary_is_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"summary\.json"):
        RunSummary.from_json(path)
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        RunSummary.from_json(tmp_path / "absent.json")


def test_a_place_that_cannot_be_written_is_named(summary: RunSummary, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        summary.to_json(tmp_path / "file" / "summary.json")


def test_the_summary_and_the_tables_need_neither_matplotlib_nor_torch() -> None:
    code = (
        "import sys, lmoe.report.summary, lmoe.report.curves, lmoe.report.table, lmoe.report.page;"
        "print([name for name in ('matplotlib', 'torch') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert done.stdout.strip() == "[]"
