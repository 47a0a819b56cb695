"""The short form of `make torture`: kills inside writes, spoiled checkpoints, losses that are no numbers."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.torture import not_finite
from benchmarks.torture.corruptions import problem
from benchmarks.torture.kills import difference
from benchmarks.torture.process import Ended
from benchmarks.torture.settings import CHECKED, RUNS
from benchmarks.torture.spoil import WAYS, Spoiled, loaded, sealed
from lmoe.errors import CheckpointError, TrainingError
from lmoe.resume.checkpoint_io import DirectCheckpointIO
from lmoe.resume.contents import add_contents
from lmoe.resume.run_files import ORIGIN
from lmoe.run.claim import claimed, store_id, stored_id
from lmoe.training.metrics_csv import MetricsCsv
from lmoe.training.module import AdapterModule
from tests.full_disk import files_of_at_most

BIASES = (*CHECKED, *RUNS["selection biases"])
CASES = 44
"""Each way of spoiling twice: in last.ckpt, and in a file that the user asks for."""


def test_a_run_killed_inside_a_write_goes_on_to_the_same_bytes(train, tmp_path, monkeypatch):
    """The folder is copied in the middle of a write: what a process that is killed at that moment leaves."""
    killed, write, rename = {}, Path.write_bytes, os.replace

    def keep(name: str) -> None:
        if name not in killed:
            killed[name] = Path(shutil.copytree(tmp_path / "whole", tmp_path / name))

    def half_written(path: Path, data) -> int:
        if path.name == "last.partial":
            write(path, data[: len(data) // 2])
            keep("in the first checkpoint")
        return write(path, data)

    def renamed(source, target) -> None:
        rename(source, target)
        if Path(target).name == "step-00000004.ckpt":
            keep("between two renames")
        if Path(target).name == "adapter.safetensors":
            keep("in the adapter")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half_written)
        patch.setattr(os, "replace", renamed)
        whole = train(*BIASES, run="whole")
    assert whole.code == 0, whole.text
    assert len(killed) == 3
    assert not list((killed["in the first checkpoint"] / "checkpoints").glob("*.ckpt"))
    assert not (killed["between two renames"] / "checkpoints" / "last.ckpt").exists()
    assert not (killed["in the adapter"] / "adapter" / "lmoe_config.json").exists()
    for run in killed.values():
        done = train(f"resume='{run}'", settings=False)
        assert done.code == 0, done.text
        assert difference(run, whole.run) is None


@pytest.fixture(scope="module")
def three_kept(micro, tmp_path_factory) -> dict[str, Path]:
    """A run with three checkpoints before its adapter is written, and the same as of other runs and models."""
    from lmoe.cli.train import main
    from tests.conftest import process_state

    base = tmp_path_factory.mktemp("spoiled")
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        given = (*BIASES, "checkpoint.keep_last=3", f"hydra.run.dir={base / 'run'}")
        assert main(micro.changed(*given)) == 0
    shutil.rmtree(base / "run" / "adapter")
    runs = {"run": base / "run"}
    for name in ("another run", "another model", "experts of another model"):
        runs[name] = Path(shutil.copytree(base / "run", base / name))
        for file in (runs[name] / "checkpoints").iterdir():
            content = loaded(file)
            content[ORIGIN]["id"] = "0" * 32
            if name == "another model":
                content["lmoe_base"] = "1" * 32
            elif name == "experts of another model":
                state = content["state_dict"]
                state |= {key: torch.cat([value, value]) for key, value in state.items()}
            add_contents(content)
            sealed(content, file)
    return runs


@pytest.mark.parametrize("number", range(CASES), ids=lambda n: f"{WAYS[n % len(WAYS)].__name__}-{n}")
def test_a_spoiled_checkpoint_is_refused_by_name_with_the_reason_and_nothing_is_touched(
    train, three_kept, tmp_path, number
):
    rng = random.Random(number)
    run = Path(shutil.copytree(three_kept["run"], tmp_path / "run"))
    name = "last.ckpt" if number < len(WAYS) else rng.choice(["best.ckpt", "step-00000005.ckpt", "step-00000004.ckpt"])
    at = Spoiled(
        file=run / "checkpoints" / name,
        others={key: other for key, other in three_kept.items() if key != "run"},
        run_id=stored_id(run),
        marker=tmp_path / "executed",
        rng=rng,
    )
    WAYS[number % len(WAYS)](at)

    def resume(arguments: list[str]) -> tuple[int, str]:
        done = train(*arguments, settings=False)
        return done.code, done.text

    assert problem(at, resume, anyway=False) is None


@pytest.mark.parametrize(
    ("what", "policy"),
    [
        ("nan loss", "stop"),
        ("infinite loss", "stop"),
        ("gradient of one micro-batch", "stop"),
        ("loss of one micro-batch", "skip"),
        ("gradient", "skip"),
    ],
)
def test_what_is_no_number_stops_or_is_skipped_and_poisons_nothing(train, monkeypatch, what, policy):
    assert what in not_finite.WHAT
    with monkeypatch.context() as patch:
        patch.setattr(AdapterModule, "losses", AdapterModule.losses)  # put back afterwards
        not_finite.poison(what)
        done = train(*BIASES, *not_finite.EVERYTHING_KEPT, f"trainer.nonfinite={policy}")
    ended = Ended(code=done.code, seconds=0, text=done.text)
    assert (not_finite.stopped if policy == "stop" else not_finite.skipped)(ended, done.run) is None
    place = "gradient" if what.startswith("gradient") else "loss"
    assert f"a {place} of step {not_finite.BAD_STEP} is not finite" in done.text
    assert ("optim.lr" in done.text) is (policy == "stop")


def test_a_full_disk_does_not_take_the_identity_of_a_run(tmp_path):
    """Without it the run would refuse its own checkpoints as those of another one."""
    first = store_id(tmp_path, None)
    with files_of_at_most(0):
        with pytest.raises(OSError, match="File too large"), claimed(tmp_path):
            pass
        with pytest.raises(CheckpointError, match="File too large"):
            store_id(tmp_path, first)
    assert stored_id(tmp_path) == first


def test_a_full_disk_does_not_take_the_metrics_of_the_past(tmp_path):
    metrics = MetricsCsv(tmp_path / "metrics.csv", None)
    metrics.log_metrics({"train/loss": 1.0}, 1)
    before = (tmp_path / "metrics.csv").read_bytes()
    with files_of_at_most(0), pytest.raises(TrainingError, match=r"metrics.csv cannot be written: File too large"):
        metrics.log_metrics({"val/loss": 2.0}, 1)  # a new column: the file is written anew
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_checkpoint_does_not_go_through_the_folder_of_temporary_files(tmp_path, monkeypatch):
    """That one may be small, and a run killed there would leave the file behind."""
    monkeypatch.setattr("tempfile.mkstemp", lambda *_, **__: pytest.fail("a temporary file"))
    DirectCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.partial")
    assert torch.load(tmp_path / "last.partial", weights_only=True)["state_dict"] == {}
