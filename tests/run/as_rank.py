"""Several trainings, one after the other, as one of two processes: what torchrun would start, with one import for all.

Takes a JSON list of trainings, each a list of arguments, and of [source, target, step]: a copy of a run as a kill after
the checkpoint of that step leaves it. A training that begins with "signal" is stopped by SIGTERM, which only the second
process gets, in the first micro-batch of step 2.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

import lmoe.run.finish
import lmoe.run.train
from benchmarks.gpu_parts.runs import cut_back
from lmoe.adapter.folder import adapter_tensors
from lmoe.cli.train import main
from lmoe.training.module import AdapterModule


def keep_adapters(rank: int) -> None:
    """Each rank also leaves its own adapters in the run's folder, where lmoe writes those of the first; no pictures."""
    original = lmoe.run.train.finish

    def finish(parts, run_dir, *arguments, **options):
        tensors = {name: tensor.contiguous().clone() for name, tensor in adapter_tensors(parts.model).items()}
        save_file(tensors, run_dir / f"{rank}.safetensors")
        original(parts, run_dir, *arguments, **options)

    lmoe.run.train.finish = finish
    lmoe.run.finish.write_pictures = lambda summary, metrics, report: {}


@contextmanager
def signalled(rank: int) -> Iterator[None]:
    """The second process gets SIGTERM inside a window; the first must not run ahead."""
    original = AdapterModule.training_step

    def training_step(self, batch, batch_idx):
        if rank == 1 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    AdapterModule.training_step = training_step
    try:
        yield
    finally:
        AdapterModule.training_step = original


def work(tasks: list[list], rank: int) -> int:
    """Returns the first exit code that is not 0."""
    for task in tasks:
        if isinstance(task[-1], int):
            if rank == 0:
                cut_back(Path(task[0]), Path(task[1]), task[2])
            torch.distributed.barrier()
        elif task[0] == "signal":
            with signalled(rank):
                code = main(task[1:])
            if code != 128 + signal.SIGTERM:
                return code or 1
        elif code := main(task):
            return code
    return 0


if __name__ == "__main__":
    keep_adapters(int(sys.argv[2]))
    sys.exit(work(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])))
