"""Which family goes together with which strategy."""

from lmoe.vocabulary import InjectionStrategy
from tests.tiny_models import DENSE_FAMILIES, NATIVE_FAMILIES

EVERY_FAMILY = (*DENSE_FAMILIES, *NATIVE_FAMILIES)
PAIRS = [(family, strategy) for family in EVERY_FAMILY for strategy in InjectionStrategy]


def why_refused(family: str, strategy: InjectionStrategy) -> str | None:
    """Part of the reason, or None where the two go together."""
    if strategy is InjectionStrategy.native_moe_expert_lora and family in DENSE_FAMILIES:
        return "is a dense backbone: none of the chosen layers has experts of its own. Use injection=mixture_lora or"
    if strategy is InjectionStrategy.moe_expert_lora and family in NATIVE_FAMILIES:
        return "this backbone is a mixture already: .* Use injection=native_moe_expert_lora"
    return None


WORKING = [pair for pair in PAIRS if why_refused(*pair) is None]
EXAMPLES = {
    InjectionStrategy.dense_lora: "qwen3",
    InjectionStrategy.mixture_lora: "qwen3",
    InjectionStrategy.moe_expert_lora: "qwen3",
    InjectionStrategy.native_moe_expert_lora: "qwen3_moe",
}
"""A plain family for each strategy."""
