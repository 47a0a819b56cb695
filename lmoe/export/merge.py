"""Fold adapters into the backbone's weights, in place: exactly, or as the average of experts."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.backbones.own_weight import SharedWeightError, own_weight
from lmoe.backbones.placement import refuse_offloaded
from lmoe.errors import CheckpointError
from lmoe.injection.backbone_state import backbone_state
from lmoe.injection.record import injected, sites
from lmoe.injection.reward_head import refuse_reward_head
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.ops.lora import faded
from lmoe.ops.merge import average_branch, merged_weight
from lmoe.peft.expert_branches import refuse_what_is_no_branch, with_shared
from lmoe.peft.expert_file import Branch
from lmoe.rules.strategies import STRATEGIES


def merge_adapters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Fold dense_lora into the weights; the model still carries it and is of no more use.

    Returns:
        State dict of the backbone that computes what the model did, under its own names.

    Raises:
        CheckpointError: a strategy whose experts are chosen token by token, or a quantised or shared weight.
    """
    strategy = injected(model).injection.strategy
    if instead := STRATEGIES[strategy].instead_of_merging:
        raise CheckpointError(
            f"injection={strategy} chooses experts for each token or prompt, which no single weight does; {instead}"
        )
    refuse_reward_head(model, "a merged model")
    return _merged(model)


def merge_average(model: PreTrainedModel) -> dict[str, Tensor]:
    """The same for mixture_lora with W + mean_e s B_e A_e at each site, whatever its router says.

    Raises:
        CheckpointError: another strategy, what no branch on a Linear can express, or a quantised or shared weight.
    """
    refuse_what_is_no_branch(model)
    return _merged(model)


def _merged(model: PreTrainedModel) -> dict[str, Tensor]:
    refuse_offloaded(model, "merging adapters")
    found = {path: _weight(model, path, site.base_layer) for path, site in sites(model)}  # a refusal changes nothing
    with torch.no_grad():
        for path, site in sites(model):
            assert isinstance(site, LoRALinear | MixtureLoRALinear)
            branch, magnitude = branch_of(site), magnitude_of(site)
            merged = merged_weight(found[path], branch.lora_A, branch.lora_B, branch.scaling, magnitude)
            found[path].copy_(merged)
    return backbone_state(model)


def branch_of(site: LoRALinear | MixtureLoRALinear) -> Branch:
    """What a site adds; of a mixture the average."""
    if isinstance(site, LoRALinear):
        return Branch(site.lora_A, faded(site.lora_B, site.fade), site.scaling)
    return with_shared(site, *average_branch(*site.factors()))


def magnitude_of(site: LoRALinear | MixtureLoRALinear) -> Tensor | None:
    """Row lengths of DoRA; None: it has none."""
    return site.lora_magnitude if isinstance(site, LoRALinear) and site.use_dora else None


def _weight(model: PreTrainedModel, path: str, base_layer: torch.nn.Module) -> Tensor:
    try:
        return own_weight(model, path, base_layer)
    except SharedWeightError as shared:
        raise CheckpointError(
            f"{path} shares its weight with {shared.other}, which merging would change too; use `export_peft` or "
            "`export_peft_experts`"
        ) from None
    except ValueError:
        raise CheckpointError(
            f"{path} is quantised, and a merged weight would be another one than the adapters were trained on; use "
            "`export_peft` or `export_peft_experts`"
        ) from None
