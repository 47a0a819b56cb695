"""Experts that start as slices of a weight's singular directions.

Shapes: D in, O out, R rank, E experts.
"""

import torch
from torch import Tensor


def svd_slices(weight: Tensor, num_experts: int, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """W = U S V^T;  B_e = U_e (S_e / s)^(1/2),  A_e = (S_e / s)^(1/2) V_e^T, so that s B_e A_e = U_e S_e V_e^T.

    The singular values in falling order are cut into E equal segments, and expert e takes the first R of segment e
    (GOAT, 2502.16894, section 3.1); with E = 1 these are the principal directions (PiSSA, 2404.02948, equation 3).

    Args:
        weight: (O, D).
        num_experts: E.
        rank: R.
        scaling: s.

    Returns:
        lora_A (E, R, D) and lora_B (E, O, R) in float32.

    Raises:
        ValueError: E segments of at least R do not fit.
    """
    available = min(weight.shape)
    if num_experts * rank > available:
        raise ValueError(
            f"{num_experts} experts of rank {rank} need {num_experts * rank} singular directions, "
            f"and a weight of shape {tuple(weight.shape)} has {available}"
        )
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    starts = torch.arange(num_experts, device=weight.device) * (available // num_experts)
    index = starts[:, None] + torch.arange(rank, device=weight.device)
    root = (S / scaling).sqrt()[index]
    return root.unsqueeze(-1) * Vh[index], U.t()[index].transpose(1, 2) * root.unsqueeze(1)
