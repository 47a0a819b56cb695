"""What of a config keeps its experts from being a mixture of Transformers' own; which family has one is asked later."""

from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.rules.routers import ROUTERS, mixture_scale
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import LoadBalanceType, MixtureScale, RouterScope

AS_IT_IS = "or use the adapter as it is: `lmoe.load` runs it"


def native_export_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    """Everything that a gate with the top_k largest of a softmax, weights that sum to 1 and E whole FFNs cannot do."""
    strategy = STRATEGIES[injection.strategy]
    if strategy.why_no_native:
        return [f"injection={injection.strategy} {strategy.why_no_native}"]
    if not strategy.own_routers:
        return []
    return _router_problems(injection, moe) + _expert_problems(injection)


def _router_problems(injection: InjectionConfig, moe: MoeConfig) -> list[str]:
    assert moe.router is not None
    problems, scale = [], mixture_scale(moe, injection)
    if why := ROUTERS[moe.router].why_no_native:
        fitting = " or ".join(kind for kind, router in ROUTERS.items() if not router.why_no_native)
        problems.append(
            f"moe.router={moe.router} {why}, and a mixture of Transformers' own takes the injection.top_k largest of "
            f"a softmax for each token: train with moe.router={fitting}, {AS_IT_IS}"
        )
    elif scale is not MixtureScale.sum_to_one and not (scale is MixtureScale.unit and injection.top_k == 1):
        problems.append(f"moe.scale={scale}: the weights must sum to 1; train with moe.scale=sum_to_one, {AS_IT_IS}")
    if moe.load_balance.type is LoadBalanceType.aux_loss_free:
        problems.append(
            "moe.load_balance.type=aux_loss_free chooses by a bias beside the scores, and there is no place for it: "
            f"train with moe.load_balance.type=aux_loss, {AS_IT_IS}"
        )
    if moe.router_bias:
        problems.append(
            "moe.router_bias=true adds a bias to the logits, and there is no place for it: train with "
            f"moe.router_bias=false, {AS_IT_IS}"
        )
    if moe.router_scope not in (RouterScope.linear, RouterScope.block):
        problems.append(
            f"moe.router_scope={moe.router_scope}: each FFN must have a gate of its own; train with moe=top_k, "
            f"{AS_IT_IS}"
        )
    return problems


def _expert_problems(injection: InjectionConfig) -> list[str]:
    problems, counts = [], injection.num_experts_by_layer
    if counts is not None and len(set(counts)) > 1:
        problems.append(
            f"injection.num_experts_by_layer={counts}: every layer must have as many experts; train with "
            f"injection.num_experts alone, {AS_IT_IS}"
        )
    if injection.shared_lora_r:
        problems.append(
            f"injection.shared_lora_r={injection.shared_lora_r} is an expert that is always on, beside the FFN, and "
            f"there is no place for it: train without it, {AS_IT_IS}"
        )
    return problems
