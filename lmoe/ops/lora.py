"""What low-rank branches add to a frozen Linear.

Shapes: D in, O out, R rank; `...` any leading token dimensions.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """One branch: scaling * x A^T B^T (LoRA, 2106.09685, section 4.1).

    Args:
        x: (..., D).
        lora_A: (R, D).
        lora_B: (O, R).
        scaling: alpha / R.

    Returns:
        (..., O).
    """
    return linear(linear(x, lora_A) * scaling, lora_B)


def faded(lora_B: Tensor, fade: float | Tensor) -> Tensor:
    """lora_B with the scale of its branch, or of each expert's.

    Args:
        lora_B: (O, R), or (E, O, R).
        fade: 1 leaves it as it is; or () or (E,).
    """
    if isinstance(fade, Tensor):
        fade = fade.to(lora_B.device)
        return lora_B * (fade[:, None, None] if fade.ndim else fade)
    return lora_B if fade == 1.0 else lora_B * fade


def rescaled_lora_B(lora_B: Tensor, own_scaling: float, scaling: float) -> Tensor:
    """own_scaling / scaling * B, so that scaling * B' A = own_scaling * B A; computed in float64, rounded once.

    Args:
        lora_B: (O, R).
        own_scaling: that it was trained with.
        scaling: that it will be used with, not 0.

    Returns:
        (O, R) float32.
    """
    return (lora_B.double() * (own_scaling / scaling)).float()


def kaiming_lora_A(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """lora_A at the start: uniform in ±1/sqrt(D), which is kaiming_uniform with a = sqrt(5), as PEFT has it.

    Args:
        shape: (..., R, D).
        device: where to make it.
    """
    bound = shape[-1] ** -0.5
    return torch.empty(shape, device=device, dtype=torch.float32).uniform_(-bound, bound)


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
