"""Which phase a step belongs to: a pure function, asked by everyone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from lmoe.config.phase import PLATEAU, PhaseConfig, PlateauConfig
from lmoe.config.run import RunConfig
from lmoe.rules.lessons import lesson_of
from lmoe.rules.objectives import has_dropout
from lmoe.rules.phase_options import target_coef
from lmoe.rules.phases import ordered_phases, share_base
from lmoe.training.handoff import Fades, Handoff
from lmoe.training.lr_schedule import LrShape, lr_factor
from lmoe.vocabulary import Role, RouteBy


@dataclass(slots=True, frozen=True, kw_only=True)
class Phase:
    """One span of optimizer steps.

    Args:
        name: as in the config.
        start, end: first step, and the first step after it.
        trainable: roles that train.
        lr: peak learning rate.
        warmup: steps of warm-up that are asked for.
        load_balance, router_z_loss, router_noise, expert_dropout, diversity: whether each is on.
        dropout: whether the objective trains with dropout and noise.
        lr_shape: what the learning rate does after the warm-up.
        aux_loss_coef, router_z_loss_coef: weights of the auxiliary losses; None: those of the model.
        router_target_coef: weight of the cross-entropy of what the routers are taught; 0: it is off.
        by_target: the experts train on the decision of the target, not of the router.
        router_every_n_steps: of the run, at which routers that train learn.
        layers: decoder layers whose parameters train, negative ones from the end; None: all.
        handoff: branches that fade out, over steps that a plateau or a longer run do not change.
        waits_for: the plateau that starts it before its `start`, which is then the latest; None: it has none, or has
            begun.
    """

    name: str
    start: int
    end: int
    trainable: frozenset[Role]
    lr: float
    warmup: int
    load_balance: bool
    router_z_loss: bool
    router_noise: bool
    expert_dropout: bool
    diversity: bool
    dropout: bool = True
    lr_shape: LrShape = field(default_factory=LrShape)
    aux_loss_coef: float | None = None
    router_z_loss_coef: float | None = None
    router_target_coef: float = 0.0
    by_target: bool = False
    router_every_n_steps: int = 1
    layers: tuple[int, ...] | None = None
    handoff: Handoff | None = None
    waits_for: PlateauConfig | None = None

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, at most the phase."""
        return min(self.warmup, self.steps)

    @property
    def steps(self) -> int:
        """Length of the phase in optimizer steps."""
        return self.end - self.start

    def trains_layer(self, layer: int | None, layers: int) -> bool:
        """Whether parameters in a decoder layer (None: outside all) of a model with so many train."""
        return self.layers is None or layer is None or layer in self.layers or layer - layers in self.layers

    def routers_rest(self, step: int) -> bool:
        """Whether routers do not learn at optimizer step `step` of the run, counted from 0."""
        return (step + 1) % self.router_every_n_steps != 0

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step of the phase."""
        return lr_factor(step, warmup=self.warmup_steps, total=self.steps, shape=self.lr_shape)


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
        planned = [*ends[:-1], share_base(config)]
        return cls(
            [
                _phase(name, start, end, Handoff.of(phase.lora_handoff, max(until - start, 1)), phase, config)
                for (name, start, phase), end, until in zip(entries, ends, planned, strict=True)
            ]
        )

    @property
    def end(self) -> int:
        """Optimizer steps of the whole run."""
        return self.phases[-1].end

    def phase_at(self, step: int) -> int:
        """Index of the phase that optimizer step `step` (from 0) belongs to; the last one after the end."""
        return max(index for index, phase in enumerate(self.phases) if step >= phase.start)

    def fades_at(self, step: int) -> Fades:
        """Scales of faded branches at optimizer step `step`; empty where no phase so far has a handoff."""
        fades: Fades = {}
        for phase in self.phases[: self.phase_at(step) + 1]:
            if (handoff := phase.handoff) is not None:
                scale = handoff.scale(min(step, phase.end - 1) - phase.start)
                experts = [None] if handoff.experts is None else handoff.experts
                fades[handoff.role] = (fades.get(handoff.role, {}) if handoff.experts else {}) | dict.fromkeys(
                    experts, scale
                )
        return fades

    def begun_at(self, starts: Mapping[str, int]) -> "PhaseSchedule":
        """The schedule with phases that waited for a plateau begun, at steps by name."""
        moved = [
            replace(phase, start=starts[phase.name], waits_for=None) if phase.name in starts else phase
            for phase in self.phases
        ]
        ends = [phase.start for phase in moved[1:]] + [moved[-1].end]
        return PhaseSchedule([replace(phase, end=end) for phase, end in zip(moved, ends, strict=True)])

    def starts(self) -> dict[str, int]:
        """First step of each phase by name."""
        return {phase.name: phase.start for phase in self.phases}

    def __getitem__(self, index: int) -> Phase:
        return self.phases[index]


def _phase(name: str, start: int, end: int, handoff: Handoff | None, phase: PhaseConfig, config: RunConfig) -> Phase:
    """One phase with its defaults filled in."""
    optim = config.optim
    routers, experts = Role.router in phase.trainable, Role.lora in phase.trainable
    dropout = has_dropout(lesson_of(config, name).task)
    auxiliary = _chosen(phase.auxiliary_loss, routers)
    return Phase(
        name=name,
        start=start,
        end=end,
        waits_for=phase.plateau if phase.start == PLATEAU else None,
        trainable=frozenset(phase.trainable),
        layers=None if phase.target_layers is None else tuple(phase.target_layers),
        lr=optim.lr if phase.lr is None else phase.lr,
        lr_shape=LrShape(
            schedule=phase.schedule or optim.schedule, min_ratio=optim.min_lr_ratio, decay_share=optim.decay_share
        ),
        warmup=optim.warmup_steps if phase.warmup_steps is None else phase.warmup_steps,
        handoff=handoff,
        aux_loss_coef=phase.aux_loss_coef,
        router_z_loss_coef=phase.router_z_loss_coef,
        router_target_coef=target_coef(phase, config.moe),
        by_target=phase.route_by is RouteBy.target,
        router_every_n_steps=phase.router_every_n_steps,
        load_balance=_chosen(phase.load_balance, auxiliary),
        router_z_loss=_chosen(phase.router_z_loss, auxiliary),
        router_noise=_chosen(phase.router_noise, routers and dropout),
        expert_dropout=_chosen(phase.expert_dropout, experts and dropout),
        diversity=_chosen(phase.diversity, experts),
        dropout=dropout,
    )


def _chosen(setting: bool | None, default: bool) -> bool:
    return default if setting is None else setting
