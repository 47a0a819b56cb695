"""Two processes on one machine: they compute what one would, stay equal, and hand their run over to one and back."""

import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmoe.cli.train import main
from lmoe.report.routing_file import read_routing
from tests.conftest import process_state
from tests.metric_names import rows
from tests.micro import start
from tests.preference_rows import labelled_of, pairs_of
from tests.run.as_rank import cut_back

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("two processes")]

STRATEGIES, STEPS = ("ddp", "fsdp2"), (1, 2, 3)
COMMON = (
    "data.batch_size=2",
    "phase.phases.experts.start=2",
    "trainer.max_steps=4",
    "trainer.val_every_n_steps=2",
    "checkpoint.every_n_steps=1",
    "checkpoint.keep_last=10",
    "injection.lora_dropout=0",
)
ONE = ("trainer.strategy=auto", "trainer.devices=1", "trainer.accumulate_grad_batches=2")
SAME = {"rtol": 1e-4, "atol": 1e-6}
"""Sums in another order: float32 rounds differently, and AdamW divides small by small."""
ROUTED = (
    "moe=sequence",
    "moe.router_scope=model",
    "moe.router_layer=1",  # a reading that ends before the last layer
    "moe.router_target=domain",
    "moe.router_fit_prompts=100",
    "phase=supervised_routing",
    "phase.phases.routed.start=2",
)
"""One router for the whole model, which reads the prompts in a forward of its own; experts train by target first."""
KINDS = ("", "_routed", "_lessons", "_answers")
ROUTING = Path("report") / "routing.npz"
SPEED = "throughput/tokens_per_second"


def lessons(micro) -> tuple[str, ...]:
    """SFT, and then DPO on rows of its own beside what it starts from."""
    train, val = (override.partition("=")[2] for override in pairs_of(micro))
    own = f"task: {{name: dpo, reference: start}}, data: {{path: {train}, val_path: {val}}}"
    return "phase=joint", f"+phase.phases.later={{start: 2, trainable: [lora, router], {own}}}"


def answers(micro) -> tuple[str, ...]:
    """KTO beside a reference that was computed before, of which every process knows all rows."""
    known = ("task.reference=start", "task.precompute_reference=true", "data.cache_dir=cache")
    return "phase=joint", "task=kto", *labelled_of(micro), *known


def two(strategy: str) -> tuple[str, ...]:
    return f"trainer.strategy={strategy}", "trainer.devices=2", "trainer.accumulate_grad_batches=1"


@pytest.fixture(scope="module")
def runs(micro, tmp_path_factory) -> Path:
    """A folder with a run of one process, and with what two processes did, for each strategy."""
    folder = tmp_path_factory.mktemp("runs")
    common, tasks = micro.changed(*COMMON), []
    unphased = [setting for setting in COMMON if not setting.startswith("phase.")]
    routed = micro.changed(*unphased, *ROUTED)
    taught = micro.changed(*unphased, *lessons(micro))
    apart = micro.changed(*unphased, *answers(micro))
    with process_state(folder) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        assert main([*common, *ONE, f"hydra.run.dir={folder / 'one'}"]) == 0
        assert main([*routed, *ONE, f"hydra.run.dir={folder / 'one_routed'}"]) == 0
        assert main([*taught, *ONE, f"hydra.run.dir={folder / 'one_lessons'}"]) == 0
        assert main([*apart, *ONE, f"hydra.run.dir={folder / 'one_answers'}"]) == 0
    for strategy in STRATEGIES:
        whole = folder / strategy
        tasks.append([*common, *two(strategy), f"hydra.run.dir={whole}"])
        for step in STEPS:
            tasks.append([str(whole), f"{whole}_killed_{step}", step])
            tasks.append([f"resume={whole}_killed_{step}"])
        stopped = f"{whole}_stopped"
        tasks.append(["signal", *common, *two(strategy), f"hydra.run.dir={stopped}", "checkpoint.every_n_steps=0"])
        tasks.append([f"resume={stopped}"])
        tasks.append([str(folder / "one"), f"{whole}_from_one", 3])
        tasks.append([f"resume={whole}_from_one", *two(strategy)])
        tasks.append([*routed, *two(strategy), f"hydra.run.dir={whole}_routed"])
        tasks.append([*taught, *two(strategy), f"hydra.run.dir={whole}_lessons"])
        tasks.append([*apart, *two(strategy), f"data.cache_dir=cache_{strategy}", f"hydra.run.dir={whole}_answers"])
        tasks.append([f"{whole}_lessons", f"{whole}_lessons_killed", 3])
        tasks.append([f"resume={whole}_lessons_killed"])
    (folder / "tasks.json").write_text(json.dumps(tasks))
    as_two_processes(folder)
    return folder


