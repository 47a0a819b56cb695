"""What a step of a preference objective costs beside one of supervised fine-tuning on the same sequences.

`python -m benchmarks.preference`. Time: all contestants take the same micro-batches of the bundled pairs over the tiny
base, one each in turn. Memory: two steps of the largest micro-batch with AdamW, each contestant in a process of its
own, beyond what was held before the first.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from types import SimpleNamespace

import torch

from benchmarks.flags import positive
from benchmarks.gpu_parts.composing import composed
from benchmarks.memory import Peak, in_own_process, peak, settle
from benchmarks.model_route import PART, Steps
from benchmarks.timing import interleave, ratio
from lmoe.injection.record import mixtures
from lmoe.objectives.sft import SupervisedFineTuning
from lmoe.run.parts import Parts, build_parts

MODULE = "benchmarks.preference"
SFT = "sft"
CONTESTANTS = {
    SFT: ("task=simpo",),
    "dpo": ("task=dpo",),
    "dpo, reference=start": ("task=dpo", "task.reference=start"),
    "simpo": ("task=simpo",),
    "orpo": ("task=orpo",),
}
"""Overrides of the default job by name; sft learns the answers of the same pairs."""


def parts_of(name: str, overrides: Sequence[str]) -> Parts:
    """A run's parts with every role training, and experts that act."""
    parts = build_parts(composed(["moe=top_k", "phase=joint", "data=preference", *overrides, *CONTESTANTS[name]]))
    module = parts.module
    module.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, world_size=1)  # type: ignore[assignment]
    with torch.no_grad():
        for _, site in mixtures(parts.model):
            torch.nn.init.normal_(site.lora_B, std=0.01)
    if name == SFT:
        module.objectives = (SupervisedFineTuning(),)
    return parts


def peak_of(name: str, overrides: Sequence[str]) -> Peak:
    """Peak of two steps, in this process, which must be a fresh one."""
    parts = parts_of(name, overrides)
    module, batch = parts.module, parts.datamodule.largest_batch()
    device = batch["input_ids"].device
    trained = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
    small = torch.nn.Parameter(torch.zeros(1))
    small.grad = torch.zeros_like(small)
    torch.optim.AdamW([small]).step()  # its imports are large, and nobody's
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    base = settle(device)
    for _ in range(2):
        module.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Peak(base=base, peak=peak(device))


def steps(name: str, overrides: Sequence[str], count: int) -> Steps:
    """Micro-batches of a contestant, one after the other."""
    parts = parts_of(name, overrides)
    return Steps(
        lambda batch: parts.module.training_step(batch, 0), list(islice(parts.datamodule.train_dataloader(), count))
    )


def main(given: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__)
    parser.add_argument("--repeats", type=positive, default=12, help="counted rounds")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--only", choices=list(CONTESTANTS), help="print the peak of one")
    parser.add_argument("overrides", nargs="*", help="of the job, such as backbone=smollm2_q4")
    flags = parser.parse_args(given)
    torch.set_num_threads(flags.threads)
    if flags.only is not None:
        found = peak_of(flags.only, flags.overrides)
        sys.stdout.write(json.dumps({"base": found.base, "peak": found.peak}) + "\n")
        return 0
    made = {name: steps(name, flags.overrides, 4) for name in CONTESTANTS}
    timed = interleave(made, [PART], warmup=1, repeats=flags.repeats, progress=lambda _: None)
    peaks = {
        name: in_own_process(MODULE, "--only", name, "--threads", str(flags.threads), *flags.overrides)
        for name in CONTESTANTS
    }
    lines = ["| objective | time of sft's | ms | memory of sft's | MB |", "|---|---|---|---|---|"]
    for name, one in timed.items():
        memory = peaks[name].training / peaks[SFT].training
        lines.append(
            f"| {name} | {ratio(one, timed[SFT], PART):.2f} | {one.median(PART):.0f} | {memory:.2f} | "
            f"{peaks[name].training:,.0f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
