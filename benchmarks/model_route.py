"""What reading the prompts costs: training steps of the default job with one router for the whole model, and others.

`python -m benchmarks.model_route`. All contestants read the same rows of the default job on the bundled tiny base, one
micro-batch each in turn, so that a slow minute of the machine cancels in the ratios.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import torch

from benchmarks.flags import positive
from benchmarks.gpu_parts.composing import composed
from benchmarks.timing import Clock, Laps, Timed, interleave, ratio
from lmoe.injection.record import injected, mixtures
from lmoe.run.parts import build_parts

PART = "forward+backward"
MODEL = ("moe=sequence", "moe.router_scope=model")
CONTESTANTS = {
    "top_k, a router for each Linear": ("moe=top_k",),
    "sequence, a router for each Linear": ("moe=sequence",),
    "one for the model, experts on answers": MODEL,
    "one for the model, experts on answers, reads the embeddings": (*MODEL, "moe.router_layer=0"),
    "one for the model, experts on prompts too": (*MODEL, "moe.prompt_experts=true"),
}
REFERENCE = next(iter(CONTESTANTS))


@dataclass
class Steps:
    """Micro-batches of a job, one after the other, again from the first when all are used."""

    run: Callable[[dict], torch.Tensor]
    batches: list[dict]
    used: int = 0

    def __call__(self) -> Laps:
        """Returns the milliseconds of one."""
        batch = self.batches[self.used % len(self.batches)]
        self.used += 1
        clock = Clock(batch["input_ids"].device)
        self.run(batch).backward()
        clock.mark()
        return clock.laps()


def steps(overrides: Sequence[str], count: int) -> Steps:
    """The first micro-batches of the default job with some settings, every role trained."""
    parts = build_parts(composed(["phase=joint", *overrides]))
    module, record = parts.module, injected(parts.model)
    module.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, world_size=1)  # type: ignore[assignment]
    with torch.no_grad():
        for _, site in mixtures(parts.model):
            torch.nn.init.normal_(site.lora_B, std=0.01)
    assert record.plan.routers
    batches = list(islice(parts.datamodule.train_dataloader(), count))
    return Steps(lambda batch: module.training_step(batch, 0), batches)


def table(timed: dict[str, Timed], batches: Sequence[dict]) -> list[str]:
    """Lines of a Markdown table, and what the rows were like."""
    prompts = sum(int(batch["prompt_mask"].sum()) for batch in batches)
    valid = sum(int(batch["valid_mask"].sum()) for batch in batches)
    lines = ["| contestant | of the first | ms |", "|---|---|---|"]
    for name, one in timed.items():
        lines.append(f"| {name} | {ratio(one, timed[REFERENCE], PART):.3f} | {one.median(PART):.0f} |")
    return [*lines, "", f"{len(batches)} micro-batches, {valid} tokens, of which {prompts / valid:.0%} are prompts"]


def main(given: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.model_route", description=__doc__)
    parser.add_argument("--repeats", type=positive, default=20, help="counted rounds")
    parser.add_argument("--batches", type=positive, default=5, help="different micro-batches")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("overrides", nargs="*", help="settings of every contestant's job")
    flags = parser.parse_args(given)
    torch.set_num_threads(flags.threads)
    made = {name: steps((*own, *flags.overrides), flags.batches) for name, own in CONTESTANTS.items()}
    timed = interleave(made, [PART], warmup=2, repeats=flags.repeats, progress=lambda _: None)
    print("\n".join(table(timed, made[REFERENCE].batches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
