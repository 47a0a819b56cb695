"""The strategies by name: one file each, one line here."""

from collections.abc import Callable

from lmoe.injection.plan import SitePlan
from lmoe.injection.site_plans import SitePlanner
from lmoe.injection.strategies.dense_lora import plan_dense_lora
from lmoe.injection.strategies.mixture_lora import plan_mixture_lora
from lmoe.injection.strategies.moe_expert_lora import plan_moe_expert_lora
from lmoe.injection.strategies.native_moe_expert_lora import plan_native_moe_expert_lora
from lmoe.vocabulary import InjectionStrategy

STRATEGIES: dict[InjectionStrategy, Callable[[SitePlanner], list[SitePlan]]] = {
    InjectionStrategy.dense_lora: plan_dense_lora,
    InjectionStrategy.mixture_lora: plan_mixture_lora,
    InjectionStrategy.moe_expert_lora: plan_moe_expert_lora,
    InjectionStrategy.native_moe_expert_lora: plan_native_moe_expert_lora,
}
"""Each names the sites of the chosen layers, and adds to the planner's warnings."""
