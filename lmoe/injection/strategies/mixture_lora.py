"""Strategy mixture_lora: each chosen Linear becomes a mixture of LoRA experts; attention may carry a single LoRA."""

from dataclasses import replace

from torch import nn

from lmoe.backbones.layout import LayerLayout
from lmoe.errors import InjectionError
from lmoe.injection.choose import every_linear, nothing_found, refuse_shared, target_linears
from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.injection.site_plans import SitePlanner, lora_scaling
from lmoe.ops.linear_sizes import sizes
from lmoe.vocabulary import RouterScope


def plan_mixture_lora(planner: SitePlanner) -> list[SitePlan]:
    """Plan a mixture of LoRA experts on each chosen Linear, and single LoRA on attention.

    Raises:
        InjectionError: a keyword that matches nothing, a Linear named twice, or no FFN.
    """
    injection, layers, key = planner.injection, planner.layers, "injection.target_keywords"
    blocks = {} if injection.target_keywords is not None else _native_blocks(layers)
    dense = [layer for layer in layers if layer.index not in blocks]
    targets = target_linears(dense, injection, lambda layer: layer.ffn, planner.warnings) if dense else {}
    if not targets and not blocks:
        raise InjectionError(nothing_found(layers, key, "FFN Linear"))
    if blocks:
        planner.warnings.append(
            f"the experts of {len(blocks)} layers are fused, first {next(iter(blocks.values()))}: there a mixture sits "
            "beside the block, with one router; name Linears in injection.target_keywords to adapt those, or use "
            "injection=native_moe_expert_lora for the fused experts"
        )
    planner.refuse_twice(targets)
    planner.refuse_inside(blocks.values())
    whole = {path: planner.model.get_submodule(path) for path in blocks.values()}
    refuse_shared({**targets, **whole, **planner.attention})
    sites: list[SitePlan] = []
    for where, layer in enumerate(layers):
        own = {path: linear for path, linear in targets.items() if path.startswith(f"{layer.path}.")}
        sites += planner.attention_sites(layer)
        sites += _mixtures(planner, layer, own, where)
        if layer.index in blocks:
            sites.append(_beside(planner, layer, blocks[layer.index], where))
    return sites


def _native_blocks(layers: list[LayerLayout]) -> dict[int, str]:
    """Paths of the backbone's own mixtures that stand in place of a dense FFN, by layer."""
    found = {layer.index: layer.native.block for layer in layers if layer.native and not layer.ffn}
    return {index: block for index, block in found.items() if block is not None}


def _mixtures(planner: SitePlanner, layer: LayerLayout, linears: dict[str, nn.Module], where: int) -> list[SitePlan]:
    """Sites of the Linears of one layer."""
    injection, seen, sites = planner.injection, set(), []
    shared = injection.shared_lora_r
    for path, linear in linears.items():
        site = planner.site(path, layer, sizes(linear), SiteKind.mixture, planner.rank(where))
        router, width = path, site.in_features
        if planner.moe.router_scope is RouterScope.block:
            router = path.rpartition(".")[0]
            width = _block_width(layer, router)
        site = planner.routed(site, where, router=router, router_in_features=width, owner=router not in seen)
        seen.add(router)
        sites.append(
            replace(
                site,
                shared_lora_r=shared or 0,
                shared_scaling=lora_scaling(injection.lora_alpha, shared, injection.use_rslora) if shared else 0.0,
                shared_lora_A=injection.shared_lora_A,
            )
        )
    return sites


def _beside(planner: SitePlanner, layer: LayerLayout, block: str, where: int) -> SitePlan:
    """A mixture beside a block that is no Linear."""
    assert layer.native is not None
    injection, shared = planner.injection, planner.injection.shared_lora_r
    width = int(planner.model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    site = planner.site(block, layer, (width, width), SiteKind.beside, planner.rank(where))
    return replace(
        planner.routed(site, where, router=block, router_in_features=width, owner=True),
        shared_lora_r=shared or 0,
        shared_scaling=lora_scaling(injection.lora_alpha, shared, injection.use_rslora) if shared else 0.0,
        shared_lora_A=injection.shared_lora_A,
    )


def _block_width(layer: LayerLayout, block: str) -> int:
    """Features that go into a block: those of its first Linear."""
    return next(sizes(linear)[0] for path, linear in every_linear(layer).items() if path.rpartition(".")[0] == block)
