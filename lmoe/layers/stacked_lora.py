"""The low-rank branches of all experts for one weight.

Shapes: S sorted rows, D in, O out, R rank, E experts.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lmoe.layers.lora_linear import branch_dtype
from lmoe.ops.expert_rows import grouped_lora
from lmoe.ops.grouped import Groups
from lmoe.ops.lora import faded, kaiming_lora_A


class StackedLoRA(nn.Module):
    """scaling * B_e A_e x for rows sorted by expert, with float32 A (E, R, D) and B (E, O, R); `fade`, also
    one of each expert, scales it further, see training/handoff.py.

    Args:
        num_experts: E.
        lora_r: R.
        in_features, out_features: D and O.
        scaling: alpha / R or alpha / sqrt(R).
        lora_B_std: standard deviation of B at the start; 0 adds nothing at first.
        device: where its tensors live.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        lora_r: int,
        in_features: int,
        out_features: int,
        *,
        scaling: float,
        lora_B_std: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.scaling, self.fade = scaling, cast("float | Tensor", 1.0)
        self.lora_A = nn.Parameter(kaiming_lora_A((num_experts, lora_r, in_features), device))
        # NOTE memory holds B as (E, R, O): so what a grouped matmul reads is a view of it.
        stored = torch.zeros(num_experts, lora_r, out_features, device=device)
        self.lora_B = nn.Parameter(stored.transpose(1, 2))
        if lora_B_std:
            nn.init.normal_(self.lora_B, std=lora_B_std)

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """(S, D) to (S, O)."""
        rows = rows.to(branch_dtype(rows, self.lora_A))
        return grouped_lora(rows, self.lora_A, faded(self.lora_B, self.fade), self.scaling, groups)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The stacked lora_A and lora_B."""
        return self.lora_A, self.lora_B
