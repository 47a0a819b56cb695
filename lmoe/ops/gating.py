"""From router logits to routing weights.

Shapes: E experts, K chosen experts; `...` any leading token dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """What a router decided for each token.

    probs: (..., E) softmax(z / temperature); sums to 1.
    weights: (..., E) factor of each expert's output; 0 for experts that were not chosen.
    assignment: (..., E) share of the token that each expert gets, without gradient; sums to 1. top_k: 1 / K for each
        chosen expert; soft: the probabilities.
    """

    probs: Tensor
    weights: Tensor
    assignment: Tensor


def top_k_gate(logits: Tensor, *, top_k: int, temperature: float, renormalise: bool) -> Gate:
    """Softmax over all experts, then the K largest.

    p = softmax(z / temperature);  S = the K largest p;  w_e = p_e / sum_S p  (renormalised) or p_e, for e in S, else 0.

    Mixtral (2401.04088) and Switch (2101.03961, K = 1). Switch takes the raw probability for K = 1, and so does this:
    renormalising one weight gives the constant 1 and no gradient to the router.

    Args:
        logits: (..., E) router logits z.
        top_k: K, from 1 to E.
        temperature: above 0; divides the logits.
        renormalise: make the chosen weights sum to 1.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    num_experts = logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, must be from 1 to the number of experts, {num_experts}")
    probs = torch.softmax(logits / temperature, dim=-1)
    chosen, expert_indices = probs.topk(top_k, dim=-1)
    if renormalise:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    weights = torch.zeros_like(probs).scatter(-1, expert_indices, chosen)
    assignment = torch.zeros_like(probs).scatter(-1, expert_indices, 1.0 / top_k).detach()
    return Gate(probs, weights, assignment)


def soft_gate(logits: Tensor, *, temperature: float) -> Gate:
    """Every expert, weighted by its probability: w = p = softmax(z / temperature).

    The output mixture sum_e w_e B_e A_e of L-MoE (2510.17898); differentiable everywhere.

    Args:
        logits: (..., E) router logits z.
        temperature: above 0; divides the logits.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits.
    """
    probs = torch.softmax(logits / temperature, dim=-1)
    return Gate(probs, probs, probs.detach())
