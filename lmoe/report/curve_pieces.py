"""Pieces of a curve of losses: where a run begins to measure another thing, one ends and the next begins."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

Points = Sequence[tuple[int, float]]
"""(optimizer step, value), steps ascending."""


def finite(points: Points) -> list[tuple[int, float]]:
    """The points whose value is a number."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def measure_breaks(phases: Mapping[str, int], phase_measures: Mapping[str, str]) -> list[int]:
    """Steps after which another thing is measured.

    Args:
        phases: first optimizer step of each phase by name, in order.
        phase_measures: what losses are measured in, by phase; empty: the same in all.
    """
    names = [name for name in phases if name in phase_measures]
    return [phases[name] for before, name in pairwise(names) if phase_measures[name] != phase_measures[before]]


def measure_changes(phases: Mapping[str, int], phase_measures: Mapping[str, str]) -> list[str]:
    """What is measured at first, and from each phase on that measures something else: `<phase>: <measure>`."""
    found: list[str] = []
    for name, measure in ((name, phase_measures[name]) for name in phases if name in phase_measures):
        if not found or not found[-1].endswith(f": {measure}"):
            found.append(f"{name}: {measure}")
    return found


def parted(points: Points, breaks: Sequence[int]) -> list[Points]:
    """Pieces of a curve: what comes after the step of a break is of the next piece; empty ones are left out."""
    edges = [-math.inf, *breaks, math.inf]
    pieces = [[point for point in points if low < point[0] <= high] for low, high in pairwise(edges)]
    return [piece for piece in pieces if piece]
