"""Modules for the sites of a plan."""

import torch
from torch import nn

from lmoe.errors import InjectionError
from lmoe.injection.plan import SitePlan
from lmoe.layers.block_route import BlockRoute
from lmoe.layers.context import RoutingContext
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear, MixtureSettings
from lmoe.layers.routers import ROUTERS, Router, RouterSettings
from lmoe.layers.trace import RoutingTrace
from lmoe.schema.injection import InitLora, InjectionConfig
from lmoe.schema.moe import LoadBalanceType, MoeConfig
from lmoe.schema.router_traits import TRAITS, mixture_scale

ROUTER = "router"
"""Name of the router under the module that it decides for."""


class SiteBuilder:
    """Makes the wrapper of each site, and the routers that blocks share.

    Args:
        model: what the sites are in.
        injection, moe: checked sections.
        trace, context: what the model's routers share.
    """

    def __init__(
        self, model: nn.Module, injection: InjectionConfig, moe: MoeConfig, trace: RoutingTrace, context: RoutingContext
    ) -> None:
        self.model, self.injection, self.moe, self.trace, self.context = model, injection, moe, trace, context
        self._blocks: dict[str, BlockRoute] = {}

    def wrapper(self, site: SitePlan) -> nn.Module:
        """What stands at the site's path from now on.

        Raises:
            InjectionError: a quantised weight where its numbers are needed, or a block with a router of its own.
        """
        base_layer = self.model.get_submodule(site.path)
        assert isinstance(base_layer, nn.Linear)
        svd = self.injection.init_lora is InitLora.svd
        if site.use_dora or (svd and site.num_experts):
            self._needs_numbers(base_layer, site, "injection.attn_lora.use_dora" if site.use_dora else "init_lora=svd")
        if not site.num_experts:
            return LoRALinear(
                base_layer,
                lora_r=site.lora_r,
                scaling=site.scaling,
                dropout=self.injection.lora_dropout,
                lora_B_std=0.0,
                use_dora=site.use_dora,
            )
        settings = MixtureSettings(
            num_experts=site.num_experts,
            lora_r=site.lora_r,
            scaling=site.scaling,
            dropout=self.injection.lora_dropout,
            lora_B_std=self.injection.lora_B_std or 0.0,
            svd=svd,
            shared_lora_A=site.shared_lora_A,
            shared_lora_r=site.shared_lora_r or None,
            shared_scaling=site.shared_scaling,
            mixing=self.moe.mixing,
            backend=self.moe.backend,
        )
        return MixtureLoRALinear(base_layer, self._deciding(site, base_layer), settings)

    def _deciding(self, site: SitePlan, base_layer: nn.Linear) -> Router | BlockRoute:
        """The site's own router, or its block's, which the block's first site makes."""
        if site.router == site.path:
            return self._router(site, base_layer)
        if site.router not in self._blocks:
            block = self.model.get_submodule(site.router)
            if hasattr(block, ROUTER):
                raise InjectionError(f"{site.router} has a {ROUTER} of its own; use moe.router_scope=linear")
            router = self._router(site, base_layer).train(block.training)
            block.add_module(ROUTER, router)
            self._blocks[site.router] = BlockRoute(router)
            self._blocks[site.router].attach(block)
        return self._blocks[site.router]

    def _router(self, site: SitePlan, base_layer: nn.Linear) -> Router:
        moe, injection = self.moe, self.injection
        assert moe.router is not None
        settings = RouterSettings(
            in_features=site.router_in_features,
            num_experts=site.num_experts,
            top_k=injection.top_k,
            top_p=moe.top_p or 1.0,
            scale=mixture_scale(moe, injection),
            dtype=getattr(torch, moe.router_dtype.value),
            selection_bias=moe.load_balance.type is LoadBalanceType.aux_loss_free,
            l1_start=moe.l1_start,
            fixed_k=TRAITS[moe.router].fixed_k,
            device=base_layer.weight.device,
        )
        return ROUTERS[moe.router](settings, site=site.router, trace=self.trace, context=self.context)

    def _needs_numbers(self, base_layer: nn.Linear, site: SitePlan, what: str) -> None:
        shape = (site.out_features, site.in_features)
        if not base_layer.weight.is_floating_point() or base_layer.weight.shape != shape:
            raise InjectionError(f"{what} needs the numbers of the weight, and {site.path} is quantised")
        fits = site.num_experts * site.lora_r <= min(shape)
        if not fits and not site.use_dora:
            raise InjectionError(
                f"injection.init_lora=svd: {site.num_experts} experts of rank {site.lora_r} need "
                f"{site.num_experts * site.lora_r} singular directions, and {site.path} has {min(shape)}; "
                "lower injection.lora_r or num_experts"
            )
