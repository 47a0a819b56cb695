"""Which family goes together with which strategy."""

from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import InjectionStrategy
from tests.tiny_models import DENSE_FAMILIES, NATIVE_FAMILIES

EVERY_FAMILY = (*DENSE_FAMILIES, *NATIVE_FAMILIES)
PAIRS = [(family, strategy) for family in EVERY_FAMILY for strategy in InjectionStrategy]


def adapts_native(strategy: InjectionStrategy) -> bool:
    """Whether it adapts a mixture that the backbone is already."""
    return STRATEGIES[strategy].any_routers and not STRATEGIES[strategy].own_routers


def why_refused(family: str, strategy: InjectionStrategy) -> str | None:
    """Part of the reason, or None where the two go together."""
    if adapts_native(strategy) and family in DENSE_FAMILIES:
        return "is a dense backbone: none of the chosen layers has experts of its own. Use injection=mixture_lora or"
    if STRATEGIES[strategy].whole_ffn and family in NATIVE_FAMILIES:
        return "this backbone is a mixture already: .* Use injection=native_moe_expert_lora"
    return None


WORKING = [pair for pair in PAIRS if why_refused(*pair) is None]
EXAMPLES = {strategy: "qwen3_moe" if adapts_native(strategy) else "qwen3" for strategy in InjectionStrategy}
"""A plain family for each strategy."""
