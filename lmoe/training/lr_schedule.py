"""The learning rate as a pure function of the step within a phase."""

import math
from dataclasses import dataclass

from lmoe.vocabulary import LrSchedule


@dataclass(slots=True, frozen=True, kw_only=True)
class LrShape:
    """What a learning rate does over a phase.

    Args:
        schedule: shape after the warm-up.
        min_ratio: share of the peak left at the end.
        decay_share: wsd: share of the steps after the warm-up that go down.
    """

    schedule: LrSchedule = LrSchedule.cosine
    min_ratio: float = 0.0
    decay_share: float = 0.2


def lr_factor(step: int, *, warmup: int, total: int, shape: LrShape) -> float:
    """Share of the peak learning rate at a step.

    Linear warm-up (step + 1) / warmup, so that the first step already moves; then over the remaining total - warmup
    steps, from 1 down to min_ratio: cosine (1608.03983), linear, or wsd (warm-up, stable, decay: MiniCPM 2404.06395,
    section 4, here with a linear decay: 2405.18392 finds its shape of little weight); constant stays at 1.

    Args:
        step: optimizer steps done in this phase, from 0.
        warmup: steps of warm-up; clipped to total.
        total: steps of the phase.
        shape: of the schedule.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    match shape.schedule:
        case LrSchedule.constant:
            return 1.0
        case LrSchedule.cosine:
            left = 0.5 * (1 + math.cos(math.pi * done))
        case LrSchedule.linear:
            left = 1.0 - done
        case LrSchedule.wsd:
            left = min((1.0 - done) / shape.decay_share, 1.0)
    return shape.min_ratio + (1 - shape.min_ratio) * left
