"""Read metrics.csv: a wide table with one column a metric, empty where nothing was logged."""

import csv
from pathlib import Path

from lmoe.errors import CheckpointError

Curves = dict[str, list[tuple[int, float]]]
"""Metric -> its (optimizer step, value) pairs, steps ascending."""


def read_metrics(path: Path) -> Curves:
    """Every metric of a run; where a step was logged twice, the later row counts.

    A last line without its line break was torn by a crash: its last number may lack digits, so it is dropped.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    by_step: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(lines):
        step = _number(row.pop("step", None))
        if step is None:
            continue
        for name, cell in row.items():
            value = _number(cell)
            if value is not None:
                by_step.setdefault(name, {})[int(step)] = value
    return {name: sorted(points.items()) for name, points in by_step.items()}


def _number(cell: str | None) -> float | None:
    """None for an empty cell, for one that a short row lacks, and for what is no number."""
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None
