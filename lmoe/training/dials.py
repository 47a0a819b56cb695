"""What training turns on the routers: temperature, noise and expert dropout, by step and phase."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe.config.phase import start_step
from lmoe.config.run import RunConfig
from lmoe.injection.record import Injected
from lmoe.rules.phases import share_base
from lmoe.training.phases import Phase


@dataclass(slots=True, frozen=True, kw_only=True)
class Dials:
    """Values over the optimizer steps of a run: a straight line from the first to the last, then level.

    Args:
        temperature, router_noise: (first, last).
        anneal_steps: optimizer steps that the line takes: the last of them has the last value.
        expert_dropout: constant.
    """

    temperature: tuple[float, float]
    router_noise: tuple[float, float]
    anneal_steps: int
    expert_dropout: float

    @classmethod
    def of(cls, config: RunConfig) -> "Dials":
        """The dials of a validated config."""
        moe = config.moe
        return cls(
            temperature=_ends(moe.temperature, moe.temperature_end),
            router_noise=_ends(moe.router_noise, moe.router_noise_end),
            anneal_steps=start_step(moe.anneal_steps or "100%", share_base(config)),
            expert_dropout=moe.expert_dropout,
        )

    def at(self, ends: tuple[float, float], step: int) -> float:
        """A value at optimizer step `step`, counted from 0."""
        done = min(step / (self.anneal_steps - 1), 1.0) if self.anneal_steps > 1 else 1.0
        return ends[0] + (ends[1] - ends[0]) * done


def set_dials(record: Injected, dials: Dials, phase: Phase, step: int, *, as_tensors: bool = False) -> None:
    """Turn the dials of a model to their values at a step.

    Args:
        record: of the model.
        dials: over the whole run.
        phase: which of them are on.
        step: from 0.
        as_tensors: give those that move as tensors too, for compiled code.
    """
    context = record.context
    context.temperature = dials.at(dials.temperature, step)
    context.noise = phase.dropout
    context.router_noise = dials.at(dials.router_noise, step) if phase.router_noise else 0.0
    context.expert_dropout = dials.expert_dropout if phase.expert_dropout else 0.0
    context.by_target = phase.by_target
    context.routers_rest = phase.routers_rest(step)
    if as_tensors:
        context.moving_temperature = _moving(dials.temperature, context.temperature)
        context.moving_router_noise = _moving(dials.router_noise, context.router_noise) if phase.router_noise else None


def _moving(ends: tuple[float, float], value: float) -> Tensor | None:
    """A value as a tensor, (); None where it stands still."""
    return None if ends[0] == ends[1] else torch.tensor(value)


def _ends(first: float, last: float | None) -> tuple[float, float]:
    return first, first if last is None else last
