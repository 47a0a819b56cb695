"""Fold low-rank branches into the weight that they sit on.

Shapes: D in, O out, R rank, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe.ops.dora import length_ratios


def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Tensor:
    """W + s B A (2106.09685, section 4.1); with DoRA its rows at the lengths m: m / |V| V (2402.09353, equation 5).

    Args:
        weight: (O, D).
        lora_A: (R, D).
        lora_B: (O, R).
        scaling: s.
        magnitude: (O,) m; None: no DoRA.

    Returns:
        (O, D) in float32, or float64 for float64 factors.
    """
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    merged = weight.to(dtype) + scaling * (lora_B.to(dtype) @ lora_A.to(dtype))
    if magnitude is None:
        return merged
    return length_ratios(magnitude, weight, lora_A, lora_B, scaling).unsqueeze(1).to(dtype) * merged


def side_by_side(branches: Sequence[tuple[Tensor, Tensor, float]], scaling: float) -> tuple[Tensor, Tensor]:
    """One branch that is the sum of several: A = [A_1; A_2; …], B = [s_1/s B_1, s_2/s B_2, …].

    Args:
        branches: (R_i, D) lora_A, (O, R_i) lora_B and scaling s_i of each.
        scaling: s of the result.

    Returns:
        (sum R_i, D) lora_A and (O, sum R_i) lora_B.
    """
    lora_A = torch.cat([A for A, _, _ in branches])
    return lora_A, torch.cat([B if s == scaling else B * (s / scaling) for _, B, s in branches], dim=1)


def average_branch(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """One branch with B A = 1/E sum_e B_e A_e.

    Args:
        lora_A: (E, R, D), or (1, R, D) for all experts.
        lora_B: (E, O, R).

    Returns:
        (E * R, D) or (R, D), and (O, E * R) or (O, R).
    """
    if len(lora_A) == 1:
        return lora_A[0], lora_B.mean(dim=0)
    return lora_A.flatten(0, 1), lora_B.permute(1, 0, 2).flatten(1) / len(lora_B)
