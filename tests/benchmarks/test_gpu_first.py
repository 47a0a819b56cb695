"""What a GPU must show first runs on a CPU, part by part, and leaves its verdicts whatever a part does."""

import json
import subprocess

import pytest
import torch

from benchmarks import gpu_first
from benchmarks.gpu_first import PARTS, main, run_apart, run_here, write_card_rule
from benchmarks.gpu_parts.kernels import break_even
from lmoe.ops.card_rules import read_rules
from tests.conftest import process_state

pytestmark = pytest.mark.filterwarnings("default")
CPU = torch.device("cpu")
LONGER = (5, 6, 9, 10)
"""Whole runs and compilers."""


def test_every_short_part_passes_on_the_cpu_and_leaves_json_and_a_table(tmp_path, capsys):
    words = [word for part in PARTS if part not in LONGER for word in ("--part", str(part))]
    assert main([*words, "--here", "--device", "cpu", "--output-dir", str(tmp_path)]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_first_cpu.json").read_text())
    assert [part["verdict"] for part in report["parts"]] == ["PASS"] * 6
    assert report["versions"]["torch"] and report["versions"]["transformers"]
    table = (tmp_path / "gpu_first_cpu.md").read_text()
    assert table.count("| PASS |") == 6 and "| stacked torch.bfloat16 E=64 N=33 |" in table
    assert capsys.readouterr().out.startswith("date ")


def test_what_a_card_measures_is_written_as_its_rule_and_the_others_stay(tmp_path, capsys):
    file = tmp_path / "rules.json"
    words = ["--part", "7", "--here", "--device", "cpu", "--output-dir", str(tmp_path), "--write-rules", str(file)]
    assert main(words) == 0
    rules, before = read_rules(file), read_rules()
    (new,) = set(map(str, rules)) - set(map(str, before))
    written = next(rule for rule in rules if str(rule) == new)
    assert (written.card, written.device, written.dtype, written.measured) == ("CPU", "cpu", "bfloat16", True)
    assert written.break_even is not None and set(written.break_even) == {1, 2, 4}
    assert written.how.startswith("make gpu, part 7, 20") and "torch" in written.how
    assert len(rules) == len(before) and str(file) in capsys.readouterr().out


def test_a_part_that_failed_or_did_not_run_writes_no_rule(tmp_path, capsys):
    file = tmp_path / "rules.json"
    for parts in ([], [{"part": 7, "verdict": "FAIL", "figures": {}}]):
        write_card_rule({"parts": parts}, CPU, file)
        assert capsys.readouterr().out == "no rule written: part 7 has not passed\n"
    assert not file.exists()


@pytest.mark.parametrize(
    ("ratios", "start"),
    [
        ({128: 1.2, 256: 1.1, 512: 0.9, 1024: 0.5}, 362),
        ({128: 0.9, 256: 1.1, 512: 0.9, 1024: 0.5}, 362),
        ({128: 0.9, 256: 0.8}, 128),
        ({128: 0.9, 256: 1.0}, None),
    ],
)
def test_the_break_even_lies_where_grouped_begins_to_stay_faster(ratios, start):
    assert break_even(ratios) == start


@pytest.mark.slow
@pytest.mark.parametrize("part", LONGER)
def test_every_longer_part_passes_on_the_cpu(part, tmp_path):
    with process_state(tmp_path):
        result = run_here(part, CPU)
    assert result["verdict"] == "PASS", result["problems"]


def test_a_part_that_raises_is_a_failure_that_says_where(monkeypatch):
    def broken(place):
        raise ZeroDivisionError("no kernel\nsecond line")

    monkeypatch.setattr("benchmarks.gpu_parts.kernels.agreement", broken)
    result = run_here(2, CPU)
    assert result["verdict"] == "FAIL"
    assert result["problems"][0].startswith("ZeroDivisionError at test_gpu_first.py:")
    assert result["problems"][0].endswith(": no kernel")


def test_a_part_whose_process_dies_or_takes_too_long_stops_no_other(monkeypatch, tmp_path):
    def process(command, **given):
        if command[command.index("--part") + 1] == "2":
            raise subprocess.TimeoutExpired(command, given["timeout"])
        return subprocess.CompletedProcess(command, -6, "", "terminate called\nCUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_first.subprocess, "run", process)
    assert run_apart(2, CPU)["problems"] == [f"not done after {PARTS[2].seconds} s"]
    assert main(["--part", "1", "--part", "2", "--device", "cpu", "--output-dir", str(tmp_path)]) == 1
    first, second = json.loads((tmp_path / "gpu_first_cpu.json").read_text())["parts"]
    assert first["problems"] == ["the process ended with -6: CUDA error: an illegal memory access"]
    assert second["verdict"] == "FAIL"


def test_all_parts_together_may_take_no_more_than_twenty_minutes():
    """A quarter of an hour is asked for; each part's own limit is above what it should take."""
    assert sorted(PARTS) == list(range(1, 11))
    assert sum(part.seconds for part in PARTS.values()) <= 20 * 60
