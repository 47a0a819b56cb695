"""The low-rank branches that work when one expert of a mixture decides alone.

Shapes: D in, O out, R rank.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lmoe.errors import CheckpointError
from lmoe.injection.plan import SiteKind
from lmoe.injection.record import injected, sites
from lmoe.injection.reward_head import refuse_reward_head
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.ops.lora import faded
from lmoe.ops.merge import side_by_side
from lmoe.peft.expert_file import Branch
from lmoe.rules.strategies import STRATEGIES, with_adapter_experts


def expert_branches(model: nn.Module, expert: int) -> dict[str, Branch]:
    """What the model computes with when every routing weight is 1 on one expert and 0 elsewhere, by module path.

    Attention's single LoRA and a shared expert are part of it; of init_lora=svd the start is taken off.

    Args:
        model: injected with mixture_lora; a site without this expert is left out.
        expert: its number.

    Raises:
        CheckpointError: another strategy, a trained backbone, DoRA, or a mixture beside a block.
    """
    refuse_what_is_no_branch(model)
    found = {}
    for path, site in sites(model):
        if isinstance(site, LoRALinear):
            found[path] = Branch(site.lora_A.data, faded(site.lora_B.data, site.fade), site.scaling)
        else:
            assert isinstance(site, MixtureLoRALinear)
            if expert >= site.settings.num_experts:
                continue
            found[path] = _of_mixture(site, expert)
    return found


def _of_mixture(site: MixtureLoRALinear, expert: int) -> Branch:
    lora_A, lora_B = (factor.detach() for factor in site.factors())
    return with_shared(site, lora_A[0 if len(lora_A) == 1 else expert], lora_B[expert])


def mean_branches(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Branch]:
    """What the model computes with where every token has the same routing weights, by module path.

    Attention's single LoRA and a shared expert are part of it.

    Args:
        model: injected with mixture_lora.
        weights: (E,) of each site of routing.

    Raises:
        CheckpointError: another strategy, a trained backbone, DoRA, or a mixture beside a block.
    """
    refuse_what_is_no_branch(model)
    router_of = {site.path: site.router for site in injected(model).plan.sites}
    found = {}
    for path, site in sites(model):
        if isinstance(site, LoRALinear):
            found[path] = Branch(site.lora_A.data, faded(site.lora_B.data, site.fade), site.scaling)
            continue
        assert isinstance(site, MixtureLoRALinear)
        lora_A, lora_B = (factor.detach() for factor in site.factors())
        scaling, shares = site.settings.scaling, weights[router_of[path]].tolist()
        every = [(lora_A[0 if len(lora_A) == 1 else e], lora_B[e], scaling * share) for e, share in enumerate(shares)]
        found[path] = with_shared(site, *side_by_side(every, scaling))
    return found


def with_shared(site: MixtureLoRALinear, lora_A: Tensor, lora_B: Tensor) -> Branch:
    """A branch beside the shared expert of its site, if it has one.

    Args:
        site: the mixture.
        lora_A: (R, D).
        lora_B: (O, R), at the scaling of the site's experts.
    """
    scaling, shared = site.settings.scaling, site.shared_expert
    if shared is None:
        return Branch(lora_A, lora_B, scaling)
    always = (shared.lora_A.data, faded(shared.lora_B.data, shared.fade), shared.scaling)
    return Branch(*side_by_side([(lora_A, lora_B, scaling), always], scaling), scaling)


def refuse_what_is_no_branch(model: nn.Module) -> None:
    """Refuse a model with parts that are no low-rank branches.

    Raises:
        CheckpointError: what low-rank branches on the backbone's Linears cannot express.
    """
    record = injected(model)
    if not STRATEGIES[record.injection.strategy].adapter_experts:
        declared = STRATEGIES[record.injection.strategy]
        instead = "export it with `export_peft`" if declared.peft_adapter else declared.instead_of_merging
        raise CheckpointError(
            f"injection={record.injection.strategy} has no experts that are adapters; {with_adapter_experts()} has. "
            f"Instead, {instead}"
        )
    if record.trained_base:
        raise CheckpointError(
            f"{', '.join(sorted(record.trained_base))} of the backbone was trained too; an adapter cannot hold it"
        )
    refuse_reward_head(model, "what is written")
    if record.injection.attn_lora.enabled and record.injection.attn_lora.use_dora:
        raise CheckpointError(
            "injection.attn_lora.use_dora=true is on attention only; a PEFT adapter has it on all or none"
        )
    if beside := [site.path for site in record.plan.sites if site.kind is SiteKind.beside]:
        raise CheckpointError(f"the mixture at {beside[0]} sits beside a block, and an adapter acts on Linears")
