"""Fade low-rank branches out while the FFN beneath them trains: a pure function of the step."""

import math
from dataclasses import dataclass

from torch import nn

from lmoe.config.phase import HandoffConfig, start_step
from lmoe.injection.record import low_rank
from lmoe.layers.lora_linear import LoRALinear, LowRank
from lmoe.vocabulary import Curve, Role


@dataclass(slots=True, frozen=True, kw_only=True)
class Handoff:
    """How low-rank branches fade in one phase.

    Args:
        role: whose branches fade.
        experts: which of them; None: all.
        end_scale: scale at the end, from 1.
        steps: optimizer steps until then.
        curve: shape.
    """

    role: Role
    experts: tuple[int, ...] | None
    end_scale: float
    steps: int
    curve: Curve

    @classmethod
    def of(cls, config: HandoffConfig, phase_steps: int) -> "Handoff | None":
        """The handoff of a validated config, in a phase of so many steps; None: there is none."""
        if config.role is None:
            return None
        return cls(
            role=config.role,
            experts=None if config.experts is None else tuple(config.experts),
            end_scale=config.end_scale,
            steps=start_step(config.steps, phase_steps),
            curve=config.curve,
        )

    def ramp(self, step: int) -> float:
        """Share of the handoff that is done: above 0 at the first step of the phase (step 0), 1 at the last one of the
        handoff."""
        done = min((step + 1) / self.steps, 1.0)
        return done if self.curve is Curve.linear else 0.5 * (1 - math.cos(math.pi * done))

    def scale(self, step: int) -> float:
        """What is left of the branches at a step of the phase."""
        return 1.0 + (self.end_scale - 1.0) * self.ramp(step)


Fades = dict[Role, dict[int | None, float]]
"""Scale of the branches of a role by expert; under None that of all the others."""


def set_fades(model: nn.Module, fades: Fades, *, as_tensors: bool = False) -> None:
    """Give each low-rank branch of an injected model its scale; roles that are not named keep theirs.

    Args:
        model: injected.
        fades: scales of this step.
        as_tensors: for compiled code, which a number would have to be compiled anew for.
    """
    for _, role, module in low_rank(model) if fades else ():
        scales = fades.get(role)
        if scales is None:
            continue
        rest = scales.get(None, 1.0)
        one_branch = isinstance(module, LoRALinear | LowRank)
        if one_branch or (len(scales) == 1 and None in scales and not as_tensors):
            module.fade = module.lora_B.new_tensor(rest) if as_tensors else rest
        else:
            experts = module.lora_B.shape[0]
            module.fade = module.lora_B.new_tensor([scales.get(expert, rest) for expert in range(experts)])
