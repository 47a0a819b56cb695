"""The arithmetic of whole runs beside TRL, and that lmoe's half of it trains."""

import json

import pytest

from benchmarks.end_to_end.__main__ import CLAIMS, LMOE, TRL, as_markdown, kept, ratio, write_rows
from benchmarks.end_to_end.job import ROOT, Measured, Setting, _measured, run_lmoe


def measured(tokens_per_second: float) -> Measured:
    return Measured(
        tokens_per_second=tokens_per_second,
        step_seconds=1.0,
        first_step_seconds=2.0,
        seconds=3.0,
        peak_mb=4.0,
        loss=5.0,
    )


def test_the_first_step_counts_in_neither_tokens_nor_time():
    one = _measured([10.0, 12.0, 15.0], [999.0, 20.0, 30.0], [3.0, 2.0, 1.0], started=4.0, seconds=20.0, peak=7.0)
    assert one.tokens_per_second == 50.0 / 5.0
    assert one.step_seconds == 2.5
    assert one.first_step_seconds == 6.0
    assert one.loss == 1.0


def test_a_ratio_is_taken_within_each_round():
    """A slow round slows both: 2.0 in each, though the medians alone would say 1.1."""
    mine, theirs = [measured(200.0), measured(20.0)], [measured(100.0), measured(10.0)]
    assert ratio(mine, theirs) == 2.0


@pytest.mark.parametrize(("speed", "met"), [(1.0, False), (2.0, True)])
def test_a_claim_is_met_only_where_the_ratio_is_large_enough(speed, met):
    runs = {name: [measured(100.0 * (speed if name in LMOE else 1.0))] for name in (*TRL, *LMOE)}
    assert kept(runs) is met
    page = as_markdown({"a base": runs}, "command", {"cpu": "some"})
    assert page.count("(met)" if met else "(missed)") == len(CLAIMS) == 2


def test_both_tools_read_all_bundled_training_rows(tmp_path):
    rows = [json.loads(line) for line in write_rows(tmp_path).read_text(encoding="utf-8").splitlines()]
    files = sorted((ROOT / "data" / "sft" / "train").glob("*.jsonl"))
    assert len(files) == 8
    assert len(rows) == sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert all(row["completion"][0]["role"] == "assistant" and row["prompt"] for row in rows)


def test_a_run_of_lmoe_is_measured(tmp_path, micro):
    setting = Setting(
        base=str(micro.model),
        base_folder=micro.model,
        precision="float32",
        rows=micro.train / "words.jsonl",
        steps=4,
        batch_size=2,
        max_length=64,
        packing=False,
    )
    (tmp_path / "run").mkdir()
    one = run_lmoe([*LMOE["lmoe, 8 experts of rank 16"]], setting, tmp_path / "run", threads=1)
    assert 0 < one.first_step_seconds < one.seconds
    assert one.tokens_per_second > 0 and one.peak_mb > 100
