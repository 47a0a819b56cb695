"""Strategy mixture_lora: each chosen Linear becomes a mixture of LoRA experts; attention may carry a single LoRA."""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lmoe.backbones.layout import LayerLayout, default_attention_keywords, layouts
from lmoe.errors import InjectionError
from lmoe.injection.plan import InjectionPlan, SitePlan
from lmoe.schema.injection import InjectionConfig
from lmoe.schema.moe import LoadBalanceType, MoeConfig, RouterKind, RouterScope
from lmoe.schema.phase import Role
from lmoe.schema.router_traits import TRAITS, active_experts


def plan_mixture_lora(model: nn.Module, injection: InjectionConfig, moe: MoeConfig) -> InjectionPlan:
    """Choose the sites.

    Raises:
        InjectionError: layers out of range, a keyword that matches nothing, a Linear named twice, or native experts.
        BackboneError: no recognisable decoder layers.
    """
    every_layer = layouts(model)
    chosen = _chosen_layers(every_layer, injection)
    warnings: list[str] = []
    mixtures = _match(chosen, injection.target_keywords, "injection.target_keywords", lambda layer: layer.ffn, warnings)
    if not mixtures:
        raise InjectionError(_nothing(chosen, "injection.target_keywords", "FFN Linear"))
    singles = _attention(chosen, injection, warnings)
    if both := sorted(mixtures.keys() & singles.keys()):
        raise InjectionError(
            f"{both[0]} is named by both injection.target_keywords and injection.attn_lora.keywords; "
            "take it out of one of them"
        )
    _refuse_shared({**mixtures, **singles})
    shared = injection.shared_lora_r
    attention, sites, routers = injection.attn_lora, [], set()
    for where, layer in enumerate(chosen):
        num_experts = spread(injection.num_experts_by_layer, where, len(chosen)) or injection.num_experts
        lora_r = spread(injection.lora_r_by_layer, where, len(chosen)) or injection.lora_r
        for path, linear in {**layer.attention, **layer.ffn}.items():
            single = path not in mixtures
            if single and path not in singles:
                continue
            rank = (attention.lora_r or injection.lora_r) if single else lora_r
            alpha = injection.lora_alpha
            if single and attention.lora_alpha is not None:
                alpha = attention.lora_alpha
            site = SitePlan(
                path=path,
                layer=layer.index,
                role=Role.attn_lora if single else Role.lora,
                in_features=linear.in_features,
                out_features=linear.out_features,
                lora_r=rank,
                lora_alpha=alpha,
                scaling=lora_scaling(alpha, rank, injection.use_rslora),
                use_dora=single and attention.use_dora,
            )
            if not single:
                router, width = path, linear.in_features
                if moe.router_scope is RouterScope.block:
                    router = path.rpartition(".")[0]
                    width = _block_width(layer, router)
                site = replace(
                    site,
                    num_experts=num_experts,
                    active_experts=active_experts(moe, injection, num_experts),
                    router=router,
                    router_in_features=width,
                    router_parameters=0 if router in routers else router_parameters(moe, num_experts, width),
                    shared_lora_r=shared or 0,
                    shared_scaling=lora_scaling(injection.lora_alpha, shared, injection.use_rslora) if shared else 0.0,
                    shared_lora_A=injection.shared_lora_A,
                )
                routers.add(router)
            sites.append(site)
    warnings += _constant_balance(sites, moe)
    return InjectionPlan(sites=tuple(sites), warnings=tuple(warnings))


def _block_width(layer: LayerLayout, block: str) -> int:
    """Features that go into a block: those of its first Linear."""
    return next(
        linear.in_features
        for path, linear in (*layer.attention.items(), *layer.ffn.items())
        if path.rpartition(".")[0] == block
    )


