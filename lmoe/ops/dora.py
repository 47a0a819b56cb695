"""Row lengths of an adapted weight, without forming it.

Shapes: D in, O out, R rank.
"""

import torch
from torch import Tensor


def weight_row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """|W + s B A|_o for each row o: |W_o|^2 + 2 s B_o (A W_o^T) + s^2 B_o (A A^T) B_o^T, under the root.

    DoRA's column norm (2402.09353, equation 5), which follows the paper's transposed layout. Costs O * D * R instead of
    the O * D memory of the sum.

    Args:
        weight: (O, D).
        lora_A: (R, D).
        lora_B: (O, R).
        scaling: s.

    Returns:
        (O,) in float32, or float64 for float64 factors.
    """
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    W, A, B = weight.to(dtype), lora_A.to(dtype), scaling * lora_B.to(dtype)
    squares = W.square().sum(1) + 2 * (B * (W @ A.t())).sum(1) + (B * (B @ (A @ A.t()))).sum(1)
    return squares.clamp(min=0).sqrt()


def length_ratios(magnitude: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """m / |V| for each row of V = W + s B A, with |V| constant in the backward pass (2402.09353, equations 5 and 11).

    A row of zeros stays one: its length, by which nothing can be divided, counts as the smallest number.

    Args:
        magnitude: (O,) m.
        weight, lora_A, lora_B, scaling: as of `weight_row_norms`.

    Returns:
        (O,) as of `weight_row_norms`.
    """
    lengths = weight_row_norms(weight, lora_A, lora_B, scaling).detach()
    return magnitude / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
