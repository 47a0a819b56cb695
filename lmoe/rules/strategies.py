"""What each strategy has, so that settings that cannot act on it are refused."""

from dataclasses import dataclass

from lmoe.vocabulary import InjectionStrategy


@dataclass(slots=True, frozen=True, kw_only=True)
class StrategyTraits:
    """One strategy's traits.

    Args:
        own_routers: it makes routers, so that the section `moe` decides how experts are chosen.
        any_routers: there are routers to train and to balance, made or found.
        idle: keys of `injection` that it has no use for.
        idle_moe: keys of `moe` that it has no use for, though it makes routers.
        native_moe: keys of `moe` that act on routers that it has not made.
    """

    own_routers: bool = True
    any_routers: bool = True
    idle: tuple[str, ...] = ()
    idle_moe: tuple[str, ...] = ()
    native_moe: tuple[str, ...] = ()


EXPERTS = ("num_experts", "top_k", "num_experts_by_layer")
KINDS_OF_MIXTURE = ("shared_lora_r", "shared_lora_A", "init_lora")
BALANCE = (
    "load_balance.type",
    "load_balance.aux_loss_coef",
    "load_balance.scope",
    "load_balance.bias_update_rate",
)
STRATEGY_TRAITS = {
    InjectionStrategy.dense_lora: StrategyTraits(
        own_routers=False, any_routers=False, idle=(*EXPERTS, *KINDS_OF_MIXTURE, "lora_B_std", "share_base")
    ),
    InjectionStrategy.mixture_lora: StrategyTraits(idle=("share_base",)),
    InjectionStrategy.moe_expert_lora: StrategyTraits(
        idle=KINDS_OF_MIXTURE, idle_moe=("router_scope", "mixing", "backend")
    ),
    InjectionStrategy.native_moe_expert_lora: StrategyTraits(
        own_routers=False,
        idle=(*EXPERTS, *KINDS_OF_MIXTURE, "share_base"),
        native_moe=("router_z_loss_coef", "diversity_coef", *BALANCE),
    ),
}
