"""Forward and backward of a training step with compiled decoder layers beside one without: `trainer.compile`.

`python -m benchmarks.compiled`. Both take the same micro-batches of the default job on the bundled tiny base, in
float32, one each in turn, so that a slow minute of the machine cancels in the ratio. What the first one of all takes,
in which the code is made, is told by itself. A compiled one that computes another loss, or that is compiled anew for a
length, ends the measurement.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch._dynamo.utils import counters

from benchmarks.flags import positive
from benchmarks.model_route import PART, Steps, steps
from benchmarks.timing import Clock, Timed, interleave, ratio
from lmoe.config.trainer import TrainerConfig
from lmoe.errors import LmoeError
from lmoe.run.devices import check_devices

EAGER, COMPILED = "without", "compiled"
TOLERANCE = 1e-4
"""Of the losses beside one another, relative."""


def graphs() -> int:
    """Graphs that were compiled so far."""
    return counters["stats"]["unique_graphs"]


def check_same(run: dict[str, Steps]) -> None:
    """Compare the losses of the first micro-batch.

    Raises:
        SystemExit: they differ.
    """
    losses = {name: float(one.run(one.batches[0]).detach()) for name, one in run.items()}
    if abs(losses[COMPILED] - losses[EAGER]) > TOLERANCE * abs(losses[EAGER]):
        raise SystemExit(f"the loss is {losses[COMPILED]:.6f} compiled, {losses[EAGER]:.6f} without")


def report(timed: dict[str, Timed], first: float, found: int) -> list[str]:
    """Lines of a Markdown table, and what compiling took.

    Args:
        timed: both, by name.
        first: milliseconds of the first forward and backward that was compiled.
        found: graphs.
    """
    lines = [f"| layers | of {EAGER} | ms |", "|---|---|---|"]
    for name, one in timed.items():
        lines.append(f"| {name} | {ratio(one, timed[EAGER], PART):.3f} | {one.median(PART):.0f} |")
    saved = timed[EAGER].median(PART) - timed[COMPILED].median(PART)
    pays = f"which {first / saved:,.0f} micro-batches pay back" if saved > 0 else "which nothing pays back here"
    return [*lines, "", f"{found} graphs; the first forward and backward took {first / 1000:.1f} s, {pays}"]


def main(given: Sequence[str] | None = None, make: Callable[[Sequence[str], int], Steps] = steps) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.compiled", description=__doc__)
    parser.add_argument("--repeats", type=positive, default=12, help="counted rounds")
    parser.add_argument("--batches", type=positive, default=4, help="different micro-batches")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("overrides", nargs="*", help="of the job, such as injection.num_experts=8")
    flags = parser.parse_args(given)
    torch.set_num_threads(flags.threads)
    try:
        check_devices(TrainerConfig(compile=True))
    except LmoeError as error:
        raise SystemExit(str(error)) from None
    ways = {EAGER: "trainer.compile=false", COMPILED: "trainer.compile=true"}
    made = {name: make([*flags.overrides, way], flags.batches) for name, way in ways.items()}
    before, clock = graphs(), Clock(torch.device("cpu"))
    made[COMPILED].run(made[COMPILED].batches[0]).backward()
    clock.mark()
    (first,) = clock.laps()
    check_same(made)
    found = graphs()
    timed = interleave(made, [PART], warmup=1, repeats=flags.repeats, progress=lambda _: None)
    if graphs() != found:
        raise SystemExit(f"{graphs() - found} graphs more were compiled for other lengths")
    print("\n".join(report(timed, first, found - before)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
