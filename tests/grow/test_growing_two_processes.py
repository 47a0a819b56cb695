"""Two processes grow a run as one does: what is kept stays bit by bit on both, through a resume too."""

import json
from pathlib import Path

import pytest
import torch

from lmoe.adapter.folder import read_tensors
from tests.grow.test_growing import GROW, NEW, changed
from tests.run.test_several_processes import as_two_processes, two

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("two processes")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_kept_experts_stay_bit_by_bit_in_two_processes_and_on_resume(micro, finished_run, tmp_path, strategy):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = ("data.batch_size=2", "trainer.max_steps=4", "checkpoint.every_n_steps=1", "checkpoint.keep_last=10")
    command = micro.changed(f"injection.experts_from={finished_run}", *GROW, "phase=grow", *settings, *two(strategy))
    tasks: list[list] = [[*command, f"hydra.run.dir={whole}"], [str(whole), str(cut), 2], [f"resume={cut}"]]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    as_two_processes(tmp_path)
    before, after, resumed = (read_tensors(Path(run) / "adapter") for run in (finished_run, whole, cut))
    new = {f".experts.{NEW}.lora_{half}" for half in "AB"}
    assert {name[name.index(".experts.") :] for name in changed(before, after)} == new
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())
