"""Clocks for a CPU and a GPU, and interleaved repeats."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Laps = tuple[float, ...]
"""Milliseconds of the parts of one run."""


class Clock:
    """Milliseconds between marks: of the wall on a CPU, of events on a GPU, whose start waits for an idle device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.events: list[torch.cuda.Event] = []
        self.times: list[float] = []
        if self.cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        """The end of a part."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.times.append(time.perf_counter())

    def laps(self) -> Laps:
        """Milliseconds of each part."""
        if not self.cuda:
            return tuple(1000 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False))
        torch.cuda.synchronize()
        return tuple(a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False))


@dataclass(slots=True, frozen=True)
class Timed:
    """One contestant's samples.

    Args:
        parts: milliseconds by part, one for each repeat.
    """

    parts: dict[str, list[float]]

    def of(self, part: str | None = None) -> list[float]:
        """Samples of a part; None: of all parts together."""
        if part is not None:
            return self.parts[part]
        return [sum(laps) for laps in zip(*self.parts.values(), strict=True)]

    def median(self, part: str | None = None) -> float:
        """Median of the times, in milliseconds."""
        return statistics.median(self.of(part))

    def spread(self) -> float:
        """Range of the middle half of the samples over their median; 0 for one sample."""
        samples = self.of()
        if len(samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return (high - low) / statistics.median(samples)


def ratio(mine: Timed, theirs: Timed, part: str | None = None) -> float:
    """Median over the repeats of mine / theirs within one repeat, so that a slow minute of the machine cancels."""
    return statistics.median(a / b for a, b in zip(mine.of(part), theirs.of(part), strict=True))


def interleave(
    runs: Mapping[str, Callable[[], Laps]],
    parts: Sequence[str],
    *,
    warmup: int,
    repeats: int,
    progress: Callable[[str], None],
) -> dict[str, Timed]:
    """Run everything once a round, each round starting one further on.

    Args:
        runs: by name; each returns the milliseconds of its parts.
        parts: their names.
        warmup: rounds that are not counted.
        repeats: rounds that are.
        progress: is told of each round.
    """
    names = list(runs)
    samples: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in names}
    gc.disable()  # between the rounds only, so that nobody pays for another's garbage
    try:
        for number in range(warmup + repeats):
            progress(f"warm-up {number + 1}/{warmup}" if number < warmup else f"repeat {number - warmup + 1}/{repeats}")
            gc.collect()
            first = number % len(names) if names else 0
            for name in names[first:] + names[:first]:
                laps = runs[name]()
                if number >= warmup:
                    for part, milliseconds in zip(parts, laps, strict=True):
                        samples[name][part].append(milliseconds)
    finally:
        gc.enable()
    return {name: Timed(found) for name, found in samples.items()}
