"""Softmax over all experts, then the K largest."""

import torch
from torch import Tensor

from lmoe.ops.gating.gate import Gate, gate_of_largest
from lmoe.vocabulary import MixtureScale


def top_k_gate(
    logits: Tensor, *, top_k: int, temperature: float, scale: MixtureScale, selection_bias: Tensor | None = None
) -> Gate:
    """p = softmax(z / temperature);  S = the K largest p + b;  weights by `scale`.

    Mixtral (2401.04088; sum_to_one) and Switch (2101.03961, K = 1; raw: renormalising one weight gives the constant 1
    and no gradient to the router). The bias b only chooses (loss-free balancing, 2408.15664, equation 3).

    Args:
        logits: (..., E) router logits z.
        top_k: K, from 1 to E.
        temperature: above 0; divides the logits.
        scale: what the weights add up to.
        selection_bias: (E,) b; None: 0.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    probs = torch.softmax(logits / temperature, dim=-1)
    return gate_of_largest(probs, probs, logits, top_k=top_k, scale=scale, selection_bias=selection_bias)
