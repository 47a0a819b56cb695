"""Every expert, weighted by its probability."""

import torch
from torch import Tensor

from lmoe.ops.gating.gate import Gate, weigh
from lmoe.vocabulary import MixtureScale


def soft_gate(logits: Tensor, *, temperature: float, scale: MixtureScale = MixtureScale.sum_to_one) -> Gate:
    """w = p = softmax(z / temperature); unit: w = 1 with the gradient of p.

    The dense router of L-MoE (2510.17898); differentiable everywhere.

    Args:
        logits: (..., E) router logits z.
        temperature: above 0; divides the logits.
        scale: sum_to_one or unit.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits; assignment = p.
    """
    probs = torch.softmax(logits / temperature, dim=-1)
    weights = weigh(probs, torch.ones_like(probs), scale) if scale is MixtureScale.unit else probs
    return Gate(probs, weights, probs.detach(), None)
