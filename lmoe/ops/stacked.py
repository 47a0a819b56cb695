"""All experts of a site in two matmuls.

Shapes: N tokens, D in, O out, R rank, E experts; `...` any leading token dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lmoe.ops.one_launch import rows, times
from lmoe.vocabulary import Mixing


def stacked_delta(hidden: Tensor, lora_B: Tensor, gates: Tensor, *, mixing: Mixing = Mixing.outputs) -> Tensor:
    """sum_e g_e B_e h_e, in plain operations: what `add_stacked` is compared with, and what torch.compile traces.

    Args:
        hidden: (..., E, R) h_e = A_e x, or (..., 1, R) where all experts share one A.
        lora_B: (E, O, R).
        gates: (..., E) routing weight times scaling, 0 for experts that were not chosen.
        mixing: outputs: sum_e g_e B_e h_e; factors: (sum_e w_e B_e)(sum_e w_e A_e) x with gates w.

    Returns:
        (..., O) in the dtype of hidden.
    """
    return linear(gated(hidden, gates, mixing), lora_B.permute(1, 0, 2).flatten(1).to(hidden.dtype))


def gated(hidden: Tensor, gates: Tensor, mixing: Mixing) -> Tensor:
    """(..., E * R): what the stacked B is multiplied by."""
    weights = gates.to(hidden.dtype).unsqueeze(-1)  # (..., E, 1)
    if mixing is Mixing.factors:
        hidden = (hidden * weights).sum(-2, keepdim=True)  # (..., 1, R)
    return (hidden * weights).flatten(-2)


def add_stacked(y: Tensor, hidden: Tensor, lora_B: Tensor, gates: Tensor, scaling: float = 1.0) -> Tensor:
    """y + scaling * sum_e g_e B_e h_e, written into y; saves h and g only, and computes g h again in the backward pass.

    Args:
        y: (..., O) contiguous output of the frozen layer; changed in place.
        hidden: (..., E, R), or (..., 1, R) where all experts share one A.
        lora_B: (E, O, R); fastest in the type of hidden and where memory holds it as (E, R, O).
        gates: (..., E) routing weights, 0 for experts that were not chosen.
        scaling: alpha / R.

    Returns:
        y.
    """
    return _AddStacked.apply(y, hidden, lora_B, gates, scaling)  # type: ignore[return-value]


class _AddStacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, lora_B: Tensor, gates: Tensor, scaling: float) -> Tensor:
        B_RO = _stacked_B(lora_B, hidden.dtype)
        ctx.save_for_backward(hidden, B_RO, gates)
        ctx.B_shape, ctx.B_dtype, ctx.scaling = lora_B.shape, lora_B.dtype, scaling
        ctx.mark_dirty(y)
        y_NO = rows(y)
        mixed = _times(_spread(gates, lora_B.shape[2], hidden.dtype), hidden)  # (N, E * R)
        if y.dtype == mixed.dtype:
            y_NO.addmm_(mixed, B_RO, alpha=scaling)
        else:
            y_NO.add_(mixed @ B_RO, alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        hidden, B_RO, gates = ctx.saved_tensors  # (..., E or 1, R), (E * R, O), (..., E)
        experts, out, rank = ctx.B_shape
        grad_NO = rows(grad_y).to(hidden.dtype)
        spread = _spread(gates, rank, hidden.dtype)  # (N, E * R)
        grad_hidden = grad_B = grad_gates = None
        if ctx.needs_input_grad[2]:
            grad_B = times(ctx.scaling, _times(spread, hidden).t(), grad_NO)  # (E * R, O)
            grad_B = grad_B.view(experts, rank, out).transpose(1, 2).to(ctx.B_dtype)  # (E, O, R)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_mixed = times(ctx.scaling, grad_NO, B_RO.t())  # (N, E * R)
            if ctx.needs_input_grad[3]:
                products = _times(grad_mixed, hidden).view(*gates.shape, rank)  # (..., E, R)
                grad_gates = products.sum(-1, dtype=gates.dtype)
            if ctx.needs_input_grad[1]:
                grad_hidden = grad_mixed.mul_(spread)
                if hidden.shape[-2] == 1:
                    grad_hidden = grad_hidden.view(-1, experts, rank).sum(1)
                grad_hidden = grad_hidden.view(hidden.shape)
        return grad_y, grad_hidden, grad_B, grad_gates, None


def _spread(gates: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """(N, E * R): each gate R times. NOTE multiplying by a broadcast (N, E, 1) takes several times as long on a CPU."""
    flat = rows(gates).unsqueeze(-1)  # (N, E, 1)
    return flat.new_empty(*flat.shape[:2], rank, dtype=dtype).copy_(flat).flatten(1)


def _times(values: Tensor, hidden: Tensor) -> Tensor:
    """(N, E * R) values times hidden (..., E, R), or (..., 1, R) for all experts."""
    if hidden.shape[-2] == 1:
        experts = values.shape[-1] // hidden.shape[-1]
        hidden = hidden.expand(*hidden.shape[:-2], experts, hidden.shape[-1])
    return values * hidden.reshape(values.shape)


def _stacked_B(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """(E * R, O)."""
    experts, out, rank = lora_B.shape
    return lora_B.transpose(1, 2).reshape(experts * rank, out).to(dtype)
