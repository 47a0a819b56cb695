"""The benchmark of compiled layers tells the ratio within a round, and what compiling took."""

import pytest
import torch

from benchmarks import compiled
from benchmarks.compiled import COMPILED, EAGER, PART, Steps, check_same, main, report
from benchmarks.timing import Timed


def steps(factor: float) -> Steps:
    weight = torch.ones(1, requires_grad=True)
    return Steps(lambda batch: factor * (weight * batch["input_ids"]).sum(), [{"input_ids": torch.tensor([4.0])}])


def test_the_table_has_the_ratio_and_the_micro_batches_that_pay_for_compiling():
    timed = {EAGER: Timed({PART: [10.0, 20.0, 30.0]}), COMPILED: Timed({PART: [8.0, 16.0, 24.0]})}
    lines = report(timed, first=8000.0, found=2)
    assert lines[2:4] == [f"| {EAGER} | 1.000 | 20 |", f"| {COMPILED} | 0.800 | 16 |"]
    assert lines[-1] == "2 graphs; the first forward and backward took 8.0 s, which 2,000 micro-batches pay back"
    slower = report({EAGER: timed[COMPILED], COMPILED: timed[EAGER]}, first=8000.0, found=2)
    assert slower[-1].endswith("which nothing pays back here")


def test_another_loss_ends_the_measurement():
    check_same({EAGER: steps(1.0), COMPILED: steps(1.0)})
    with pytest.raises(SystemExit, match=r"the loss is 8\.000000 compiled, 4\.000000 without"):
        check_same({EAGER: steps(1.0), COMPILED: steps(2.0)})


def test_code_that_is_made_anew_for_a_length_ends_the_measurement(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "check_devices", lambda loop: None)
    small = ["--repeats", "1", "--batches", "1"]
    assert main(small, lambda overrides, count: steps(1.0)) == 0
    assert "0 graphs" in capsys.readouterr().out
    numbers = iter(range(10))
    monkeypatch.setattr(compiled, "graphs", lambda: next(numbers))
    with pytest.raises(SystemExit, match="graphs more were compiled for other lengths"):
        main(small, lambda overrides, count: steps(1.0))
