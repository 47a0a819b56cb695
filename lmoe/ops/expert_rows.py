"""Rows sorted by their expert: each (token, choice) pair is a row, and one grouped matmul serves all experts.

Shapes: N tokens, K chosen, S = N * K rows, D in, O out, R rank, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lmoe.ops.grouped import ALIGNMENT, Groups, grouped_matmul
from lmoe.ops.triton_there import triton_experts


def grouped_linear(rows: Tensor, weight_EOD: Tensor, groups: Groups, bias_EO: Tensor | None = None) -> Tensor:
    """y_s = W_e x_s + b_e with the expert e of each row; computed in the type of the weight.

    Args:
        rows: (S, D), sorted.
        weight_EOD: (E, O, D); a transposed view of (E, D, O) will do.
        groups: of the rows.
        bias_EO: (E, O), or None.

    Returns:
        (S, O).
    """
    y = _matmul(rows.to(weight_EOD.dtype), weight_EOD.transpose(1, 2), groups)
    return y if bias_EO is None else y + bias_EO.index_select(0, groups.expert)


def grouped_lora(rows: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, groups: Groups) -> Tensor:
    """scaling * B_e A_e x_s with the expert e of each row; no (E, O, D) tensor is ever made.

    Args:
        rows: (S, D), sorted, in the type of the branch.
        lora_A: (E, R, D).
        lora_B: (E, O, R); fastest where memory holds it as (E, R, O).
        scaling: alpha / R or alpha / sqrt(R).
        groups: of the rows.

    Returns:
        (S, O) in the type of the rows.
    """
    dtype = rows.dtype
    missing = 0 if groups.by_triton else -lora_A.shape[1] % (ALIGNMENT // dtype.itemsize)
    if missing:  # a row of hidden values must fill whole units of memory; zeros change nothing
        lora_A, lora_B = pad(lora_A, (0, 0, 0, missing)), pad(lora_B, (0, missing))
    hidden = _matmul(rows, lora_A.to(dtype).transpose(1, 2), groups)
    return _matmul(hidden * scaling, lora_B.to(dtype).transpose(1, 2), groups)


def _matmul(rows: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    if groups.by_triton:
        return triton_experts(rows.device).matmul_by_triton(rows, matrices, groups.ends)
    return grouped_matmul(rows, matrices, groups.ends, groups.tiles)


def sum_over_choices(rows: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """y_n = sum_k w_nk x_(n,k), back in the order of the tokens; in a fixed order of sums, on every device.

    Args:
        rows: (S, O), sorted.
        weights: (N, K).
        groups: of the rows.

    Returns:
        (N, O) in the type of rows and weights together.
    """
    return _SumOverChoices.apply(rows, weights, groups.order, groups.token)  # type: ignore[return-value]


class _SumOverChoices(torch.autograd.Function):
    """Saves the rows, and moves each of them once forward and once backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, token)
        where = torch.empty_like(order)
        where[order] = torch.arange(order.numel(), device=order.device)
        where_KN = where.view(weights.shape).t()
        y = rows.index_select(0, where_KN[0]) * weights[:, :1]
        for k in range(1, weights.shape[1]):
            y += rows.index_select(0, where_KN[k]) * weights[:, k : k + 1]  # NOTE addcmul would round differently
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, order, token = ctx.saved_tensors
        grad_rows, grad_weights = grad_y.index_select(0, token), None
        if ctx.needs_input_grad[1]:
            along = torch.linalg.vecdot(grad_rows, rows.to(grad_rows.dtype)).to(weights.dtype)
            grad_weights = torch.empty_like(along).scatter_(0, order, along).view_as(weights)
        sorted_weights = weights.reshape(-1).index_select(0, order).to(grad_rows.dtype)
        return grad_rows.mul_(sorted_weights.unsqueeze(-1)).to(rows.dtype), grad_weights, None, None
