"""The benchmark of losses at the labels runs in small, both ways agree in it, and its figures are what it measured."""

import json

import pytest

from benchmarks import logits
from benchmarks.memory import Peak
from benchmarks.timing import Timed

MICRO = ["--vocab", "64", "--hidden", "32", "--layers", "1", "--tokens", "2x8", "--repeats", "1", "--threads", "1"]
MICRO += ["--device", "cpu"]


def test_a_run_leaves_every_case_with_gradients_that_agree(tmp_path, monkeypatch):
    peaks = []

    def own_process(module, *words):
        peaks.append((module, logits.arguments(words)))
        return Peak(base=100, peak=500 if words[1] == logits.ALL else 200)

    monkeypatch.setattr(logits, "in_own_process", own_process)
    code = logits.main([*MICRO, "--output-dir", str(tmp_path)])
    found = json.loads((tmp_path / "logits.json").read_text(encoding="utf-8"))
    assert len(found["cases"]) == 8 and len(found["claims"]) == 16
    assert code == (0 if all(claim["met"] for claim in found["claims"].values()) else 1)
    for case in found["cases"]:
        assert case["memory_ratio"] == 4 and case["gradients_differ_by"] <= logits.AGREE[case["dtype"]]
    page = (tmp_path / "logits.md").read_text(encoding="utf-8")
    assert page.count("| 400 | 100 | 4.0 x |") == 8
    assert len(peaks) == 16 and all(module == "benchmarks.logits" for module, _ in peaks)
    assert {(flags.vocab, flags.hidden, flags.layers, flags.tokens) for _, flags in peaks} == {(64, 32, 1, (2, 8))}
    assert {flags.memory_of for _, flags in peaks} == {logits.ALL, logits.OURS}


@pytest.mark.parametrize("way", [logits.ALL, logits.OURS])
def test_memory_is_measured_in_steps_of_the_case(way, monkeypatch):
    shares = []
    monkeypatch.setattr(logits, "settle", lambda device: 1.0)
    monkeypatch.setattr(logits, "peak", lambda device: 2.0)
    monkeypatch.setattr(logits.Step, "__call__", lambda step: shares.append((step.labels != -100).float().mean()))
    case = logits.Case(share=50, head="frozen", dtype="fp32")
    flags = logits.arguments(["--tokens", "2x9", *MICRO[:6]])
    assert logits.peak_here(flags, way, case) == Peak(base=1.0, peak=2.0)
    assert [float(share) for share in shares[1:]] == [0.5, 0.5]


def test_claims_are_judged_from_ratios_within_a_round():
    case = logits.Case(share=50, head="frozen", dtype="fp32")
    found = logits.Found(
        case=case,
        timed={logits.ALL: Timed({"f": [10.0, 20.0, 30.0]}), logits.OURS: Timed({"f": [9.0, 22.0, 33.0]})},
        peaks={logits.ALL: Peak(base=100, peak=400), logits.OURS: Peak(base=150, peak=250)},
        disagreement=0.0,
    )
    assert list(found.claims().values()) == [(pytest.approx(3.0), True), (1.1, False)]
