"""Problems of `injection`, some of which depend on the router."""

from lmoe.config.injection import InjectionConfig
from lmoe.config.limits import MOST_BRANCHES
from lmoe.config.moe import MoeConfig
from lmoe.config.problems import above_zero, at_least, without_effect
from lmoe.rules.experts_from import experts_from_problems, source_router_problems
from lmoe.rules.routers import ROUTERS, mixture_scale, needs_domain
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import CHOSEN_ALONE, InitLora, LoadBalanceType, MixtureScale, RouterTarget


def injection_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Problems of `injection`, some of which depend on the router."""
    problems = (
        at_least(injection.lora_r, 1, "injection.lora_r")
        + at_least(injection.num_experts, 1, "injection.num_experts")
        + at_least(injection.top_k, 1, "injection.top_k")
        + at_least(injection.start_layer, 0, "injection.start_layer")
        + at_least(injection.num_layers, 0, "injection.num_layers")
        + above_zero(injection.lora_alpha, "injection.lora_alpha")
    )
    if not 0 <= injection.lora_dropout < 1:
        problems.append(f"injection.lora_dropout is {injection.lora_dropout}, must be from 0 to below 1")
    if injection.shared_lora_r is not None and injection.shared_lora_r < 1:
        problems.append(f"injection.shared_lora_r is {injection.shared_lora_r}, must be null or at least 1")
    for name, values in (
        ("num_experts_by_layer", injection.num_experts_by_layer),
        ("lora_r_by_layer", injection.lora_r_by_layer),
    ):
        if values is not None and (not values or min(values) < 1):
            problems.append(f"injection.{name} is {values}, must be null or a list of numbers of at least 1")
    problems += at_least(injection.stride, 1, "injection.stride") + _layer_problems(injection)
    problems += _branch_problems(injection)
    if injection.target_keywords == [] and not STRATEGIES[injection.strategy].attention_alone:
        problems.append("injection.target_keywords is empty; name Linears, or null for every FFN Linear of the family")
    if injection.num_experts_by_layer and injection.num_experts != InjectionConfig().num_experts:
        problems.append(
            "injection.num_experts has no effect beside injection.num_experts_by_layer; leave one of them out"
        )
    if injection.lora_r_by_layer and injection.lora_r != InjectionConfig().lora_r and not _default_rank_acts(injection):
        problems.append("injection.lora_r has no effect beside injection.lora_r_by_layer; leave one of them out")
    problems += _idle_problems(injection) + _init_problems(injection) + _attn_lora_problems(injection)
    problems += experts_from_problems(injection) or source_router_problems(injection, moe)
    return problems + (_choice_problems(injection, moe) if STRATEGIES[injection.strategy].own_routers else [])


def _branch_problems(injection: InjectionConfig) -> list[str]:
    """The problem of more low-rank branches than a site can hold."""
    if not STRATEGIES[injection.strategy].own_routers:
        return []
    experts = injection.most_experts
    rank = max(injection.lora_r_by_layer or [injection.lora_r])
    if experts * rank <= MOST_BRANCHES:
        return []
    return [
        f"{experts} experts of rank {rank} make {experts * rank} rows of lora_A at a site, must be at most "
        f"{MOST_BRANCHES}; lower injection.num_experts or injection.lora_r"
    ]


def _layer_problems(injection: InjectionConfig) -> list[str]:
    indices, usual = injection.layer_indices, InjectionConfig()
    if indices is None:
        return []
    if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
        return [f"injection.layer_indices is {indices}, must be null or a list of different numbers from 0"]
    return [
        without_effect(f"injection.{key}", "beside injection.layer_indices")
        for key in ("start_layer", "num_layers", "stride")
        if getattr(injection, key) != getattr(usual, key)
    ]


def _idle_problems(injection: InjectionConfig) -> list[str]:
    """Settings that the user changed and that the strategy has no use for."""
    usual, strategy = InjectionConfig(), injection.strategy
    problems = [
        without_effect(f"injection.{key}", f"with injection={strategy}")
        for key in STRATEGIES[strategy].idle
        if getattr(injection, key) != getattr(usual, key)
    ]
    if STRATEGIES[strategy].attention_alone and injection.target_keywords == []:
        if not injection.attn_lora.enabled:
            problems.append(
                "injection.target_keywords=[] and injection.attn_lora.enabled=false leave nothing to adapt; "
                "set one of them"
            )
        if injection.lora_r_by_layer:
            problems.append(without_effect("injection.lora_r_by_layer", "with injection.target_keywords=[]"))
    return problems


def _default_rank_acts(injection: InjectionConfig) -> bool:
    """Whether injection.lora_r is still the rank of something beside lora_r_by_layer."""
    return injection.attn_lora.enabled and injection.attn_lora.lora_r is None


def _init_problems(injection: InjectionConfig) -> list[str]:
    problems = []
    if injection.lora_B_std is not None and injection.lora_B_std < 0:
        problems.append(f"injection.lora_B_std is {injection.lora_B_std}, must be null or at least 0")
    if injection.init_lora is InitLora.svd:
        if injection.lora_B_std:
            problems.append(without_effect("injection.lora_B_std", "with injection.init_lora=svd, which sets lora_B"))
        if injection.shared_lora_A:
            problems.append(
                "injection.init_lora=svd gives each expert its own singular directions, and "
                "injection.shared_lora_A=true leaves one lora_A for all; use one of them"
            )
    return problems


def _choice_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Problems of how many experts are chosen."""
    if moe.router is None:
        return []
    problems, router = [], f"with moe.router={moe.router}"
    traits, fewest = ROUTERS[moe.router], injection.fewest_experts
    if traits.top_k and injection.top_k > fewest >= 1:
        problems.append(
            f"injection.top_k is {injection.top_k}, more than the {fewest} experts of a site; "
            f"lower it or raise injection.num_experts"
        )
    if not traits.top_k and injection.top_k != InjectionConfig().top_k:
        problems.append(without_effect("injection.top_k", f"{router}, {traits.why_no_top_k}"))
    named, by_name = len(moe.domains or []), needs_domain(moe) or moe.router_target is not RouterTarget.none
    if by_name and named > fewest >= 1:
        problems.append(
            f"moe.domains has {named} names, and a site has {fewest} experts; set injection.num_experts={named} or more"
        )
    if moe.diversity_coef and fewest == 1:
        problems.append(without_effect("moe.diversity_coef", "on a site with one expert"))
    if moe.backend in CHOSEN_ALONE and injection.shared_lora_A:
        problems.append(f"moe.backend={moe.backend} cannot compute injection.shared_lora_A=true; use stacked or auto")
    problems += _whole_ffn_problems(injection, moe)
    if not traits.fixed_k or injection.top_k != 1:
        return problems
    if mixture_scale(moe, injection) is MixtureScale.sum_to_one:
        key, untaught, cure = "norm_topk_prob=true", "", "null or false"
        if not moe.norm_topk_prob:
            key, untaught, cure = "scale=sum_to_one", f" and moe.router_target={moe.router_target}", "raw or unit"
        problems.append(
            f"moe.{key} with injection.top_k=1{untaught} makes every weight 1 and gives the router no gradient; "
            f"set it to {cure}, or top_k to at least 2"
        )
    if fewest == 1 and moe.load_balance.type is LoadBalanceType.aux_loss_free:
        problems.append("moe.load_balance.type=aux_loss_free has nothing to balance with one expert; use type=none")
    return problems


