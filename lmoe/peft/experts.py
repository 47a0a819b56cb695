"""Each expert of a mixture as a PEFT adapter of its own."""

from pathlib import Path

from torch import nn

from lmoe.injection.record import injected, new_names, sites
from lmoe.peft.expert_branches import expert_branches, refuse_what_is_no_branch
from lmoe.peft.files import are_conv1d
from lmoe.peft.writer import write_expert


def save_peft_experts(model: nn.Module, folder: Path, *, base_model: str) -> dict[str, Path]:
    """Write an adapter for each expert, which makes `peft` compute what the mixture does when it decides alone.

    Args:
        model: injected with mixture_lora.
        folder: gets a folder by the name of each expert, `expert<e>` where they have none.
        base_model: hub name or directory of the backbone.

    Returns:
        The folders by name.

    Raises:
        CheckpointError: what an adapter cannot hold, or a folder that cannot be written.
    """
    refuse_what_is_no_branch(model)
    record = injected(model)
    names = list(record.expert_names) or new_names([], max(record.plan.routers.values()))
    conv1d = are_conv1d(site.base_layer for _, site in sites(model))
    return {
        name: write_expert(expert_branches(model, expert), folder / name, base_model=base_model, fan_in_fan_out=conv1d)
        for expert, name in enumerate(names)
    }
