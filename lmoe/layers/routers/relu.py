"""The relu router and the weight of its L1."""

import torch
from torch import Tensor

from lmoe.layers.context import RoutingContext
from lmoe.layers.routers.base import LinearRouter, RouterSettings
from lmoe.layers.trace import Routing, RoutingTrace
from lmoe.ops.gating import Gate, relu_gate


class ReluRouter(LinearRouter):
    """Positive logits are weights (`relu_gate`); `l1_coef` is saved, and moved after each optimizer step."""

    l1_coef: Tensor

    def __init__(self, settings: RouterSettings, *, site: str, trace: RoutingTrace, context: RoutingContext) -> None:
        super().__init__(settings, site=site, trace=trace, context=context)
        self.register_buffer("l1_coef", torch.tensor(settings.l1_start, device=settings.device))

    def gate(self, logits: Tensor) -> Gate:
        return relu_gate(logits, scale=self.settings.scale)

    def record(self, routing: Routing) -> None:
        self.trace.record(self.site, routing, self.l1_coef, learning=self.learning())
