"""The benchmark of FFN experts runs, compares what computes the same, and says who is missing."""

import json
import sys

import pytest
import torch

from benchmarks import expert_ffn
from benchmarks.agreement import TOLERANCE, differences, fill, gradient, in_words, values
from benchmarks.contestants import PRIMARY, expert_ffn_contestants, mixture
from benchmarks.entrants import ready
from benchmarks.peers import lmoe_expert_ffn
from benchmarks.targets import expert_ffn_targets, judge
from benchmarks.timing import Timed
from lmoe.layers import compiled_forward

MICRO = ["--features", "16", "32", "--features", "32", "16", "--tokens", "2x8", "--repeats", "1", "--warmup", "1"]
MICRO += ["--times", "1", "--threads", "1", "--device", "cpu"]
FROZEN, LMOE, MIXLORA, EULERFORGE = (contestant.name for contestant in expert_ffn_contestants(PRIMARY))


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither was ever installed."""
    for package in ("mixlora", "eulerforge"):
        for name in [name for name in sys.modules if name.startswith((package, f"benchmarks.peers.{package}"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_leaves_every_contestant_with_times_or_a_note(dtype, tmp_path):
    expert_ffn.main([*MICRO, "--dtype", dtype, "--output-dir", str(tmp_path)])
    found = json.loads((tmp_path / f"expert_ffn_cpu_{dtype}.json").read_text(encoding="utf-8"))
    rows = {(row["group"], row["name"]) for row in found["contestants"]}
    notes = {skip["name"]: skip["why"] for skip in found["skipped"]}
    assert rows >= {(shape, name) for shape in ("16 -> 32", "32 -> 16") for name in (FROZEN, LMOE)}
    assert {name for _, name in rows} | notes.keys() == {FROZEN, LMOE, MIXLORA, EULERFORGE}
    assert all(why.startswith("not installed: ") for why in notes.values()), notes
    assert len(found["targets"]) == 4 and found["targets"][0]["what"].startswith("16 -> 32: ")
    assert (tmp_path / f"expert_ffn_cpu_{dtype}.png").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_compiled_experts_take_part_where_they_are_asked_for(no_peers, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled_forward, "BACKEND", "aot_eager")  # inductor needs a C++ compiler
    expert_ffn.main([*MICRO, "--dtype", "fp32", "--compiled", "--output-dir", str(tmp_path)])
    found = json.loads((tmp_path / "expert_ffn_cpu_fp32.json").read_text(encoding="utf-8"))
    compiled = mixture("lmoe compiled FFN", PRIMARY)
    assert {row["name"] for row in found["contestants"]} == {FROZEN, LMOE, compiled}
    assert compiled in found["work"]["agreement 16 -> 32"] and "--compiled" in found["command"]
    assert len(found["targets"]) == 8


def test_a_missing_peer_is_left_out_with_a_note(no_peers):
    bench = expert_ffn.Bench([16, 32], torch.float32, expert_ffn.arguments(MICRO))
    runs, skipped = ready(expert_ffn_contestants(PRIMARY), bench.build)
    assert [contestant.name for contestant in runs] == [FROZEN, LMOE]
    assert {skip.name for skip in skipped} == {MIXLORA, EULERFORGE}
    assert all(skip.why.startswith("not installed: ") for skip in skipped)


def test_every_trained_tensor_is_compared_and_has_a_gradient():
    bench = expert_ffn.Bench([16, 32], torch.float32, expert_ffn.arguments(MICRO))
    contestant = next(c for c in expert_ffn_contestants(PRIMARY) if c.name == LMOE)
    run = bench.build(contestant)
    run()
    compared = lmoe_expert_ffn.factors(run.layer, gradient)
    trained = sum(parameter.numel() for parameter in run.layer.parameters() if parameter.requires_grad)
    assert sum(view.numel() for views in compared.values() for view in views) == trained
    assert all(any(bool(view.any()) for view in views) for views in compared.values())
    assert bench.outcome(contestant, run).keys() == {"y", "x", *compared}


def test_equal_names_and_shapes_get_equal_numbers_in_any_layout():
    mine, theirs = torch.zeros(2, 3, 4), torch.zeros(4, 3, 2).permute(2, 1, 0)
    fill({"A": list(mine)})
    fill({"A": list(theirs)})
    assert torch.equal(mine, theirs) and not torch.equal(mine[0], mine[1])
    assert torch.equal(values(torch.nn.Parameter(mine)), mine)


def test_what_differs_or_is_missing_stops_the_benchmark():
    one = {"y": torch.tensor([2.0, 4.0]), "x": torch.tensor([1.0])}
    near, far = one | {"y": one["y"] + 2 * TOLERANCE}, one | {"y": one["y"] + 5 * TOLERANCE}
    found = differences({"a": one, "b": near})
    assert found == {"a": 0.0, "b": pytest.approx(0.5 * TOLERANCE, rel=0.01)}
    assert in_words(found) == "to a: b within 5e-05" and in_words({"a": 0.0}) == "nobody to compare with"
    with pytest.raises(AssertionError, match="b differs in y by 1"):
        differences({"a": one, "b": far})
    with pytest.raises(AssertionError, match="b differs in y by nan"):
        differences({"a": one, "b": one | {"y": torch.tensor([2.0, torch.nan])}})
    with pytest.raises(AssertionError, match="expected"):
        differences({"a": one, "b": {"y": one["y"]}})


def test_targets_from_made_up_numbers():
    times = {LMOE: Timed({"f": [10.0]}), MIXLORA: Timed({"f": [21.0]}), EULERFORGE: Timed({"f": [29.0]})}
    mixlora, eulerforge = judge(expert_ffn_targets(PRIMARY), times, {})
    assert (mixlora.measured, mixlora.verdict) == (pytest.approx(2.1), "met")
    assert (eulerforge.measured, eulerforge.verdict) == (pytest.approx(2.9), "missed")


def test_more_chosen_than_there_are_is_refused(capsys):
    with pytest.raises(SystemExit):
        expert_ffn.arguments(["--experts", "2", "--top-k", "3"])
    assert "at most all of them" in capsys.readouterr().err
