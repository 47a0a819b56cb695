"""From checked flags to files: one report for each type that was asked for."""

import argparse
import sys
from collections.abc import Callable

from benchmarks.results import Report, as_markdown, write
from benchmarks.step import DTYPES

Say = Callable[[str], None]


def run_types(
    flags: argparse.Namespace, measure: Callable[[argparse.Namespace, str, Say], Report], stem: Callable[[str], str]
) -> int:
    """Measure each type that the flags name, and write its files.

    Args:
        flags: see benchmarks/flags.py.
        measure: makes the report of a type, given the flags, its name and whom to tell of the progress.
        stem: name of the files of a type, without the ending.

    Returns:
        0 if no target is missed.
    """
    missed = False
    for dtype in dict.fromkeys(flags.dtype or DTYPES):
        report = measure(flags, dtype, _say)
        write(report, flags.output_dir, stem(dtype))
        sys.stdout.write(as_markdown(report, f"{stem(dtype)}.png") + "\n")
        missed |= report.missed
    return int(missed)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
