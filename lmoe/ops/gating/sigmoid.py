"""Independent scores by a sigmoid, then the K largest."""

import torch
from torch import Tensor

from lmoe.ops.gating.gate import Gate, gate_of_largest
from lmoe.vocabulary import MixtureScale


def sigmoid_gate(
    logits: Tensor, *, top_k: int, temperature: float, scale: MixtureScale, selection_bias: Tensor | None = None
) -> Gate:
    """s = sigmoid(z / temperature);  S = the K largest s + b;  weights from s by `scale`.

    DeepSeek-V3 (2412.19437, equations 12 to 16; sum_to_one), with the bias of loss-free balancing (2408.15664), which
    only chooses. Experts do not compete for a sum: p = s / sum_e s is for balance losses and statistics.

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
    scores = torch.sigmoid(logits / temperature)
    probs = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return gate_of_largest(scores, probs, logits, top_k=top_k, scale=scale, selection_bias=selection_bias)
