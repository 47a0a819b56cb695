"""What a checkpoint holds of the module: adapters and routers, the phase, gathered routing."""

from typing import TYPE_CHECKING, Any

import torch

from lmoe.errors import CheckpointError
from lmoe.injection.record import injected, tell_of_experts
from lmoe.injection.roles import adapter_buffers, adapter_parameters
from lmoe.training.dials import set_dials
from lmoe.training.handoff import set_fades
from lmoe.training.optimizers import state_names

if TYPE_CHECKING:
    from lmoe.training.sft_module import SftModule


def save_state(module: "SftModule", checkpoint: dict[str, Any]) -> None:
    """Add the module's entries, in place; every rank calls it."""
    keep = _saved_tensors(module).keys()
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
    checkpoint["lmoe_base"] = injected(module.model).fingerprint
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
    """Restore what is not in a state_dict: the phase, which decides what the optimizer holds, fades, routing.

    Raises:
        CheckpointError: see restore_phase.
    """
    restore_phase(module, checkpoint)
    last = max(checkpoint["global_step"] - 1, 0)
    set_fades(module.model, module.schedule.fades_at(last))
    set_dials(injected(module.model), module.dials, module.current, last)
    if module.trainer.global_rank == 0:  # they are sums over all ranks
        module.step_routing.merge_state(checkpoint["lmoe_routing"]["step"])
        module.recent_routing.merge_state(checkpoint["lmoe_routing"]["recent"])


def restore_phase(module: "SftModule", checkpoint: dict[str, Any]) -> None:
    """Refuse what does not fit, before a weight or a moment is taken, and go to the phase; needs no trainer.

    Raises:
        CheckpointError: another backbone, or other adapters, phases or optimizer parameters than this run has.
    """
    own, stored = _saved_tensors(module), checkpoint["state_dict"]
    if differing := sorted(own.keys() ^ stored.keys()):
        raise CheckpointError(f"the checkpoint holds other adapters than this run; first difference: {differing[0]}")
    for name, tensor in own.items():
        if (got := tuple(stored[name].shape)) != (wanted := tuple(tensor.shape)):
            raise CheckpointError(f"the checkpoint's {name} has shape {got}, and this run's {wanted}")
    base = injected(module.model).fingerprint
    if checkpoint.get("lmoe_base") != base:
        raise CheckpointError(
            f"the checkpoint was trained on another backbone (fingerprint {checkpoint.get('lmoe_base')}, not {base})"
        )
    module.begin(checkpoint["lmoe_begun"])
    experts = checkpoint["lmoe_experts"]
    tell_of_experts(module.model, experts["names"], experts["kept"])  # what is kept does not train
    names, phase = [phase.name for phase in module.schedule.phases], checkpoint.get("lmoe_phase")
    if phase not in names:
        raise CheckpointError(f"the checkpoint is in phase {phase!r}; this run has {names}")
    module.set_phase(names.index(phase))
    groups, optimizer = module.groups(), checkpoint["optimizer_states"][0]
    if state_names(optimizer) != [list(group) for group in groups.values()]:
        raise CheckpointError(f"the checkpoint's optimizer holds other parameters than phase {phase}")
    parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
    for number, (name, parameter) in enumerate(parameters.items()):
        moments = optimizer["state"].get(number, {})  # none yet, if no gradient has reached the parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            if moments and tuple(moments[moment].shape) != tuple(parameter.shape):
                raise CheckpointError(f"the checkpoint's {moment} of {name} has another shape than the parameter")


def _saved_tensors(module: "SftModule") -> dict[str, torch.Tensor]:
    """Adapters, routers and what moves with them: trainable or not, by role and not by requires_grad."""
    tensors = {**adapter_parameters(module.model), **adapter_buffers(module.model)}
    return {f"model.{name}": tensor for name, tensor in tensors.items()}
