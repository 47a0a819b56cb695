"""What a checkpoint holds of the module: adapters and routers, the phase, gathered routing."""

from typing import TYPE_CHECKING, Any

import torch

from lmoe.errors import CheckpointError
from lmoe.injection.record import injected, tell_of_experts
from lmoe.injection.roles import adapter_buffers, adapter_parameters
from lmoe.training.handoff import set_fades
from lmoe.training.optimizers import state_names

if TYPE_CHECKING:
    from lmoe.training.sft_module import SftModule


def save_state(module: "SftModule", checkpoint: dict[str, Any]) -> None:
    """Add the module's entries, in place; every rank calls it."""
    keep = _saved_keys(module)
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
    checkpoint["lmoe_phase"] = module.current.name
    checkpoint["lmoe_begun"] = module.begun
    record = injected(module.model)
    checkpoint["lmoe_experts"] = {"names": list(record.expert_names), "kept": record.kept_experts}
    fades = module.schedule.fades_at(max(checkpoint["global_step"] - 1, 0))  # for the reader: they follow from the step
    checkpoint["lmoe_fades"] = {role.value: {str(e): f for e, f in scales.items()} for role, scales in fades.items()}
    checkpoint["lmoe_routing"] = {
        name: {state: module.over_ranks(torch.clone(sums)) for state, sums in stats.metric_state.items()}  # type: ignore[arg-type]
        for name, stats in {"step": module.step_routing, "recent": module.recent_routing}.items()
    }


def load_state(module: "SftModule", checkpoint: dict[str, Any]) -> None:
    """Restore the phase, which decides what the optimizer holds, and refuse what does not fit.

    Raises:
        CheckpointError: other adapters, phases or optimizer parameters than this run has.
    """
    own = _saved_keys(module)
    if differing := sorted(own ^ checkpoint["state_dict"].keys()):
        raise CheckpointError(f"the checkpoint holds other adapters than this run; first difference: {differing[0]}")
    module.begin(checkpoint["lmoe_begun"])
    experts = checkpoint.get("lmoe_experts", {"names": [], "kept": 0})  # checkpoints from before models could grow
    tell_of_experts(module.model, experts["names"], experts["kept"])
    names, phase = [phase.name for phase in module.schedule.phases], checkpoint.get("lmoe_phase")
    if phase not in names:
        raise CheckpointError(f"the checkpoint is in phase {phase!r}; this run has {names}")
    module.set_phase(names.index(phase))
    set_fades(module.model, module.schedule.fades_at(max(checkpoint["global_step"] - 1, 0)))
    if state_names(checkpoint["optimizer_states"][0]) != [list(group) for group in module.groups().values()]:
        raise CheckpointError(f"the checkpoint's optimizer holds other parameters than phase {phase}")
    if module.trainer.global_rank == 0:  # they are sums over all ranks
        module.step_routing.merge_state(checkpoint["lmoe_routing"]["step"])
        module.recent_routing.merge_state(checkpoint["lmoe_routing"]["recent"])


def _saved_keys(module: "SftModule") -> set[str]:
    """Adapters, routers and what moves with them: trainable or not, by role and not by requires_grad."""
    return {f"model.{name}" for name in (*adapter_parameters(module.model), *adapter_buffers(module.model))}
