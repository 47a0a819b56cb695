"""`make fuzz`: configs and files that nobody meant to write are taken, or refused by name; none ends in a traceback."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the models are too small for more

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from benchmarks.flags import RESULTS, positive
from benchmarks.torture.outcome import table, timed, write
from lmoe.cli.threads import own_cores
from lmoe.run.machine import cpu_model

PARTS = {"configs": 2400, "files": 500}
"""Modules of this package with their number of cases; each has a CLAIM and a `fuzz(base, count, seed, outcome)`."""


def main() -> int:
    """Returns 0 if every claim that was tried held."""
    flags = parser().parse_args()
    command = " ".join(["python -m benchmarks.fuzz", *sys.argv[1:]])
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for part in [part for part in available() if part in (flags.part or PARTS)]:
            module, count = importlib.import_module(f"benchmarks.fuzz.{part}"), getattr(flags, part)
            base = Path(place) / part
            base.mkdir()
            outcomes.append(
                timed(
                    module.CLAIM,
                    lambda outcome, module=module, base=base, count=count: module.fuzz(
                        base, count, flags.seed, outcome
                    ),
                    command,
                )
            )
    every = write(outcomes, {"cpu": cpu_model(), "cores": own_cores()}, flags.output_dir, "fuzz")
    sys.stdout.write(table(every))
    return 0 if outcomes and all(outcome.kept for outcome in outcomes) else 1


def available() -> list[str]:
    """The parts that are here."""
    return [part for part in PARTS if (Path(__file__).parent / f"{part}.py").exists()]


def parser() -> argparse.ArgumentParser:
    """The parser of the command's flags."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    made.add_argument("--part", choices=available(), action="append", help="may be repeated; default: all")
    for part in available():
        help_text = f"cases of {part}; default {PARTS[part]}"
        made.add_argument(f"--{part}", type=positive, default=PARTS[part], metavar="N", help=help_text)
    made.add_argument("--seed", type=int, default=0, help="of the cases")
    made.add_argument("--output-dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    return made


if __name__ == "__main__":
    sys.exit(main())
