"""Routers that learn nothing: what a study compares with."""

import torch
from torch import Tensor

from lmoe.errors import RoutingError
from lmoe.layers.context import RoutingContext
from lmoe.layers.routers.base import Router, RouterSettings
from lmoe.layers.routers.linear import TopKRouter
from lmoe.layers.trace import Routing, RoutingTrace
from lmoe.ops.gating import oracle_gate, uniform_gate


class UniformRouter(Router):
    """Every expert alike (`uniform_gate`)."""

    def route(self, x: Tensor, router_logits: Tensor | None) -> Routing:
        like = x[..., 0].detach().to(self.settings.dtype)
        gate = uniform_gate(like, self.settings.num_experts, scale=self.settings.scale)
        return Routing.of(torch.zeros_like(gate.probs), gate)


class RandomRouter(TopKRouter):
    """top_k of a random Linear that is saved and never trains."""

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__(settings, site=site, trace=trace, context=context)
        fixed = self.weight.data
        del self.weight
        self.register_buffer("weight", fixed)


class OracleRouter(Router):
    """The expert of the token's domain (`oracle_gate`)."""

    def route(self, x: Tensor, router_logits: Tensor | None) -> Routing:
        expert = self.context.expert_of_token(training=self.training)
        if expert is None:
            raise RoutingError(
                "moe.router=oracle does not know the domain of these tokens: name it with "
                "`lmoe.trace(model, attention_mask=…, domains=[…])`"
            )
        gate = oracle_gate(expert.to(x.device).expand(x.shape[:-1]), self.settings.num_experts, self.settings.dtype)
        return Routing.of(torch.zeros_like(gate.probs), gate)
