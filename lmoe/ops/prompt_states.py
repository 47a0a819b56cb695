"""What a router reads of a prompt: one vector of its hidden states.

Shapes: B sequences of T tokens, P rows packed into one sequence, D hidden.
"""

import torch
from torch import Tensor


def mean_of_prompts(x: Tensor, prompt: Tensor) -> Tensor:
    """(B, P, D): mean of each row's prompt tokens, in float32 whatever autocast says; 0 for a row without any.

    Args:
        x: (B, T, D) hidden states.
        prompt: (B, P, T) bool: the prompt tokens of each row; it may lie on another device than the states.
    """
    prompt = prompt.to(x.device)
    share = prompt.float()
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    # NOTE padding may hold anything, and 0 * NaN is NaN.
    inside = prompt.any(1).unsqueeze(-1)
    with torch.autocast(x.device.type, enabled=False):
        return share @ x.float().masked_fill(~inside, 0)


def unit_rms(states: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean_d x_d^2 + eps): RMSNorm (1910.07467) without weights, so that a head reads every layer alike.

    Args:
        states: (..., D).
        eps: keeps a zero vector zero.
    """
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)
