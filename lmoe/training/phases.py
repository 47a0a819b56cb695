"""Which phase a step belongs to: a pure function, asked by everyone."""

from dataclasses import dataclass
from itertools import pairwise

from lmoe.schema.phase import PhaseConfig, Role
from lmoe.schema.phase_rules import ordered_phases
from lmoe.schema.run import RunConfig


@dataclass(slots=True, frozen=True, kw_only=True)
class Phase:
    """One span of optimizer steps.

    Args:
        name: as in the config.
        start, end: first step, and the first step after it.
        trainable: roles that train.
        lr: peak learning rate.
        warmup_steps: steps of warm-up, at most the phase.
        load_balance, router_z_loss, router_noise, expert_dropout, diversity: whether each is on.
    """

    name: str
    start: int
    end: int
    trainable: frozenset[Role]
    lr: float
    warmup_steps: int
    load_balance: bool
    router_z_loss: bool
    router_noise: bool
    expert_dropout: bool
    diversity: bool

    @property
    def steps(self) -> int:
        """Length of the phase in optimizer steps."""
        return self.end - self.start


class PhaseSchedule:
    """The phases of a run, in order, without gaps.

    Args:
        phases: each starting where the one before ends, the first at 0.
    """

    def __init__(self, phases: list[Phase]) -> None:
        assert phases and phases[0].start == 0
        assert all(a.end == b.start for a, b in pairwise(phases))
        self.phases = tuple(phases)

    @classmethod
    def of(cls, config: RunConfig) -> "PhaseSchedule":
        """The schedule of a validated config."""
        entries = ordered_phases(config)
        ends = [start for _, start, _ in entries[1:]] + [config.trainer.max_steps]
        return cls(
            [_phase(name, start, end, phase, config) for (name, start, phase), end in zip(entries, ends, strict=True)]
        )

    def phase_at(self, step: int) -> int:
        """Index of the phase that optimizer step `step` (from 0) belongs to; the last one after the end."""
        return max(index for index, phase in enumerate(self.phases) if step >= phase.start)

    def starts(self) -> dict[str, int]:
        """First step of each phase by name."""
        return {phase.name: phase.start for phase in self.phases}

    def __getitem__(self, index: int) -> Phase:
        return self.phases[index]


def _phase(name: str, start: int, end: int, phase: PhaseConfig, config: RunConfig) -> Phase:
    """One phase with its defaults filled in."""
    warmup = config.optim.warmup_steps if phase.warmup_steps is None else phase.warmup_steps
    routers, experts = Role.router in phase.trainable, Role.lora in phase.trainable
    auxiliary = _chosen(phase.auxiliary_loss, routers)
    return Phase(
        name=name,
        start=start,
        end=end,
        trainable=frozenset(phase.trainable),
        lr=config.optim.lr if phase.lr is None else phase.lr,
        warmup_steps=min(warmup, end - start),
        load_balance=_chosen(phase.load_balance, auxiliary),
        router_z_loss=_chosen(phase.router_z_loss, auxiliary),
        router_noise=_chosen(phase.router_noise, routers),
        expert_dropout=_chosen(phase.expert_dropout, experts),
        diversity=_chosen(phase.diversity, experts),
    )


def _chosen(setting: bool | None, default: bool) -> bool:
    return default if setting is None else setting
