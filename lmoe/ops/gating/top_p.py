"""The fewest experts whose probabilities together reach p."""

import torch
from torch import Tensor

from lmoe.ops.gating.gate import Gate, weigh
from lmoe.vocabulary import MixtureScale


def top_p_gate(logits: Tensor, *, top_p: float, temperature: float, scale: MixtureScale) -> Gate:
    """p = softmax(z / temperature), sorted;  S = the first experts until their sum reaches top_p, at least one.

    An undecided token gets more experts ("Harder tasks need more experts", 2403.07652, equations 4 to 6, which weighs
    by the raw probabilities). With sum_to_one a token that one expert decides has the constant weight 1, and gives the
    router no gradient.

    Args:
        logits: (..., E) router logits z.
        top_p: above 0 to 1.
        temperature: above 0; divides the logits.
        scale: what the weights add up to.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits; assignment shares a token alike among its experts.

    Raises:
        ValueError: top_p outside 0 to 1.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")
    probs = torch.softmax(logits / temperature, dim=-1)
    ordered, order = probs.detach().sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # what the larger ones reach without this expert
    chosen = torch.zeros_like(probs).scatter(-1, order, (before < top_p).to(probs.dtype)).detach()
    return Gate(probs, weigh(probs, chosen, scale), chosen / chosen.sum(-1, keepdim=True), None)
