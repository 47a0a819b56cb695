"""How the cost of fine-tuning grows: `make bench-growth`.

With experts, rank, top_k, the length of sequences, layers, domains, validation rows and logged steps.

Each series runs its points in interleaved rounds and fits an exponent to the medians of their times, beside that of the
floating point operations that are counted over the same points. Then the share of a training step that is neither
forward, backward nor optimizer, on the bundled base and on the real one where `make real-base` has written it.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.flags import RESULTS, positive
from benchmarks.growth import jobs, steps
from benchmarks.growth.counted import counted_flops
from benchmarks.growth.fit import SLACK, Grown
from benchmarks.growth.overhead import BASES, Overhead, measure
from benchmarks.growth.page import tables, write, write_docs
from benchmarks.growth.watch import CLOCKS
from benchmarks.machine import facts
from benchmarks.timing import Laps, interleave
from lmoe.cli.threads import own_cores
from lmoe.run.announce import quiet_libraries

MOST_TOKENS, QUICK_TOKENS = 8192, 4096
STEPS = {"tiny": 20, "smollm2_q4": 8}
REAL = Path(__file__).resolve().parents[2] / "data" / "real" / "smollm2_q4"
OVERHEAD = "overhead"
SERIES = (*steps.series(MOST_TOKENS), *jobs.series())


def grow(
    name: str,
    job: str,
    part: str | None,
    parts: Sequence[str],
    made: dict[int, Callable[[], Laps]],
    *,
    repeats: int,
) -> Grown:
    """Count the operations of each point, which warms it up, and time all of them in rounds."""
    counted = {}
    for point, run in made.items():
        say(f"{name}: counting {point:,}")
        counted[point] = counted_flops(run)
    runs = {str(point): run for point, run in made.items()}
    timed = interleave(runs, parts, warmup=0, repeats=repeats, progress=lambda at: say(f"{name}: {at}"))
    return Grown(name=name, job=job, part=part, counted=counted, timed={p: timed[str(p)] for p in made})


def measured(flags: argparse.Namespace, folder: Path) -> list[Grown]:
    """All series that were asked for."""
    now, found = CLOCKS[flags.clock], []
    wanted = flags.only or SERIES
    for name, (job, points) in steps.series(QUICK_TOKENS if flags.quick else MOST_TOKENS).items():
        if name in wanted:
            made = {at: steps.Step(points[at], folder, now) for at in fewer(list(points), quick=flags.quick)}
            found.append(grow(name, job, None, steps.PARTS, dict(made), repeats=flags.repeats))
    for name, (job, part, sizes) in jobs.series().items():
        if name in wanted:
            runs = {at: jobs.Job(sizes[at], folder, now) for at in fewer(list(sizes), quick=flags.quick)}
            repeats = max(1, flags.repeats // 2)
            found.append(grow(name, job, part, jobs.PARTS, dict(runs), repeats=repeats))
    return found


def fewer(points: list[int], *, quick: bool) -> list[int]:
    """The points that are run; of a quick run no more than the first three."""
    return points[:3] if quick else points


def overheads(flags: argparse.Namespace) -> list[Overhead]:
    """Measure the bundled base, and the real one where it is there."""
    if flags.only and OVERHEAD not in flags.only:
        return []
    wanted = flags.base or [base for base in BASES if base != REAL.name or REAL.exists()]
    found = []
    for base in wanted:
        say(f"{OVERHEAD}: {base}")
        found.append(measure(base, 5 if flags.quick else STEPS[base], CLOCKS[flags.clock]))
    return found


def say(line: str) -> None:
    """Tell the progress."""
    sys.stderr.write(line + "\n")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three points of each series, shorter sequences")
    parser.add_argument("--only", choices=[*SERIES, OVERHEAD], action="append", help="may be repeated; default: all")
    parser.add_argument(
        "--base", choices=list(BASES), action="append", help="for the overhead; default: those there are"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="counted rounds of steps; whole runs: half as many")
    parser.add_argument("--threads", type=positive, default=own_cores(), help="of torch; default: every core")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="process: where others share the cores")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/SCALING.md too")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing grows faster than asked, and no overhead is larger."""
    flags = arguments(argv)
    torch.set_num_threads(flags.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        grown = measured(flags, Path(folder))
    shares = overheads(flags)
    command = shlex.join(["python", "-m", "benchmarks.growth", *(sys.argv[1:] if argv is None else argv)])
    machine = facts(torch.device("cpu")) | {"clock": flags.clock}
    sys.stdout.write(f"\n{write(grown, shares, command, machine, flags.output_dir)}\n")
    if flags.docs:
        write_docs(tables(grown, shares, command, machine))
    for one in grown:
        limit = one.counted_exponent + SLACK
        verdict = "met   " if one.met else "MISSED"
        sys.stdout.write(f"  {verdict}  {one.name}: exponent {one.measured_exponent:.2f}, at most {limit:.2f}\n")
    for one in shares:
        verdict = "met   " if one.met else "MISSED"
        sys.stdout.write(f"  {verdict}  overhead on {one.base}: {one.share:.1%}, at most {one.limit:.0%}\n")
    return 0 if all(one.met for one in (*grown, *shares)) else 1


if __name__ == "__main__":
    sys.exit(main())
