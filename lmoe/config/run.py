"""The whole of one training run."""

from dataclasses import dataclass, field
from typing import Any

from lmoe.config.analysis import AnalysisConfig
from lmoe.config.backbone import BackboneConfig
from lmoe.config.checkpoint import CheckpointConfig
from lmoe.config.data import DataConfig
from lmoe.config.injection import InjectionConfig
from lmoe.config.logger import LoggerConfig
from lmoe.config.moe import MoeConfig
from lmoe.config.optim import OptimConfig
from lmoe.config.phase import PhaseScheduleConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.vocabulary import DryRun, PreferenceLoss, Reference, TaskName


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """What is learnt (docs/OBJECTIVES.md). A key that is null has the objective's own default."""

    name: TaskName = TaskName.sft
    """sft: the tokens of the assistant; dpo, orpo, simpo: which of two answers is preferred; kto: which answers are
    good ones, and which are bad; reward: a number for an answer, the higher the more it is preferred."""
    beta: float | None = None
    """dpo, kto: how closely the policy is held to its reference; simpo: scale of the margin; orpo: weight of the odds
    ratio (lambda in the paper). Default 0.1, simpo 2."""
    label_smoothing: float | None = None
    """dpo: assumed share of pairs with swapped answers, from 0 to below 0.5. Default 0."""
    loss_type: PreferenceLoss | None = None
    """dpo: sigmoid, hinge or ipo. Default sigmoid."""
    gamma: float | None = None
    """simpo: margin that is aimed at. Default 1."""
    good_weight: float | None = None
    """kto: weight of good answers. Default 1."""
    bad_weight: float | None = None
    """kto: weight of bad answers. Default 1."""
    reference: Reference | None = None
    """dpo, kto: what the policy is measured against. base: the backbone with the adapters off; start: the model as it
    is when the phase begins, of which the adapters are kept. Default base."""
    precompute_reference: bool | None = None
    """dpo, kto: compute the log-probabilities of the reference once, and keep them beside the tokenised rows. Default
    false."""
    dropout: bool | None = None
    """All but sft: train with dropout, router noise and expert dropout, which are off otherwise. Default false."""


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Every section of a run; groups of conf/ fill them."""

    name: str = "default"
    """Name of the run; part of its folder's path and its W&B name."""
    seed: int = 0
    """Seed of initial weights, data order, split and dropout."""
    resume: str | None = None
    """Run directory to continue, with its saved config; auto: hydra.run.dir, where it holds a run, else a new one."""
    dry_run: DryRun = DryRun.none
    """config: validate only; estimate: plan, memory and time from the backbone's config alone, without weights and
    data; preflight: build everything, one forward and backward, memory and time, plan."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    phase: PhaseScheduleConfig = field(default_factory=PhaseScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """More Lightning callbacks by name, each with a _target_ under lightning.pytorch.callbacks or callbacks_from."""
    callbacks_from: str | None = None
    """Module, or file my_callbacks.py, whose classes callbacks may name: its code is run, so it counts only where this
    command line gives it, is not saved, and is given again with resume."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
