"""Rows sorted by their expert: each (token, choice) pair is a row, and one grouped matmul serves all experts.

Shapes: N tokens, K chosen, S = N * K rows, D in, O out, R rank, E experts.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from lmoe.ops.grouped import ALIGNMENT, Groups, compute_dtype


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
    y = grouped_mm(rows.to(weight_EOD.dtype), weight_EOD.transpose(1, 2), offs=groups.ends)
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
        (S, O) in the type that grouped matmuls run in.
    """
    dtype = compute_dtype(rows.device.type, rows.dtype)
    missing = -lora_A.shape[1] % (ALIGNMENT // dtype.itemsize)
    if missing:  # a row of hidden values must fill whole units of memory; zeros change nothing
        lora_A, lora_B = pad(lora_A, (0, 0, 0, missing)), pad(lora_B, (0, missing))
    hidden = grouped_mm(rows.to(dtype), lora_A.to(dtype).transpose(1, 2), offs=groups.ends)
    return grouped_mm(hidden * scaling, lora_B.to(dtype).transpose(1, 2), offs=groups.ends)


def sum_over_choices(rows: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """y_n = sum_k w_nk x_(n,k), back in the order of the tokens; in a fixed order of sums, on every device.

    Args:
        rows: (S, O), sorted.
        weights: (N, K).
        groups: of the rows.

    Returns:
        (N, O) in the type of rows and weights together.
    """
    back = torch.empty_like(groups.order)
    back[groups.order] = torch.arange(groups.order.numel(), device=back.device)
    return (rows.index_select(0, back).view(*weights.shape, rows.shape[-1]) * weights.unsqueeze(-1)).sum(1)
