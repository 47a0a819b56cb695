"""The learning rate as a pure function of the step within a phase."""

import math

from lmoe.schema.optim import LrSchedule


def lr_factor(step: int, *, warmup: int, total: int, schedule: LrSchedule, min_ratio: float) -> float:
    """Share of the peak learning rate at a step.

    Linear warm-up (step + 1) / warmup, so that the first step already moves; then cosine (1608.03983), linear or
    constant over the remaining total - warmup steps, from 1 down to min_ratio.

    Args:
        step: optimizer steps done in this phase, from 0.
        warmup: steps of warm-up; clipped to total.
        total: steps of the phase.
        schedule: shape after the warm-up.
        min_ratio: share left at the end.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule is LrSchedule.constant:
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule is LrSchedule.cosine else 1.0 - done
    return min_ratio + (1 - min_ratio) * shape
