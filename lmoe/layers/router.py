"""A Linear from hidden states to routing weights."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lmoe.layers.trace import Routing
from lmoe.ops.gating import Gate, soft_gate, top_k_gate
from lmoe.schema.moe import RouterKind


class Router(nn.Module):
    """z = x W^T in router_dtype whatever autocast says, then a gate.

    Args:
        in_features: D.
        num_experts: E.
        kind: top_k or soft.
        top_k: K; ignored by soft.
        temperature: divides the logits.
        renormalise: make the K weights sum to 1.
        dtype: type of the matmul and the softmax.
        device: where the weight lives.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        kind: RouterKind,
        top_k: int,
        temperature: float,
        renormalise: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.kind, self.top_k, self.temperature, self.renormalise = kind, top_k, temperature, renormalise
        self.compute_dtype = dtype
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, dtype=torch.float32, device=device))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Routing:
        """(..., D) to a Routing of (..., E) tensors."""
        with torch.autocast(x.device.type, enabled=False):
            logits = linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype))
            return Routing.of(logits, self._gate(logits))

    def _gate(self, logits: Tensor) -> Gate:
        if self.kind is RouterKind.soft:
            return soft_gate(logits, temperature=self.temperature)
        return top_k_gate(logits, top_k=self.top_k, temperature=self.temperature, renormalise=self.renormalise)
