"""AdamW with a group for each role, and its schedule, for one phase."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lmoe.config.optim import OptimConfig
from lmoe.training.phases import Phase
from lmoe.vocabulary import Role

NamedParameters = dict[str, nn.Parameter]


LORA_B_GROUP, VECTORS_GROUP = "_B", "_vectors"
"""Endings of the groups that hold a role's lora_B, where LoRA+ sets it apart, and its biases and magnitudes."""


def trainable_groups(
    parameters: NamedParameters, roles: Mapping[str, Role], optim: OptimConfig
) -> dict[str, NamedParameters]:
    """The parameters that require gradients, by group, in the order of Role and of the model.

    A group is a role; with LoRA+ lora_B has one of its own, <role>_B, and so have vectors, <role>_vectors.
    """
    apart = optim.lora_plus_ratio != 1

    def ending(name: str, parameter: nn.Parameter) -> str:
        if parameter.dim() < 2 or name.endswith("bias"):  # those of stacked experts have two dimensions
            return VECTORS_GROUP
        return LORA_B_GROUP if apart and name.endswith(".lora_B") else ""

    groups: dict[str, NamedParameters] = {}
    for role in Role:
        for name, parameter in parameters.items():
            if roles[name] is role and parameter.requires_grad:
                groups.setdefault(role.value + ending(name, parameter), {})[name] = parameter
    return groups


def role_of(group: str) -> str:
    """The role whose parameters a group holds."""
    return group.removesuffix(LORA_B_GROUP).removesuffix(VECTORS_GROUP)


def build_optimizer(groups: dict[str, NamedParameters], phase: Phase, optim: OptimConfig) -> AdamW:
    """AdamW (1711.05101) with named groups; parameters carry their names into the state dict. Vectors do not decay."""
    entries = []
    for group, parameters in groups.items():
        override = optim.roles.get(role_of(group))
        lr = override.lr if override and override.lr is not None else phase.lr
        if group.endswith(LORA_B_GROUP):
            lr *= optim.lora_plus_ratio
        decay = override.weight_decay if override and override.weight_decay is not None else optim.weight_decay
        decay = 0.0 if group.endswith(VECTORS_GROUP) else decay
        entries.append({"params": list(parameters.items()), "lr": lr, "weight_decay": decay, "name": group})
    beta1, beta2 = optim.betas
    return AdamW(entries, lr=phase.lr, betas=(beta1, beta2), eps=optim.eps)


def build_scheduler(optimizer: AdamW, phase: Phase) -> LambdaLR:
    """Warm-up and decay over the phase; step 0 is the first step of the phase. A handoff ramps base_ffn in."""
    handoff = phase.handoff

    def ramped(step: int) -> float:
        return phase.lr_factor(step) * (1.0 if handoff is None else handoff.ramp(step))

    is_base = [role_of(group["name"]) == Role.base_ffn.value for group in optimizer.param_groups]
    return LambdaLR(optimizer, [ramped if base else phase.lr_factor for base in is_base])


def set_learning_rates(trainer: Trainer) -> None:
    """Set the learning rates of the schedulers' own step: what a run without a break would have, to the bit."""
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        assert isinstance(scheduler, LambdaLR)
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)


def carry_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> int:
    """Keep AdamW's moments of parameters that stay trainable across a boundary.

    Returns:
        How many parameters kept theirs.
    """
    kept = 0
    for group in new.param_groups:
        for parameter in group["params"]:
            if state := old.state.get(parameter):
                new.state[parameter] = state
                kept += 1
    return kept


def state_names(optimizer_state: dict) -> list[list[str]]:
    """Parameter names of each group of a saved optimizer."""
    return [group.get("param_names", []) for group in optimizer_state["param_groups"]]