def as_two_processes(folder: Path) -> None:
    """What `torchrun --nproc-per-node 2` sets up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, processes = Path(__file__).with_name("as_rank.py"), []
    for rank in ("0", "1"):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
        env = {**names, **address, "OMP_NUM_THREADS": "1"}
        processes.append(start(sys.executable, script, folder / "tasks.json", rank, cwd=folder, env=env))
    try:
        said = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], "\n".join(text[-3000:] for pair in said for text in pair)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_learn_what_one_learns_from_the_same_samples(runs, strategy, kind):
    """Task and auxiliary losses, gradients after clipping, loads: all of them sums over both."""
    assert_same(adapter(runs / f"{strategy}{kind}"), adapter(runs / f"one{kind}"), **SAME)
    for one, both in zip(rows(runs / f"one{kind}"), rows(runs / f"{strategy}{kind}"), strict=True):
        assert one.keys() == both.keys()
        for name in sorted(one.keys() - {SPEED}):
            chosen = "routing" in name  # one token that chooses another expert moves these
            assert both[name] == pytest.approx(one[name], rel=1e-3, abs=0.02 if chosen else 1e-5), name
    kept, of_one = (read_routing(runs / f"{name}{kind}" / ROUTING) for name in (strategy, "one"))
    assert kept.rows == of_one.rows and len(kept.rows) > 0
    assert kept.steps.tolist() == of_one.steps.tolist()
    assert np.abs(kept.load.astype(int) - of_one.load).max() <= 6  # in 1/255: 0.02, as above


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_processes_hold_the_same_bits_at_the_end_of_the_last_phase(runs, strategy, kind):
    first, second = (load_file(runs / f"{strategy}{kind}" / f"{rank}.safetensors") for rank in (0, 1))
    assert_same(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_of_two_processes_resumes_exactly_in_every_phase(runs, strategy, step):
    """The boundary is at step 2: the checkpoint before, at and after it."""
    resumed = runs / f"{strategy}_killed_{step}"
    assert_same(adapter(resumed), adapter(runs / strategy), rtol=0, atol=0)
    assert (resumed / ROUTING).read_bytes() == (runs / strategy / ROUTING).read_bytes()
    for a, b in zip(rows(resumed), rows(runs / strategy), strict=True):
        assert {k: v for k, v in a.items() if k != SPEED} == {k: v for k, v in b.items() if k != SPEED}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_of_two_processes_goes_on_beside_the_reference_that_its_checkpoint_keeps(runs, strategy):
    resumed, whole = runs / f"{strategy}_lessons_killed", runs / f"{strategy}_lessons"
    assert_same(adapter(resumed), adapter(whole), rtol=0, atol=0)
    for a, b in zip(rows(resumed), rows(whole), strict=True):
        assert {k: v for k, v in a.items() if k != SPEED} == {k: v for k, v in b.items() if k != SPEED}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_process_saves_and_stops_both(runs, strategy):
    """With exit code 143, which the runner of the processes has looked at; nothing is lost."""
    assert_same(adapter(runs / f"{strategy}_stopped"), adapter(runs / strategy), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_from_one_process_to_two(runs, strategy):
    assert_same(adapter(runs / f"{strategy}_from_one"), adapter(runs / "one"), **SAME)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_from_two_processes_to_one(runs, strategy, train, tmp_path):
    cut_back(runs / strategy, tmp_path / "killed", 1)
    done = train(f"resume={tmp_path / 'killed'}", *ONE, settings=False)
    assert done.code == 0, done.text
    assert_same(adapter(tmp_path / "killed"), adapter(runs / "one"), **SAME)
