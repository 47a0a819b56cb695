"""AdamW and its learning-rate schedule."""

from dataclasses import dataclass, field

from lmoe.vocabulary import LrSchedule


@dataclass(slots=True, kw_only=True)
class RoleOptimConfig:
    """What one role overrides; null takes the value of `optim`."""

    lr: float | None = None
    """Peak learning rate of the role's parameters, in every phase; null: that of the phase, else optim.lr."""
    weight_decay: float | None = None
    """Decoupled weight decay of the role's parameters; null: optim.weight_decay."""


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW (1711.05101), built anew at each phase boundary."""

    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors are not decayed."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates of the moment estimates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_steps: int = 10
    """Linear warm-up of each phase, in optimizer steps; clipped to the phase."""
    schedule: LrSchedule = LrSchedule.cosine
    """Shape after the warm-up, over the rest of the phase: cosine, linear, constant, or wsd: constant, then down."""
    decay_share: float = 0.2
    """wsd: share of the phase, after its warm-up, in which the learning rate goes down linearly."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of a phase, as a share of its peak."""
    lora_plus_ratio: float = 1.0
    """Learning rate of every lora_B over that of its lora_A (LoRA+ 2402.12354); above 1 B has a group of its own."""
    roles: dict[str, RoleOptimConfig] = field(default_factory=dict)
    """Overrides by role, e.g. optim.roles.router.lr=1e-3."""
