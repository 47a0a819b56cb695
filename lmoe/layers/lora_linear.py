"""A frozen Linear with one low-rank branch beside it.

Shapes: D in, O out, R rank; `...` any leading token dimensions.
"""

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from lmoe.layers.shared_input import SharedInput, down
from lmoe.ops.add_lora import add_lora
from lmoe.ops.dora import length_ratios, weight_row_norms
from lmoe.ops.frozen_linear import Beside
from lmoe.ops.linear_sizes import sizes, weight_OD
from lmoe.ops.lora import faded, kaiming_lora_A, lora_delta


def branch_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """The type that a low-rank branch computes in: that of autocast, or of the adapters."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lora_A.dtype


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to hear of a module's inputs, outputs or gradients."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def one_function_computes(
    base_layer: nn.Module, x: Tensor, dtype: torch.dtype, dropout: nn.Dropout
) -> TypeGuard[nn.Linear]:
    """Whether a base layer and what stands beside it may share a forward and a backward: a plain frozen Linear without
    hooks, one input for all (no dropout), and one type.

    Args:
        base_layer: what the branches stand beside.
        x: (..., D).
        dtype: type that the branches compute in.
        dropout: on the branches' input.
    """
    if type(base_layer) is not nn.Linear or base_layer.weight.requires_grad:
        return False
    if has_hooks(base_layer):
        return False
    one_type = torch.is_autocast_enabled(x.device.type) or base_layer.weight.dtype == x.dtype == dtype
    return one_type and not (dropout.training and dropout.p > 0)


class LowRank(nn.Module):
    """scaling * x A^T B^T, with float32 A and B; `fade` scales it further, see training/handoff.py.

    Args:
        in_features, out_features: D and O.
        lora_r: R.
        scaling: alpha / R or alpha / sqrt(R).
        device: where its tensors live.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, in_features: int, out_features: int, lora_r: int, scaling: float, device: torch.device) -> None:
        super().__init__()
        self.scaling, self.fade = scaling, cast("float | Tensor", 1.0)
        self.lora_A = nn.Parameter(kaiming_lora_A((lora_r, in_features), device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, lora_r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O)."""
        return lora_delta(x, self.lora_A, faded(self.lora_B, self.fade), self.scaling)


class LoRALinear(nn.Module):
    """y = base_layer(x) + scaling * dropout(x) A^T B^T, with float32 A and B; B starts at 0, which changes nothing yet.

    With use_dora, y = m / |V| * (W x + scaling * B A dropout(x)) + bias row by row, with V = W + scaling * B A, |V| the
    lengths of its rows, constant in the backward pass, and m = |W| at the start (DoRA, 2402.09353, equations 5 and 11).

    Args:
        base_layer: the frozen Linear, a quantised one or a Conv1D.
        lora_r: R.
        scaling: alpha / R or alpha / sqrt(R).
        dropout: probability on the branch's input.
        use_dora: learn the row lengths apart from the directions.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        lora_r: int,
        scaling: float,
        dropout: float,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base_layer, scaling, True
        self.fade, self.shared_input = cast("float | Tensor", 1.0), cast("SharedInput | None", None)
        (in_features, out_features), device = sizes(base_layer), next(base_layer.parameters()).device
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(kaiming_lora_A((lora_r, in_features), device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, lora_r, device=device))
        self.use_dora = use_dora
        if use_dora:
            lengths = weight_row_norms(weight_OD(base_layer), self.lora_A, self.lora_B, scaling)
            self.lora_magnitude = nn.Parameter(lengths.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O), in the type of the base layer's output."""
        if not self.enabled:
            return self.base_layer(x)
        dtype = branch_dtype(x, self.lora_A)
        if (found := down(self, x, dtype)) is not None:
            assert found.lora_B is not None
            return add_lora(found.y, found.hidden, found.lora_B, self.scaling)
        y = self.base_layer(x)
        branch = self.lora_dropout(x.to(dtype))
        lora_B = faded(self.lora_B, self.fade)
        delta = lora_delta(branch, self.lora_A, lora_B, self.scaling).to(y.dtype)
        if not self.use_dora:
            return y + delta
        with torch.autocast(x.device.type, enabled=False):
            weight = weight_OD(self.base_layer)
            ratio = length_ratios(self.lora_magnitude, weight, self.lora_A, lora_B, self.scaling).to(y.dtype)
        if self.base_layer.bias is None:
            return ratio * (y + delta)
        bias = self.base_layer.bias.to(y.dtype)
        return ratio * (y - bias + delta) + bias

    def beside(self, x: Tensor, dtype: torch.dtype) -> Beside | None:
        """What one function may compute of x (..., D), with that of other sites that read it; None: it may not."""
        base = self.base_layer
        if not self.enabled or self.use_dora or not one_function_computes(base, x, dtype, self.lora_dropout):
            return None
        return Beside(base.weight, base.bias, self.lora_A, faded(self.lora_B, self.fade))
