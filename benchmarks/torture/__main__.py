"""`make torture`: kill, spoil, fill up, poison, and see that nothing is lost and nothing wrong is loaded."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks and fresh processes compute alike

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from benchmarks.flags import RESULTS, positive
from benchmarks.torture.outcome import table, timed, write
from benchmarks.torture.pieces import write_micro
from benchmarks.torture.process import forked
from lmoe.cli.threads import own_cores
from lmoe.run.machine import cpu_model

PARTS = ("kills", "corruptions", "full_disk", "not_finite", "save_cost", "default_kills")
"""Modules of this package; each has a CLAIM and a `torture(base, count, seed, outcome)`."""
COUNTS = {"kills": 100, "corruptions": 200, "default_kills": 6}


def main() -> int:
    """Returns 0 if every claim that was tried held."""
    flags = parser().parse_args()

    command = " ".join(["python -m benchmarks.torture", *sys.argv[1:]])
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        base = Path(place)
        ended = forked(lambda: write_micro(base), base)
        assert ended.code == 0, ended.text
        for part in [part for part in PARTS if part in (flags.part or PARTS)]:
            module, count = importlib.import_module(f"benchmarks.torture.{part}"), getattr(flags, part, 1)
            outcomes.append(
                timed(
                    module.CLAIM,
                    lambda outcome, run=module.torture, n=count: run(base, n, flags.seed, outcome),
                    command,
                )
            )
    every = write(outcomes, {"cpu": cpu_model(), "cores": own_cores()}, flags.output_dir)
    sys.stdout.write(table(every))
    return 0 if all(outcome.kept for outcome in outcomes) else 1


def parser() -> argparse.ArgumentParser:
    """The parser of the command's flags."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__)
    made.add_argument("--part", choices=PARTS, action="append", help="may be repeated; default: all")
    for part, count in COUNTS.items():
        name = f"--{part.replace('_', '-')}"
        made.add_argument(name, type=positive, default=count, metavar="N", help=f"cases of {part}; default {count}")
    made.add_argument("--seed", type=int, default=0, help="of the moments and places")
    made.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    return made


if __name__ == "__main__":
    sys.exit(main())
