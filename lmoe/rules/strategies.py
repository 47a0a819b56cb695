"""Each strategy's declaration: what it has, what can be done with its experts, where its planner is.

To add a strategy: a member of InjectionStrategy, an entry here, a planner in lmoe/injection/strategies, and
conf/injection/<name>.yaml; a new kind of site also needs its layer, and its place in lmoe/injection/build_site.py.
"""

from dataclasses import dataclass

from lmoe.vocabulary import InjectionStrategy


@dataclass(slots=True, frozen=True, kw_only=True)
class StrategyDeclaration:
    """One strategy.

    Args:
        planner: dotted name of the function that names the sites of the chosen layers.
        description: what docs/CONFIG.md says of it.
        own_routers: it makes routers, so that the section `moe` decides how experts are chosen.
        any_routers: there are routers to train and to balance, made or found.
        whole_ffn: an expert is a whole FFN, so that routing weights scale the backbone's own work too.
        attention_alone: injection.target_keywords may be empty, which leaves the LoRA of the attention.
        idle: keys of `injection` that it has no use for.
        idle_moe: keys of `moe` that it has no use for, though it makes routers.
        native_moe: keys of `moe` that act on routers that it has not made.
        why_no_adapters: why no adapter can become one of its experts; "": its experts are LoRA adapters on Linears,
            which are imported, added, masked, taken out, averaged and exported one by one.
        peft_adapter: one PEFT adapter holds what it has learnt.
        why_no_native: why its experts are not those of a mixture of Transformers' own, and what to do; "" where they
            are.
        instead_of_merging: what to do where its experts cannot be folded into the weights, nor, without peft_adapter,
            be one PEFT adapter; "" where they can.
    """

    planner: str
    description: str
    own_routers: bool = True
    any_routers: bool = True
    whole_ffn: bool = False
    attention_alone: bool = False
    idle: tuple[str, ...] = ()
    idle_moe: tuple[str, ...] = ()
    native_moe: tuple[str, ...] = ()
    why_no_adapters: str = ""
    peft_adapter: bool = False
    why_no_native: str = ""
    instead_of_merging: str = ""

    @property
    def adapter_experts(self) -> bool:
        """Whether each of its experts is a LoRA adapter on Linears."""
        return not self.why_no_adapters


EXPERTS = ("num_experts", "top_k", "num_experts_by_layer")
KINDS_OF_MIXTURE = ("shared_lora_r", "shared_lora_A", "init_lora")
BALANCE = (
    "load_balance.type",
    "load_balance.aux_loss_coef",
    "load_balance.scope",
    "load_balance.bias_update_rate",
)
STRATEGIES = {
    InjectionStrategy.dense_lora: StrategyDeclaration(
        planner="lmoe.injection.strategies.dense_lora.plan_dense_lora",
        description="a single LoRA on each chosen Linear",
        own_routers=False,
        any_routers=False,
        attention_alone=True,
        idle=(*EXPERTS, *KINDS_OF_MIXTURE, "lora_B_std", "share_base"),
        why_no_adapters="has no experts",
        peft_adapter=True,
        why_no_native="has no experts; merge it with `export_merged`",
    ),
    InjectionStrategy.mixture_lora: StrategyDeclaration(
        planner="lmoe.injection.strategies.mixture_lora.plan_mixture_lora",
        description="each chosen Linear becomes a mixture of LoRA experts, behind a router of its own, of its block or "
        "of the whole model",
        idle=("share_base",),
        why_no_native="has branches on single Linears as experts, and such a mixture has whole FFNs: export them with "
        "`export_peft_experts`, or merge their average, without routing, with `average=True`",
        instead_of_merging="export the experts with `export_peft_experts`, or merge their average, without routing, "
        "with `average=True`",
    ),
    InjectionStrategy.moe_expert_lora: StrategyDeclaration(
        planner="lmoe.injection.strategies.moe_expert_lora.plan_moe_expert_lora",
        description="each FFN becomes experts that are the whole FFN with LoRA, behind one router (MixLoRA 2404.15159)",
        whole_ffn=True,
        idle=KINDS_OF_MIXTURE,
        idle_moe=("router_scope", "mixing", "backend"),
        why_no_adapters="has whole FFNs as experts, and an adapter may act on any Linear",
        instead_of_merging="use the adapter as it is: `lmoe.load` runs it, or write it as a mixture of Transformers' "
        "own with `export_native_moe`",
    ),
    InjectionStrategy.native_moe_expert_lora: StrategyDeclaration(
        planner="lmoe.injection.strategies.native_moe_expert_lora.plan_native_moe_expert_lora",
        description="LoRA on each expert of a backbone that is a mixture already",
        own_routers=False,
        idle=(*EXPERTS, *KINDS_OF_MIXTURE, "share_base"),
        native_moe=("router_z_loss_coef", "diversity_coef", *BALANCE),
        why_no_adapters="has the experts of the backbone",
        peft_adapter=True,
        instead_of_merging="write the backbone's own mixture with it in its weights with `export_native_moe`",
    ),
}


def with_adapter_experts() -> str:
    """Names of the strategies whose experts are LoRA adapters, as a message lists them."""
    return " or ".join(name for name, strategy in STRATEGIES.items() if strategy.adapter_experts)


def with_peft_adapter() -> str:
    """Names of the strategies that one PEFT adapter can hold, as a message lists them."""
    return " and ".join(name for name, strategy in STRATEGIES.items() if strategy.peft_adapter)
