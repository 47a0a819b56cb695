"""Strategy moe_expert_lora: each chosen FFN becomes E experts, the whole FFN with its own LoRA, behind one router."""

import math
from dataclasses import replace

from torch import Tensor, nn

from lmoe.backbones.layout import LayerLayout
from lmoe.errors import InjectionError
from lmoe.injection.choose import refuse_shared
from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.injection.site_plans import SitePlanner
from lmoe.ops.linear_sizes import sizes
from lmoe.vocabulary import InjectionStrategy

WHOLE_UNIT = 8
"""Numbers of two bytes that fill the 16 bytes that rows of a grouped matmul are made of."""


def plan_moe_expert_lora(planner: SitePlanner) -> list[SitePlan]:
    """Plan experts in place of each chosen FFN, and single LoRA on attention.

    Raises:
        InjectionError: the backbone is a mixture already, an FFN has unknown parts or sizes, or a keyword matches
            nothing.
    """
    layers = planner.layers
    native = next((layer.native for layer in layers if layer.native), None)
    dense = [layer for layer in layers if layer.ffn_block is not None and layer.native is None]
    if native is not None and len(dense) < len(layers):
        raise InjectionError(
            f"this backbone is a mixture already: {native.experts} holds its experts. Use "
            f"injection={InjectionStrategy.native_moe_expert_lora}, or choose its dense layers "
            f"({', '.join(str(layer.index) for layer in dense) or 'it has none'}) with injection.layer_indices"
        )
    sites: list[SitePlan] = []
    adapted = _adapted(planner)
    blocks = [layer.ffn_block.path for layer in layers if layer.ffn_block is not None]
    planner.refuse_inside(blocks)
    refuse_shared({**{path: planner.model.get_submodule(path) for path in blocks}, **planner.attention})
    for where, layer in enumerate(layers):
        sites += planner.attention_sites(layer)
        sites.append(_site(planner, layer, where, adapted))
    return sites


def _site(planner: SitePlanner, layer: LayerLayout, where: int, adapted: set[str] | None) -> SitePlan:
    block = layer.ffn_block
    if block is None or not block.whole:
        raise InjectionError(
            f"layer {layer.index}: {InjectionStrategy.moe_expert_lora} needs a feed-forward block of known parts, and "
            f"{layer.path} has none; use injection={InjectionStrategy.mixture_lora}, or add the family in "
            "lmoe/backbones/families.py"
        )
    linears = {name: planner.model.get_submodule(f"{block.path}.{name}") for name in block.names.linears}
    branches = {name: sizes(linear) for name, linear in linears.items() if adapted is None or name in adapted}
    for name, linear in linears.items():
        if any(size % WHOLE_UNIT for size in sizes(linear)):
            raise InjectionError(
                f"{block.path}.{name} is {' -> '.join(map(str, sizes(linear)))}, and grouped matmuls need multiples of "
                f"{WHOLE_UNIT}; use injection={InjectionStrategy.mixture_lora}"
            )
    width, out = sizes(linears[block.names.up])[0], sizes(linears[block.names.down])[1]
    site = planner.site(block.path, layer, (width, out), SiteKind.expert_ffn, planner.rank(where))
    copied = 0 if planner.injection.share_base else sum(_numbers(linear) for linear in linears.values())
    site = replace(site, branches=branches, copied_parameters=copied)
    return planner.routed(site, where, router=block.path, router_in_features=width, owner=True)


def _numbers(linear: nn.Module) -> int:
    """Weight and bias; NOTE a quantised weight has fewer elements than numbers."""
    bias = linear.bias
    return math.prod(sizes(linear)) + (bias.numel() if isinstance(bias, Tensor) else 0)


def _adapted(planner: SitePlanner) -> set[str] | None:
    """Names of the Linears that carry branches; None: all of them."""
    keywords = planner.injection.target_keywords
    if keywords is None:
        return None
    there = {name for layer in planner.layers if layer.ffn_block is not None for name in layer.ffn_block.names.linears}
    if missing := [keyword for keyword in keywords if keyword not in there]:
        raise InjectionError(
            f"injection.target_keywords: {missing[0]!r} is no Linear of the feed-forward blocks; they have "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    return set(keywords)
