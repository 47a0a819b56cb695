"""What each router has, so that settings that cannot act on it are refused."""

from dataclasses import dataclass

from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.vocabulary import InjectionStrategy, LoadBalanceType, MixtureScale, RouterKind

Balance, Scale = LoadBalanceType, MixtureScale
ANY_BALANCE = (Balance.aux_loss, Balance.aux_loss_free, Balance.importance_cv, Balance.none)
LOSSES = (Balance.aux_loss, Balance.importance_cv, Balance.none)
ANY_SCALE = (Scale.sum_to_one, Scale.unit, Scale.raw)
DENSE_SCALE = (Scale.sum_to_one, Scale.unit)


@dataclass(slots=True, frozen=True, kw_only=True)
class RouterTraits:
    """One router's traits.

    Args:
        logits: it computes router logits, so that the z-loss, noise and expert dropout can act.
        trains: it has parameters.
        top_k: injection.top_k acts (relu: as the mean number of active experts that its L1 aims at).
        fixed_k: every token gets exactly top_k experts; what the grouped backend needs.
        softmax: moe.temperature acts.
        scales: allowed values of moe.scale.
        balances: allowed values of moe.load_balance.type.
    """

    logits: bool = True
    trains: bool = True
    top_k: bool = True
    fixed_k: bool = True
    softmax: bool = True
    scales: tuple[MixtureScale, ...] = ANY_SCALE
    balances: tuple[LoadBalanceType, ...] = ANY_BALANCE


NO_BALANCE = (Balance.none,)
TRAITS = {
    RouterKind.top_k: RouterTraits(),
    RouterKind.soft: RouterTraits(top_k=False, fixed_k=False, scales=DENSE_SCALE, balances=LOSSES),
    RouterKind.top_p: RouterTraits(top_k=False, fixed_k=False, balances=LOSSES),
    RouterKind.sigmoid: RouterTraits(),
    # sum_to_one would leave its L1 nothing to shrink
    RouterKind.relu: RouterTraits(fixed_k=False, softmax=False, scales=(Scale.raw, Scale.unit), balances=LOSSES),
    RouterKind.noisy_top_k: RouterTraits(),
    RouterKind.sequence: RouterTraits(),
    RouterKind.uniform: RouterTraits(
        logits=False, trains=False, top_k=False, fixed_k=False, softmax=False, scales=DENSE_SCALE, balances=NO_BALANCE
    ),
    RouterKind.random: RouterTraits(trains=False, balances=NO_BALANCE),
    RouterKind.oracle: RouterTraits(
        logits=False, trains=False, top_k=False, fixed_k=False, softmax=False, scales=(), balances=NO_BALANCE
    ),
}


def mixture_scale(moe: MoeConfig, injection: InjectionConfig) -> MixtureScale:
    """The scale that acts: moe.norm_topk_prob or moe.scale, or the default of the router."""
    if moe.norm_topk_prob is not None:
        return MixtureScale.sum_to_one if moe.norm_topk_prob else MixtureScale.raw
    if moe.scale is not None:
        return moe.scale
    one = moe.router is not None and TRAITS[moe.router].fixed_k and injection.top_k == 1
    if one and injection.strategy is InjectionStrategy.moe_expert_lora:
        return MixtureScale.unit  # a weight below 1 would shrink the whole FFN
    return MixtureScale.raw if one or moe.router is RouterKind.relu else MixtureScale.sum_to_one


def active_experts(moe: MoeConfig, injection: InjectionConfig, num_experts: int) -> int:
    """Experts that work on one token; of top_p, which varies, the most."""
    if moe.router is RouterKind.oracle:
        return 1
    return injection.top_k if moe.router is not None and TRAITS[moe.router].top_k else num_experts


def trains_logits(moe: MoeConfig) -> bool:
    """Whether the router has logits that learn, so that the z-loss can act."""
    return moe.router is not None and TRAITS[moe.router].logits and TRAITS[moe.router].trains
