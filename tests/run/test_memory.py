"""What a run says of its memory is its own."""

import sys

import torch

from lmoe.run.memory import peak_memory_mb
from tests.micro import ROOT, finished, start


def test_the_peak_is_that_of_this_process_and_not_of_the_one_that_started_it():
    held = torch.zeros(150_000_000)  # 600 MB
    mine = peak_memory_mb()
    program = "from lmoe.run.memory import peak_memory_mb; print(peak_memory_mb())"
    child = float(finished(start(sys.executable, "-c", program, cwd=ROOT)).split()[-1])
    assert held.sum() == 0 and mine > 600 + 0.5 * child and child < mine - 300
