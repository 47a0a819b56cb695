"""Two processes are taught the same clusters, through a resume too: those of the first, or with a sharded
base or a stream those that both have found."""

import json
from pathlib import Path

import pytest
import torch

from lmoe.adapter.folder import read_tensors
from tests.run.test_clustered_rows import FILE, TAUGHT
from tests.run.test_several_processes import as_two_processes, two

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("two processes")]
SAVED = ("checkpoint.every_n_steps=1", "checkpoint.keep_last=10")
ONE = ("trainer.strategy=auto", "trainer.devices=1", "trainer.accumulate_grad_batches=2")
COMMON = (*TAUGHT, *SAVED, "data.batch_size=2", "phase.phases.routed.start=3", "trainer.max_steps=4")


STREAM = ("data.streaming=true", "data.shuffle_buffer=8")


@pytest.mark.parametrize("rows", [(), STREAM], ids=["read before", "a stream"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_taught_the_clusters_that_one_is_and_resume_exactly(micro, train, tmp_path, strategy, rows):
    done = train(*COMMON, *rows, *ONE, "injection.lora_dropout=0", run="one")
    assert done.code == 0, done.text
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = micro.changed(*COMMON, *rows, *two(strategy), "injection.lora_dropout=0")
    tasks: list[list] = [[*command, f"hydra.run.dir={whole}"], [str(whole), str(cut), 2], [f"resume={cut}"]]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    as_two_processes(tmp_path)
    assert (whole / FILE).read_bytes() == (done.run / FILE).read_bytes() == (cut / FILE).read_bytes()
    alone, both, resumed = (read_tensors(Path(run) / "adapter") for run in (done.run, whole, cut))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in both.items())
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-4, atol=1e-6)
