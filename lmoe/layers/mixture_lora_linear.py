"""A frozen Linear with a mixture of low-rank experts beside it."""

import torch
from torch import Tensor, nn

from lmoe.layers.lora_linear import branch_input
from lmoe.layers.router import Router
from lmoe.layers.trace import RoutingTrace
from lmoe.ops.lora import kaiming_lora_A, stacked_delta


class MixtureLoRALinear(nn.Module):
    """y = base_layer(x) + scaling * sum_e w_e(x) dropout(x) A_e^T B_e^T, with float32 experts and router.

    Dropout is drawn once for all experts; the router sees the input without it.

    Args:
        base_layer: the frozen Linear (or a quantised one with in_features and out_features).
        router: decides w.
        lora_r: R of every expert.
        scaling: alpha / R.
        dropout: probability on the experts' input.
        lora_B_std: standard deviation of B at the start; 0 leaves the backbone's function unchanged.
        site: name under which the trace keeps the routing.
        trace: the model's trace.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Linear,
        router: Router,
        *,
        lora_r: int,
        scaling: float,
        dropout: float,
        lora_B_std: float,
        site: str,
        trace: RoutingTrace,
    ) -> None:
        super().__init__()
        self.base_layer, self.router, self.scaling = base_layer, router, scaling
        self.site, self.trace, self.enabled = site, trace, True
        num_experts, device = router.weight.shape[0], base_layer.weight.device
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(kaiming_lora_A((num_experts, lora_r, base_layer.in_features), device))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, base_layer.out_features, lora_r, device=device))
        if lora_B_std:
            nn.init.normal_(self.lora_B, std=lora_B_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O), in the type of the base layer's output."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        routing = self.router(x)
        self.trace.record(self.site, routing)
        x = self.lora_dropout(branch_input(x, self.lora_A))
        delta = stacked_delta(x, self.lora_A, self.lora_B, routing.routing_weights, self.scaling)
        return y + delta.to(y.dtype)
