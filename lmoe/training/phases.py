"""Which phase a step belongs to: a pure function, asked by everyone."""

from dataclasses import dataclass
from itertools import pairwise

from lmoe.schema.phase import Role
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
        auxiliary_loss: whether the auxiliary losses are added to the training loss.
    """

    name: str
    start: int
    end: int
    trainable: frozenset[Role]
    lr: float
    warmup_steps: int
    auxiliary_loss: bool

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
            [
                Phase(
                    name=name,
                    start=start,
                    end=end,
                    trainable=frozenset(phase.trainable),
                    lr=config.optim.lr if phase.lr is None else phase.lr,
                    warmup_steps=min(
                        config.optim.warmup_steps if phase.warmup_steps is None else phase.warmup_steps, end - start
                    ),
                    auxiliary_loss=Role.router in phase.trainable
                    if phase.auxiliary_loss is None
                    else phase.auxiliary_loss,
                )
                for (name, start, phase), end in zip(entries, ends, strict=True)
            ]
        )

    def phase_at(self, step: int) -> int:
        """Index of the phase that optimizer step `step` (from 0) belongs to; the last one after the end."""
        return max(index for index, phase in enumerate(self.phases) if step >= phase.start)

    def starts(self) -> dict[str, int]:
        """First step of each phase by name."""
        return {phase.name: phase.start for phase in self.phases}

    def __getitem__(self, index: int) -> Phase:
        return self.phases[index]
