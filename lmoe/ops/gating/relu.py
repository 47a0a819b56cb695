"""Positive logits are weights; the rest of the experts is off."""

import torch
from torch import Tensor

from lmoe.ops.gating.gate import Gate, weigh
from lmoe.vocabulary import MixtureScale


def relu_gate(logits: Tensor, *, scale: MixtureScale = MixtureScale.raw) -> Gate:
    """s = relu(z);  S = experts with s > 0;  weights from s by `scale`.

    ReMoE (2412.14711, equation 4; raw): continuous where an expert switches on, any number of experts a token, kept
    sparse by an adaptive L1 (`relu_l1` in lmoe.ops.routing_losses).

    Args:
        logits: (..., E) router logits z.
        scale: what the weights add up to.

    Returns:
        Gate of (..., E) tensors in the dtype of the logits. A token without active expert has probs = 1 / E,
        and weights and assignment 0.
    """
    scores = torch.relu(logits)
    chosen = (scores > 0).to(scores.dtype).detach()
    total, count = scores.sum(-1, keepdim=True), chosen.sum(-1, keepdim=True)
    tiny = torch.finfo(scores.dtype).tiny
    probs = torch.where(count > 0, scores / total.clamp(min=tiny), 1 / scores.shape[-1])
    return Gate(probs, weigh(scores, chosen, scale), chosen / count.clamp(min=1), None)
