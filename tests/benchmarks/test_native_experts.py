"""The benchmark of native experts runs, PEFT and lmoe compute the same in it, and flags reach every process."""

import json

import pytest
import torch

from benchmarks import native_experts
from benchmarks.memory import Peak
from benchmarks.targets import judge, native_targets
from benchmarks.timing import Timed

MICRO = ["--size", "micro", "--rank", "4", "--tokens", "2x8", "--repeats", "1", "--warmup", "1", "--threads", "1"]
MICRO += ["--device", "cpu", "--dtype", "fp32"]
FROZEN, LMOE, PEFT = "frozen model E=4", "lmoe native E=4 k=2 r=4", "peft target_parameters E=4 k=2 r=4"
LMOE_8, PEFT_8 = "lmoe native E=8 k=2 r=2", "peft target_parameters E=8 k=2 r=2"
NAMES = {FROZEN, LMOE, PEFT, "frozen model E=8", LMOE_8, PEFT_8}


def test_a_run_leaves_both_groups_with_equal_adapters(tmp_path):
    native_experts.main([*MICRO, "--dtype", "bf16", "--no-memory", "--output-dir", str(tmp_path)])
    for dtype in ("fp32", "bf16"):
        found = json.loads((tmp_path / f"native_experts_cpu_micro_{dtype}.json").read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in found["contestants"]}
        assert rows.keys() == NAMES and not found["skipped"]
        assert len({rows[name]["trained_parameters"] for name in (LMOE, PEFT, LMOE_8, PEFT_8)}) == 1
        assert rows[FROZEN]["trained_parameters"] == 0
        assert [target["verdict"] for target in found["targets"]][2] == "not measured"


def test_peft_and_lmoe_agree_before_any_step():
    flags = native_experts.arguments(MICRO)
    for group in native_experts.groups(flags):
        found = native_experts.agreement(group, flags)
        assert found.keys() & {LMOE, LMOE_8} and found.keys() & {PEFT, PEFT_8}
        bench = native_experts.Bench(group.size, torch.float32, flags)
        outcome = bench.outcome(next(c for c in group.entrants if c.peer == "lmoe_native"))
        assert len(outcome) == 1 + 2 * 2 * group.size.layers
        assert all(bool(tensor.any()) for tensor in outcome.values())


def test_flags_change_the_size_and_reach_the_process_that_measures_memory():
    flags = native_experts.arguments([*MICRO, "--experts", "6", "--ffn", "32", "--top-k", "3"])
    again = native_experts.arguments(native_experts.words(flags, "fp32"))
    assert again.shape == flags.shape and (again.shape.experts, again.shape.ffn, again.shape.top_k) == (6, 32, 3)
    assert (again.tokens, again.rank, again.device, again.threads) == ((2, 8), 4, "cpu", 1)
    assert [group.experts.num_experts for group in native_experts.groups(again)] == [6, 12]
    assert native_experts.command(flags, "fp32").endswith("--dtype fp32 --tokens 2x8 --repeats 1")


def test_targets_from_made_up_numbers():
    few, many = (group.experts for group in native_experts.groups(native_experts.arguments(MICRO)))
    times = {LMOE: Timed({"f": [10.0]}), PEFT: Timed({"f": [19.0]}), LMOE_8: Timed({"f": [10.0]})}
    peaks = {LMOE: Peak(base=100, peak=200), LMOE_8: Peak(base=150, peak=255)}
    judged = judge(native_targets(few, many), times | {PEFT_8: Timed({"f": [30.0]})}, peaks)
    assert [target.measured for target in judged] == pytest.approx([1.9, 3.0, 1.05])
    assert [target.verdict for target in judged] == ["missed", "met", "met"]


@pytest.mark.parametrize(
    ("given", "said"), [(["--rank", "3"], "is odd"), (["--experts", "2", "--top-k", "3"], "at most all of them")]
)
def test_what_cannot_be_is_refused(given, said, capsys):
    with pytest.raises(SystemExit):
        native_experts.arguments(given)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    native_experts.main([*MICRO, "--only", "lmoe native E=4", "--output-dir", str(tmp_path)])
    found = json.loads((tmp_path / "native_experts_cpu_micro_fp32.json").read_text(encoding="utf-8"))
    assert not found["skipped"] and {row["name"] for row in found["contestants"]} == {FROZEN, LMOE}
    assert all(row["memory_mb"]["peak"] >= row["memory_mb"]["base"] > 0 for row in found["contestants"])
