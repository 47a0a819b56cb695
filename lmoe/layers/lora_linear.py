"""A frozen Linear with one low-rank branch beside it."""

import torch
from torch import Tensor, nn

from lmoe.ops.lora import kaiming_lora_A, lora_delta


def branch_input(x: Tensor, lora_A: Tensor) -> Tensor:
    """x in the type of the adapters, unless autocast picks the type itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(lora_A.dtype)


class LoRALinear(nn.Module):
    """y = base_layer(x) + scaling * dropout(x) A^T B^T, with float32 A and B.

    Args:
        base_layer: the frozen Linear (or a quantised one with in_features and out_features).
        lora_r: R.
        scaling: alpha / R.
        dropout: probability on the branch's input.
        lora_B_std: standard deviation of B at the start; 0 leaves the backbone's function unchanged.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, base_layer: nn.Linear, *, lora_r: int, scaling: float, dropout: float, lora_B_std: float
    ) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base_layer, scaling, True
        device = base_layer.weight.device
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(kaiming_lora_A((lora_r, base_layer.in_features), device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, lora_r, device=device))
        if lora_B_std:
            nn.init.normal_(self.lora_B, std=lora_B_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O), in the type of the base layer's output."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        x = self.lora_dropout(branch_input(x, self.lora_A))
        delta = lora_delta(x, self.lora_A, self.lora_B, self.scaling)
        return y + delta.to(y.dtype)
