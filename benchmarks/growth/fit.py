"""Exponents of growth: measured time beside counted operations."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import Timed, ratio

SLACK = 0.1
"""How much faster than counted operations measured time may grow, as an exponent."""


def exponent(points: Mapping[int, float]) -> float:
    """a of y = c x^a, by least squares of ln y on ln x.

    Args:
        points: y by x, both above 0, of two different x at least.

    Raises:
        ValueError: there are fewer points, or some are not above 0.
    """
    if len(points) < 2 or min(points) <= 0 or min(points.values()) <= 0:
        raise ValueError(f"two points or more are needed, all above 0; got {dict(points)}")
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    x_mean, y_mean = statistics.fmean(xs), statistics.fmean(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


@dataclass(slots=True, frozen=True, kw_only=True)
class Grown:
    """What was measured while one thing grew.

    Args:
        name: of what grows.
        job: the rest of it, and what was timed, in words.
        part: of the times that is judged; None: all of them.
        counted: floating point operations of the matmuls and of attention, by point.
        timed: by point.
    """

    name: str
    job: str
    part: str | None
    counted: dict[int, float]
    timed: dict[int, Timed]

    def relative(self) -> dict[int, float]:
        """Time by point, over that of the first one: medians over the rounds of ratios within one."""
        first = next(iter(self.timed.values()))
        return {point: ratio(timed, first, self.part) for point, timed in self.timed.items()}

    @property
    def measured_exponent(self) -> float:
        """Returns that of time, over all points."""
        return exponent(self.relative())

    @property
    def last_exponent(self) -> float:
        """Returns that of time between the two largest points, where what is constant weighs least."""
        return exponent(dict(list(self.relative().items())[-2:]))

    @property
    def counted_exponent(self) -> float:
        """Returns that of counted operations."""
        return exponent(self.counted)

    @property
    def met(self) -> bool:
        """Whether time grows no faster than what is counted, but for the slack."""
        return self.measured_exponent <= self.counted_exponent + SLACK

    def as_json(self) -> dict[str, Any]:
        """Everything, times in milliseconds."""
        return {
            "name": self.name,
            "job": self.job,
            "points": list(self.timed),
            "judged": self.part or "sum",
            "exponent": {
                "time": self.measured_exponent,
                "time_of_last_two": self.last_exponent,
                "counted": self.counted_exponent,
            },
            "met": self.met,
            "counted_flops": self.counted,
            "samples_ms": {point: timed.parts for point, timed in self.timed.items()},
        }
