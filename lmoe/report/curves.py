"""Read metrics.csv: a wide table with one column a metric, empty where nothing was logged."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from lmoe.files.small_file import Reader, whole_lines

METRICS = Reader(most=2**32, what="it")
DOMAIN_LOSS = re.compile(r"val/([^/]+)/loss")
"""Name of a domain's validation loss; names of routing metrics may end as it does, and have more parts."""
Curves = dict[str, list[tuple[int, float]]]
"""Metric -> its (optimizer step, value) pairs, steps ascending."""


def read_metrics(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Curves:
    """The metrics of a run; where a step was logged twice, the later row counts.

    Args:
        wanted: whether a metric is read, by its name.

    Raises:
        CheckpointError: the file cannot be read.
    """
    text = METRICS.bytes_of(path).decode("utf-8", errors="replace")
    by_step: dict[str, dict[int, float]] = {}
    rows = METRICS.rows(whole_lines(text), path)
    header = next(rows, [])
    places = {name: place for place, name in enumerate(header) if name == "step" or wanted(name)}
    for cells in rows:
        row = {name: cells[place] for name, place in places.items() if place < len(cells)}
        step = _number(row.pop("step", None))
        if step is None:
            continue
        for name, cell in row.items():
            value = _number(cell)
            if value is not None and math.isfinite(step):
                by_step.setdefault(name, {})[int(step)] = value
    return {name: sorted(points.items()) for name, points in by_step.items()}


def domain_losses(metrics: Curves) -> Curves:
    """The validation losses of the domains, val/<domain>/loss, by domain."""
    return {found[1]: points for name, points in metrics.items() if (found := DOMAIN_LOSS.fullmatch(name))}


def _number(cell: str | None) -> float | None:
    """None for an empty cell, for one that a short row lacks, and for what is no number."""
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None