def _whole_ffn_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Where experts are whole FFNs, weights which do not sum to 1 would scale the backbone itself."""
    if not STRATEGIES[injection.strategy].whole_ffn or moe.router is None:
        return []
    scale, one = mixture_scale(moe, injection), ROUTERS[moe.router].fixed_k and injection.top_k == 1
    if not ROUTERS[moe.router].scales or scale is MixtureScale.sum_to_one or (one and scale is MixtureScale.unit):
        return []
    return [
        f"injection={injection.strategy} needs routing weights that sum to 1, which those of "
        f"moe.router={moe.router} with scale={scale} do not: they would scale the frozen FFN. "
        "Use scale=sum_to_one (with top_k=1 unit), or injection=mixture_lora"
    ]


def _attn_lora_problems(injection: InjectionConfig) -> list[str]:
    attention = injection.attn_lora
    given = {
        "keywords": attention.keywords,
        "lora_r": attention.lora_r,
        "lora_alpha": attention.lora_alpha,
        "use_dora": attention.use_dora or None,
    }
    problems = []
    if not attention.enabled:
        problems += [
            without_effect(f"injection.attn_lora.{name}", "with injection.attn_lora.enabled=false")
            for name, value in given.items()
            if value is not None
        ]
    if attention.keywords == []:
        problems.append("injection.attn_lora.keywords is empty; set injection.attn_lora.enabled=false instead")
    if attention.lora_r is not None:
        problems += at_least(attention.lora_r, 1, "injection.attn_lora.lora_r")
    return problems + above_zero(attention.lora_alpha, "injection.attn_lora.lora_alpha")
