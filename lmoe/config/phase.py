"""Phases: spans of optimizer steps, each with its own trainable roles."""

from dataclasses import dataclass, field
from typing import Any

from lmoe.config.shares import share_of
from lmoe.vocabulary import Curve, LrSchedule, PhaseMode, Role, RouteBy

PLATEAU = "plateau"
"""Start of a phase that begins when a metric no longer improves."""


@dataclass(slots=True, kw_only=True)
class PlateauConfig:
    """When a phase with start=plateau begins: the metric has not fallen for a while."""

    monitor: str = "val/loss"
    """Metric that should fall: val/loss, val/<domain>/loss, looked at after each validation, or train/loss."""
    patience: int = 3
    """Looks without improvement that make a plateau."""
    min_delta: float = 0.0
    """By how much a look must be below the best one to be an improvement."""
    every_n_steps: int = 10
    """train/loss: optimizer steps of which one look is the mean."""
    latest: str = "50%"
    """The phase begins here at the latest: optimizer step, or share of trainer.max_steps. The schedule of the phase
    before is laid out up to here."""


@dataclass(slots=True, kw_only=True)
class HandoffConfig:
    """Fade low-rank branches out while the phase trains the FFN they sit on (base_ffn), whose learning rate is ramped
    in by the same curve."""

    role: Role | None = None
    """Whose scale fades: lora or attn_lora; null: none."""
    experts: list[int] | None = None
    """With lora: only these experts; null: all."""
    end_scale: float = 0.0
    """Scale at the end, from 1; it stays for the rest of the run, and is part of the adapter that is written."""
    steps: str = "100%"
    """Optimizer steps that it takes, or a share of the phase."""
    curve: Curve = Curve.linear
    """linear or cosine."""


@dataclass(slots=True, kw_only=True)
class PhaseConfig:
    """One phase; its optimizer and learning-rate schedule are its own."""

    start: str = "0"
    """First optimizer step, or a share of trainer.max_steps such as 20%, rounded up; plateau: see plateau."""
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    """With start=plateau."""
    task: dict[str, Any] = field(default_factory=dict)
    """What the phase learns, as the section task: {name: dpo, beta: 0.1}; keys that are left out are those of task
    where its name is the same, else the objective's own. Empty: task."""
    data: dict[str, Any] = field(default_factory=dict)
    """Rows of the phase, as the section data: {path: bundled_preference, batch_size: 4}; keys that are left out are
    those of data, but of rows that it names itself it takes no columns, domains and val_path. Empty: data."""
    trainable: list[Role] = field(default_factory=list)
    """Roles that train: router, lora, attn_lora, base_ffn, head. Everything else is frozen. reward_head trains in
    phases of task reward, whether it is named here or not, and in no other."""
    mode: PhaseMode = PhaseMode.replace
    """replace: these roles alone; add: these and those that trained in the phase before."""
    lr: float | None = None
    """Peak learning rate of the phase, for roles without one of their own in optim.roles; null: optim.lr."""
    warmup_steps: int | None = None
    """Warm-up of the phase in optimizer steps, clipped to the phase; null: optim.warmup_steps."""
    schedule: LrSchedule | None = None
    """Shape of the learning rate after the warm-up: cosine, linear, constant, wsd; null: optim.schedule."""
    target_layers: list[int] | None = None
    """Indices of the decoder layers whose parameters train, negative ones from the end; null: all. head
    and reward_head are in none."""
    lora_handoff: HandoffConfig = field(default_factory=HandoffConfig)
    """Fade low-rank branches out while base_ffn trains."""
    aux_loss_coef: float | None = None
    """Weight of the load_balancing_loss in this phase; null: moe.load_balance.aux_loss_coef."""
    router_z_loss_coef: float | None = None
    """Weight of the router_z_loss in this phase; null: moe.router_z_loss_coef."""
    router_target_coef: float | None = None
    """Weight of the cross-entropy of moe.router_target in this phase; null: moe.router_target_coef where the phase
    trains routers, else 0."""
    route_by: RouteBy = RouteBy.router
    """Whose decision the experts train on: router; target: that of moe.router_target, by which experts are dealt to
    domains or clusters. Validation and inference always go by the router."""
    router_every_n_steps: int = 1
    """With route_by=target and moe.router_scope=model: the router learns at each n-th step of the run; in the others it
    reads no prompts, as far as each row has a target with an expert of its own."""
    auxiliary_loss: bool | None = None
    """Default of load_balance and router_z_loss; null: only where the phase trains routers (a frozen router would push
    its balance into the experts)."""
    load_balance: bool | None = None
    """Balance the load, by moe.load_balance and relu's L1; null: auxiliary_loss."""
    router_z_loss: bool | None = None
    """Add the router_z_loss; null: auxiliary_loss."""
    router_noise: bool | None = None
    """Add moe.router_noise to the logits; null: only where the phase trains routers."""
    expert_dropout: bool | None = None
    """Leave experts out by moe.expert_dropout; null: only where the phase trains lora."""
    diversity: bool | None = None
    """Add the diversity penalty; null: only where the phase trains lora."""


@dataclass(slots=True, kw_only=True)
class PhaseScheduleConfig:
    """Named phases; the one with the smallest start comes first and must start at 0."""

    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """By name, so that phase.phases.taught.lr=1e-3 works."""
    of_steps: int | None = None
    """Optimizer steps that shares of phases and moe.anneal_steps are of; null: trainer.max_steps. A run that is made
    longer keeps its first length here, so that nothing that has begun moves."""


def start_step(start: str, max_steps: int) -> int:
    """Optimizer step at which a phase starts.

    Raises:
        ValueError: neither a whole number >= 0 nor a share from 0% to 100%.
    """
    text = str(start).strip()
    try:
        step = share_of(text, max_steps)
        if step is None:
            step = int(text)
        if step < 0:
            raise ValueError
        return step
    except ValueError:
        raise ValueError(f"got {start!r}; allowed: an optimizer step such as 500, or a share such as 20%") from None


def planned_start(phase: PhaseConfig, max_steps: int) -> int:
    """Optimizer step at which a phase starts; one that waits for a plateau: at the latest.

    Raises:
        ValueError: as start_step.
    """
    return start_step(phase.plateau.latest if phase.start == PLATEAU else phase.start, max_steps)
