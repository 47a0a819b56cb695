"""Runs with trainer.compile=true: every objective, phases, checkpoints that go on in either way, and refusals."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from lmoe.errors import ConfigError
from lmoe.layers import compiled_forward
from lmoe.run import compiler, devices
from lmoe.run.compiler import check_compiler
from lmoe.run.parts import Parts
from tests.metric_names import rows
from tests.preference_rows import labelled_of, pairs_of
from tests.resume.test_exactness import keep_as_if_killed
from tests.training.conftest import randomise

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # read by the compiler itself
)
ONE_SITE = ("injection.target_keywords=[down_proj]", "injection.attn_lora.enabled=false")
TASKS = ("sft", "dpo", "orpo", "simpo", "kto", "reward")


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch) -> Iterator[None]:
    """Graphs are run operator by operator, and need no C++ compiler."""
    monkeypatch.setattr(compiled_forward, "BACKEND", "eager")
    monkeypatch.setattr(devices, "check_compiler", lambda *, on_gpu: None)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """Graphs that were compiled so far."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def built(micro, task: str, *overrides: str) -> Parts:
    """Parts of a run in one phase, away from their start."""
    found = () if task == "sft" else labelled_of(micro) if task == "kto" else pairs_of(micro)
    parts = micro.parts(*found, "phase=joint", f"task={task}", *ONE_SITE, *overrides)
    parts.module.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, world_size=1)
    randomise(parts.model)
    parts.module.set_phase(0)
    return parts


def gradients(parts: Parts, batches: int) -> list[dict[str, torch.Tensor]]:
    """Loss and gradients of each of the first batches."""
    found, loader = [], iter(parts.datamodule.train_dataloader())
    for number in range(batches):
        torch.manual_seed(number)
        loss = parts.module.training_step(next(loader), 0)
        loss.backward()
        named = {name: p.grad for name, p in parts.model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **named})
        parts.model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_every_objective_has_the_losses_and_gradients_of_a_run_without_a_compiler(micro, restored, task, checkpointing):
    way = f"trainer.gradient_checkpointing={str(checkpointing).lower()}"
    plain, compiled = built(micro, task, way), built(micro, task, way, "trainer.compile=true")
    for found, expected in zip(gradients(compiled, 3), gradients(plain, 3), strict=True):
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert graphs() == (1 if checkpointing else 2)  # without, the input of the first layer has no gradient


@pytest.mark.parametrize("router", ["sequence", "top_k"])
def test_packed_rows_of_changing_numbers_and_lengths_share_their_graphs(micro, restored, router):
    packed = ("data.packing=true", "data.batch_size=2", "data.max_length=64", f"moe={router}")
    plain, compiled = built(micro, "sft", *packed), built(micro, "sft", *packed, "trainer.compile=true")
    batches = list(compiled.datamodule.train_dataloader())[:4]
    assert min(int(batch["row_ids"].max()) for batch in batches) > 0
    for found, expected in zip(gradients(compiled, 4), gradients(plain, 4), strict=True):
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert graphs() == 2


RUN = (
    *ONE_SITE,
    "moe.temperature_end=2.0",
    "phase.phases.experts.start=3",
    "trainer.val_every_n_steps=3",
    "checkpoint.every_n_steps=1",
)


def close(run: Path, other: Path) -> None:
    """Both have logged the same but for speed and rounding, and have written adapters of the same names."""
    mine, theirs = rows(run), rows(other)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for row, wanted in zip(mine, theirs, strict=True):
        for name, value in wanted.items():
            if not name.startswith("throughput"):
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_run_of_two_phases_logs_the_same_and_goes_on_with_or_without_a_compiler(train, monkeypatch, tmp_path):
    plain = train(*RUN, run="plain")
    assert plain.code == 0, plain.text
    with monkeypatch.context() as patch:
        keep_as_if_killed(patch, tmp_path / "compiled", 2, 5)
        compiled = train(*RUN, "trainer.compile=true", run="compiled")
    assert compiled.code == 0, compiled.text
    assert graphs() == 2 * 2  # in each phase the first layer, and the other
    close(compiled.run, plain.run)
    names, wanted = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].keys()
        for run in (compiled.run, plain.run)
    )
    assert names == wanted
    assert not any("_orig_mod" in name for name in names)
    for step, way in ((2, "false"), (5, "true")):
        run = Path(shutil.copytree(tmp_path / f"killed {step}", tmp_path / f"resumed {step}"))
        done = train(f"resume={run}", f"trainer.compile={way}", settings=False)
        assert done.code == 0, done.text
        close(run, plain.run)


class TestAMachine:
    def test_without_a_compiler_is_refused_with_what_to_install_and_to_set(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(ConfigError, match=r"no-such-compiler is not there: install it.*trainer\.compile=false"):
            check_compiler(on_gpu=False)

    def test_without_headers_of_python_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr(compiler.shutil, "which", lambda name: "/usr/bin/c++")
        monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(ConfigError, match=r"holds no Python\.h.*-dev.*trainer\.compile=false"):
            check_compiler(on_gpu=False)
        (tmp_path / "Python.h").touch()
        check_compiler(on_gpu=False)

    def test_without_triton_is_refused_for_a_gpu_alone(self, monkeypatch, tmp_path):
        (tmp_path / "Python.h").touch()
        monkeypatch.setattr(compiler.shutil, "which", lambda name: "/usr/bin/c++")
        monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path))
        monkeypatch.setattr(compiler, "find_spec", lambda name: None)
        check_compiler(on_gpu=False)
        with pytest.raises(ConfigError, match=r"needs Triton.*trainer\.compile=false"):
            check_compiler(on_gpu=True)

    def test_is_asked_only_where_something_is_compiled(self, monkeypatch, train):
        asked = []
        monkeypatch.setattr(devices, "check_compiler", lambda *, on_gpu: asked.append(on_gpu))
        assert train("dry_run=preflight", *ONE_SITE).code == 0
        assert asked == []
        assert train("dry_run=preflight", "trainer.compile=true", *ONE_SITE, run="other").code == 0
        assert asked == [False]
