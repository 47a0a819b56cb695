"""What low-rank branches add to a frozen Linear.

Shapes: D in, O out, R rank, E experts; `...` any leading token dimensions.
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


def stacked_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """All experts in two matmuls: scaling * sum_e w_e (x A_e^T) B_e^T.

    H = x [A_1; ..; A_E]^T is computed once, each R-wide block of H is scaled by its w_e, and one matmul with
    [B_1 .. B_E] sums over the experts. Experts with weight 0 are computed and discarded, which beats sorting tokens
    while E * R is small.

    Args:
        x: (..., D).
        lora_A: (E, R, D).
        lora_B: (E, O, R).
        weights: (..., E) routing weights, 0 for experts that were not chosen.
        scaling: alpha / R.

    Returns:
        (..., O) in the dtype of the matmuls (autocast decides).
    """
    num_experts, rank, _ = lora_A.shape
    hidden = linear(x, lora_A.flatten(0, 1))
    gates = (weights * scaling).to(hidden.dtype).unsqueeze(-1)
    hidden = (hidden.unflatten(-1, (num_experts, rank)) * gates).flatten(-2)
    return linear(hidden, lora_B.permute(1, 0, 2).flatten(1))


def kaiming_lora_A(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """lora_A at the start: uniform in ±1/sqrt(D), which is kaiming_uniform with a = sqrt(5), as PEFT has it.

    Args:
        shape: (..., R, D).
        device: where to make it.
    """
    bound = shape[-1] ** -0.5
    return torch.empty(shape, device=device, dtype=torch.float32).uniform_(-bound, bound)
