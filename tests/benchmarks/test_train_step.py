"""The speed benchmarks run, leave what they promise, and compute ratios and verdicts as stated."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import layer, train_step
from benchmarks.contestants import PRIMARY, Contestant, find, layer_contestants, step_groups
from benchmarks.entrants import chosen, ready
from benchmarks.experts import Experts
from benchmarks.flags import batch_shape
from benchmarks.memory import Peak
from benchmarks.models import SIZES, random_batch, random_model, sharing_copy
from benchmarks.step import TrainStep
from benchmarks.targets import LAYER_TARGETS, STEP_TARGETS, judge
from benchmarks.timing import Timed, interleave, ratio

MICRO = ["--size", "micro", "--tokens", "2x8", "--repeats", "1", "--warmup", "1", "--threads", "1", "--device", "cpu"]
LMOE, LMOE_64 = "lmoe E=8 k=2 r=16", "lmoe E=64 k=2 r=16"
ACTIVE, FULL, EULERFORGE = "peft lora r=32 (k*r)", "peft lora r=128 (E*r)", "eulerforge E=8 k=2 r=16"
CPU = torch.device("cpu")


def timed(*whole: float) -> Timed:
    """Samples of which a tenth is the optimizer's."""
    return Timed({"forward+backward": [0.9 * ms for ms in whole], "optimizer": [0.1 * ms for ms in whole]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run at size micro leaves."""
    folder = tmp_path_factory.mktemp("results")
    train_step.main([*MICRO, "--dtype", "fp32", "--no-memory", "--output-dir", str(folder)])
    return folder


@pytest.fixture
def no_eulerforge(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it was never installed."""
    for name in [name for name in sys.modules if name.startswith("eulerforge")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.eulerforge_mixture", raising=False)
    monkeypatch.setitem(sys.modules, "eulerforge", None)


def test_a_run_leaves_every_contestant_with_times_or_a_note(folder):
    found = json.loads((folder / "train_step_cpu_micro_fp32.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in found["contestants"]}
    notes = {skip["name"]: skip["why"] for skip in found["skipped"]}
    expected = {contestant.name for contestant in step_groups()["grid"]}
    assert len(expected) == 15
    assert rows.keys() | notes.keys() == expected
    assert all(why.startswith("not installed: ") for why in notes.values()), notes
    assert notes.keys() <= {EULERFORGE}
    for name, row in rows.items():
        medians = row["median_ms"]
        assert medians["sum"] == pytest.approx(medians["forward+backward"] + medians["optimizer"]), name
        assert row["ratio"]["sum"] > 0 and len(row["samples_ms"]["optimizer"]) == 1, name
    assert rows["frozen base"]["trained_parameters"] == 0
    assert rows[ACTIVE]["ratio"]["sum"] == 1.0


def test_a_run_leaves_targets_a_table_and_a_picture(folder):
    found = json.loads((folder / "train_step_cpu_micro_fp32.json").read_text(encoding="utf-8"))
    verdicts = [target["verdict"] for target in found["targets"]]
    assert len(verdicts) == len(STEP_TARGETS) and verdicts[-1] == "not measured"
    assert set(verdicts[:-1]) <= {"met", "missed"}
    table = (folder / "train_step_cpu_micro_fp32.md").read_text(encoding="utf-8")
    assert all(row["name"] in table for row in found["contestants"])
    assert (folder / "train_step_cpu_micro_fp32.png").read_bytes().startswith(b"\x89PNG")


def test_results_name_no_folder(folder):
    for file in (folder / "train_step_cpu_micro_fp32.json", folder / "train_step_cpu_micro_fp32.md"):
        text = file.read_text(encoding="utf-8")
        assert not [place for place in (Path.home(), folder, Path(train_step.__file__).parent) if str(place) in text]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_layer_benchmark_runs(dtype, tmp_path):
    shapes = ["--features", "16", "24", "--tokens", "2x8", "--repeats", "1", "--warmup", "1", "--times", "1"]
    layer.main([*shapes, "--dtype", dtype, "--threads", "1", "--device", "cpu", "--output-dir", str(tmp_path)])
    found = json.loads((tmp_path / f"layer_cpu_{dtype}.json").read_text(encoding="utf-8"))
    names = {row["name"] for row in found["contestants"]} | {skip["name"] for skip in found["skipped"]}
    assert names == {contestant.name for contestant in layer_contestants()}
    assert [target["what"] for target in found["targets"]] == [target.what for target in LAYER_TARGETS]


def test_a_missing_peer_is_left_out_with_a_note(no_eulerforge):
    base, batch = random_model(SIZES["micro"], torch.float32, CPU), random_batch(SIZES["micro"], (2, 8), CPU)
    entrants = [find(EULERFORGE), find(LMOE)]

    def build(contestant: Contestant) -> TrainStep:
        return TrainStep(contestant.load().attach(sharing_copy(base), contestant.experts), batch, torch.float32)

    runs, skipped = ready(entrants, build)
    assert [contestant.name for contestant in runs] == [LMOE]
    assert [skip.name for skip in skipped] == [EULERFORGE]
    assert skipped[0].why.startswith("not installed: ")


@pytest.mark.parametrize("error", [ImportError("gone"), ValueError("broken\nat length")])
def test_only_the_failure_of_a_peer_is_forgiven(error):
    def build(contestant: Contestant) -> TrainStep:
        raise error

    runs, skipped = ready([find(EULERFORGE)], build)
    assert not runs and skipped[0].why in ("not installed: gone", "failed: ValueError: broken")
    with pytest.raises(type(error)):
        ready([find(LMOE)], build)


def test_targets_of_a_step_from_made_up_numbers():
    times = {LMOE: timed(105, 210, 315), ACTIVE: timed(100, 200, 300), FULL: timed(100, 210, 320)}
    times[LMOE_64] = timed(150, 290, 460)
    peaks = {LMOE: Peak(base=500, peak=605), FULL: Peak(base=400, peak=500)}
    active, full, many, memory = judge(STEP_TARGETS, times, peaks)
    assert active.measured == pytest.approx(1.05) and active.verdict == "met"  # at most 1.08
    assert full.measured == pytest.approx(1.0) and full.verdict == "met"  # the middle of 1.05, 1 and 0.984
    assert many.measured == pytest.approx(150 / 105) and many.verdict == "missed"  # at most 1.35
    assert memory.measured == pytest.approx(1.05) and memory.verdict == "met"  # 105 MB to 100 MB


def test_targets_of_a_layer_from_made_up_numbers():
    times = {LMOE: timed(10), EULERFORGE: timed(59), "frozen base": timed(6.25)}
    faster, frozen = judge(LAYER_TARGETS, times, {})
    assert faster.measured == pytest.approx(5.9) and faster.verdict == "missed"  # at least 6
    assert frozen.measured == pytest.approx(1.6) and frozen.verdict == "aim reached"
    faster, frozen = judge(LAYER_TARGETS, times | {EULERFORGE: timed(61), "frozen base": timed(6)}, {})
    assert faster.verdict == "met" and frozen.verdict == "aim not reached"


def test_what_was_not_measured_is_neither_met_nor_missed():
    judged = judge(STEP_TARGETS + LAYER_TARGETS, {LMOE: timed(1)}, {LMOE: Peak(base=1, peak=2)})
    assert {target.verdict for target in judged} == {"not measured"}


def test_the_grid_has_what_the_targets_need():
    grid = {contestant.name for contestant in step_groups()["grid"]}
    assert {name for target in STEP_TARGETS for name in (target.mine, target.theirs)} <= grid
    alone = {contestant.name for contestant in layer_contestants()}
    assert {name for target in LAYER_TARGETS for name in (target.mine, target.theirs)} <= alone


def test_each_group_has_its_references_and_no_name_twice():
    groups = step_groups()
    assert len(groups) == 8
    for group in groups.values():
        names = [contestant.name for contestant in group]
        assert len(set(names)) == len(names)
        assert {contestant.reference for contestant in group} <= set(names)


def test_one_name_means_one_thing():
    meanings: dict[str, set[tuple[str, Experts]]] = {}
    for group in step_groups().values():
        for contestant in group:
            meanings.setdefault(contestant.name, set()).add((contestant.peer, contestant.experts))
    assert all(len(meaning) == 1 for meaning in meanings.values())


def test_only_keeps_the_references():
    kept = [contestant.name for contestant in chosen(step_groups()["grid"], ["lmoe E=8 k=2 r=48"])]
    assert kept == ["peft lora r=96 (k*r)", "lmoe E=8 k=2 r=48"]
    assert not chosen(step_groups()["grid"], ["nobody"])


def test_a_ratio_pairs_the_samples_of_a_round():
    assert ratio(timed(1, 20, 3), timed(2, 10, 6)) == pytest.approx(0.5)
    assert timed(1, 2, 3, 4, 5).spread() == pytest.approx(2 / 3)
    assert timed(7).spread() == 0.0


def test_each_round_starts_one_contestant_further_on():
    order: list[str] = []

    def run(name: str):
        return lambda: (order.append(name), (1.0, 2.0))[1]

    found = interleave({n: run(n) for n in "abc"}, ("x", "y"), warmup=1, repeats=2, progress=lambda text: None)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert found["a"].parts == {"x": [1.0, 1.0], "y": [2.0, 2.0]}


def test_copies_share_the_frozen_weights():
    base = random_model(SIZES["micro"], torch.bfloat16, CPU)
    copied = sharing_copy(base)
    assert copied.get_submodule("model.layers.0") is not base.get_submodule("model.layers.0")
    assert [id(p) for p in copied.parameters()] == [id(p) for p in base.parameters()]


@pytest.mark.parametrize("name", [LMOE, ACTIVE, "peft xlora E=8 r=16"])
def test_every_adapter_of_a_contestant_is_trained_in_float32(name):
    contestant = find(name)
    base = random_model(SIZES["micro"], torch.bfloat16, CPU)
    trainee = contestant.load().attach(sharing_copy(base), contestant.experts)
    step = TrainStep(trainee, random_batch(SIZES["micro"], (2, 8), CPU), torch.bfloat16)
    before = [parameter.detach().clone() for parameter in trainee.trained()]
    for _ in range(2):
        step()
    assert len(before) > 10 and {parameter.dtype for parameter in before} == {torch.float32}
    still = [old.shape for old, new in zip(before, trainee.trained(), strict=True) if torch.equal(old, new)]
    assert not still


def test_the_plain_lora_of_rank_E_r_has_as_many_adapter_parameters():
    base = random_model(SIZES["micro"], torch.float32, CPU)
    sizes = {}
    for name in (LMOE, FULL):
        trainee = find(name).load().attach(sharing_copy(base), find(name).experts)
        named = [(n, p) for n, p in trainee.model.named_parameters() if p.requires_grad and "router" not in n]
        sizes[name] = sum(parameter.numel() for _, parameter in named)
    assert sizes[LMOE] == sizes[FULL]
    assert (PRIMARY.active_rank, PRIMARY.full_rank) == (32, 128)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    only = ["--only", "lmoe E=8 k=2 r=16", "--only", FULL, "--dtype", "fp32"]
    train_step.main([*MICRO, *only, "--output-dir", str(tmp_path)])
    found = json.loads((tmp_path / "train_step_cpu_micro_fp32.json").read_text(encoding="utf-8"))
    assert not found["skipped"]
    assert len(found["contestants"]) == 3
    assert all(row["memory_mb"]["peak"] >= row["memory_mb"]["base"] > 0 for row in found["contestants"])


@pytest.mark.parametrize("text", ["4", "4x", "x256", "0x256", "4x1", "4x256x2", "-4x256"])
def test_a_wrong_batch_shape_is_refused(text, capsys):
    assert batch_shape("4x256") == (4, 256)
    with pytest.raises(SystemExit):
        train_step.arguments([f"--tokens={text}"])
    assert "is not sequences x length" in capsys.readouterr().err


def test_a_large_model_is_refused_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        train_step.arguments(["--size", "4b", "--device", "cpu"])
    assert "--size 4b needs a GPU" in capsys.readouterr().err
