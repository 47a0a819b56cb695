"""Peak memory of two training steps of one contestant, in a process of its own.

`python -m benchmarks.memory NAME …` measures and prints JSON; `measure` runs that.
"""

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.contestants import Contestant, find
from benchmarks.experts import Experts
from benchmarks.models import SIZES, Batch, random_batch, random_model, sharing_copy
from benchmarks.peers import frozen
from benchmarks.step import DTYPES, TrainStep

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
STEPS = 2
"""The second step is the first that holds the optimizer's moments through a backward."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Peak:
    """In MB (10^6 bytes): of the GPU where the model is on one, else resident.

    Args:
        base: once the base stands and has run, before any adapter.
        peak: most while adapters are made and trained.
    """

    base: float
    peak: float

    @property
    def training(self) -> float:
        """What adapters, gradients, moments and activations take beyond the base."""
        return self.peak - self.base


def measure(
    contestant: Contestant, *, size: str, dtype: str, tokens: tuple[int, int], device: str, threads: int
) -> Peak:
    """Peak memory of a contestant's step, in a process of its own.

    Raises:
        RuntimeError: the process failed; with the last line of what it said.
    """
    words = [contestant.name, "--size", size, "--dtype", dtype, "--tokens", f"{tokens[0]}x{tokens[1]}"]
    return in_own_process("benchmarks.memory", *words, "--device", device, "--threads", str(threads))


def in_own_process(module: str, *words: str) -> Peak:
    """Run a module that prints a Peak as JSON on its last line.

    Raises:
        RuntimeError: the process failed; with the last line of what it said.
    """
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def run_here(contestant: Contestant, size: str, dtype: str, tokens: tuple[int, int], device: torch.device) -> Peak:
    """Measure in this process, which must be a fresh one."""
    peer = contestant.load()
    model = random_model(SIZES[size], DTYPES[dtype], device)
    batch = random_batch(SIZES[size], tokens, device)

    def build() -> TrainStep:
        return TrainStep(peer.attach(model, contestant.experts), batch, DTYPES[dtype])

    return peak_of(build, model, batch)


def peak_of(build: Callable[[], TrainStep], model: PreTrainedModel, batch: Batch) -> Peak:
    """Peak memory of a contestant's step in this process.

    Args:
        build: makes the step of a contestant from the model.
        model: the base.
        batch: of every step.
    """
    device = batch.input_ids.device
    # Kernels, lazy imports (AdamW's are large) and the allocator's arenas come with the first step; they are nobody's.
    TrainStep(frozen.attach(sharing_copy(model), Experts(0, 0, 0)), batch, model.dtype)()
    parameter = torch.nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW([parameter]).step()
    base = settle(device)
    step = build()
    for _ in range(STEPS):
        step()
    return Peak(base=base, peak=peak(device))


def settle(device: torch.device) -> float:
    """Give back what is free, start the count of the peak anew, and return the memory in use in MB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MB
    if not sys.platform.startswith("linux"):
        return peak(device)  # the peak so far: the system has no other count
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MB
    if sys.platform.startswith("linux"):
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MB


def _status(key: str) -> float:
    """MB; the system states KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / MB
    raise AssertionError(f"no {key} in the process status")


def main() -> int:
    """Measure one contestant and print its peak; the process that `measure` starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    batch, length = (int(part) for part in given.tokens.split("x"))
    peak = run_here(find(given.name), given.size, given.dtype, (batch, length), torch.device(given.device))
    sys.stdout.write(json.dumps(asdict(peak)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