def lora_scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / r (2106.09685), or alpha / sqrt(r) (rsLoRA, 2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def router_parameters(moe: MoeConfig, num_experts: int, in_features: int) -> int:
    """Parameters of one router."""
    if moe.router is None or not TRAITS[moe.router].trains:
        return 0
    return num_experts * in_features * (2 if moe.router is RouterKind.noisy_top_k else 1)


def spread(values: list[int] | None, position: int, length: int) -> int | None:
    """The value of a layer when a short list is spread evenly over the layers (MoLA, 2402.08562)."""
    return values[position * len(values) // length] if values else None


def _chosen_layers(layers: list[LayerLayout], injection: InjectionConfig) -> list[LayerLayout]:
    start, count = injection.start_layer, injection.num_layers
    if start >= len(layers):
        raise InjectionError(f"injection.start_layer={start}, but the backbone has layers 0 to {len(layers) - 1}")
    if start + count > len(layers):
        raise InjectionError(
            f"injection.start_layer={start} and num_layers={count} reach beyond the last layer, {len(layers) - 1}"
        )
    chosen = layers[start : start + count] if count else layers[start:]
    for name in ("num_experts_by_layer", "lora_r_by_layer"):
        values = injection.num_experts_by_layer if name == "num_experts_by_layer" else injection.lora_r_by_layer
        if values and len(values) > len(chosen):
            raise InjectionError(f"injection.{name} has {len(values)} values for {len(chosen)} layers; give fewer")
    return chosen


def _refuse_shared(linears: dict[str, nn.Linear]) -> None:
    """
    Raises:
        InjectionError: one Linear stands at two paths, so that a site would run more than once in a forward.
    """
    paths: dict[int, str] = {}
    for path, linear in linears.items():
        first = paths.setdefault(id(linear), path)
        if first != path:
            raise InjectionError(
                f"{first} and {path} are one and the same module; experts in layers that share weights are not "
                "supported: choose layers with injection.start_layer and num_layers, or other Linears"
            )


def _constant_balance(sites: list[SitePlan], moe: MoeConfig) -> list[str]:
    """A warning if the load_balancing_loss of a site cannot change: every expert gets every token."""
    balance = moe.load_balance
    if balance.type is not LoadBalanceType.aux_loss or not balance.aux_loss_coef:
        return []
    if moe.router is None or not TRAITS[moe.router].fixed_k:
        return []
    full = [site.path for site in sites if site.num_experts and site.active_experts == site.num_experts]
    if not full:
        return []
    return [
        f"moe.load_balance.aux_loss_coef has no effect at {len(full)} sites, first {full[0]}: "
        "top_k is the number of experts, so every load is equal"
    ]


def _attention(layers: list[LayerLayout], injection: InjectionConfig, warnings: list[str]) -> dict[str, nn.Linear]:
    if not injection.attn_lora.enabled:
        return {}
    keywords = injection.attn_lora.keywords
    if keywords is None and not (keywords := default_attention_keywords(layers)):
        warnings.append("attention carries no LoRA: no q and v or fused qkv Linear was found")
        return {}
    return _match(layers, keywords, "injection.attn_lora.keywords", lambda layer: layer.attention, warnings)


def _match(
    layers: list[LayerLayout],
    keywords: list[str] | None,
    key: str,
    default: Callable[[LayerLayout], dict[str, nn.Linear]],
    warnings: list[str],
) -> dict[str, nn.Linear]:
    """Linears that the keywords name: by the last part of their path, or by a longer dotted ending."""
    if keywords is None:
        without = [layer.index for layer in layers if not default(layer)]
        if without and len(without) < len(layers):
            warnings.append(
                f"{key}: {len(layers) - len(without)} of {len(layers)} layers have such Linears; "
                f"layers {without} stay without"
            )
        return {path: linear for layer in layers for path, linear in default(layer).items()}
    matched: dict[str, nn.Linear] = {}
    for keyword in keywords:
        hits = {
            layer.index: {p: m for p, m in {**layer.ffn, **layer.attention}.items() if f".{p}".endswith(f".{keyword}")}
            for layer in layers
        }
        covered = sum(1 for found in hits.values() if found)
        if not covered:
            raise InjectionError(_nothing(layers, key, repr(keyword)))
        if covered < len(layers):
            missing = [index for index, found in hits.items() if not found]
            warnings.append(
                f"{key}: {keyword!r} is in {covered} of {len(layers)} layers ({covered / len(layers):.0%}); "
                f"layers {missing} stay without"
            )
        for found in hits.values():
            matched.update(found)
    return matched


def _nothing(layers: list[LayerLayout], key: str, what: str) -> str:
    native = next((layer.native_experts for layer in layers if layer.native_experts), None)
    if native and what == "FFN Linear":
        return (
            f"this backbone is already a mixture: its experts are fused in {native}, so there is no FFN Linear for "
            f"mixture_lora; name Linears of the attention in {key}"
        )
    names = sorted({p.rsplit(".", 1)[-1] for layer in layers for p in (*layer.ffn, *layer.attention)})
    return f"{key}: {what} matches nothing; Linears in the chosen layers: {', '.join(names) or 'none'}"
