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
        fade: 1 leaves it as it is; or (E,).
    """
    if isinstance(fade, Tensor):
        return lora_B * fade.to(lora_B.device)[:, None, None]
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
