"""The decision of a router that the backbone brings along, in the words of our own."""

from enum import StrEnum

import torch
from torch import Tensor

from lmoe.ops.gating.gate import Gate


class NativeScores(StrEnum):
    """What a native router returns beside weights and indices, and so how its scores come from it."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    probabilities = "probabilities"


def native_gate(output: Tensor, weights: Tensor, expert_indices: Tensor, scores: NativeScores) -> tuple[Tensor, Gate]:
    """Router logits z and the gate of a native router.

    softmax: z is the output, p = softmax(z) (Mixtral 2401.04088);  sigmoid: z is the output, p = sigmoid(z) over its
    sum (DeepSeek-V3 2412.19437);  probabilities: p is the output, z = ln p.

    Args:
        output: (..., E) what the router returns first.
        weights: (..., K) weights of the chosen experts, whatever they sum to.
        expert_indices: (..., K) int64.
        scores: which of the three.

    Returns:
        router_logits: (..., E) float32.
        Gate of (..., E) tensors.
    """
    output = output.float()
    if scores is NativeScores.probabilities:
        probs, logits = output, output.clamp(min=torch.finfo(output.dtype).tiny).log()
    elif scores is NativeScores.sigmoid:
        activated, logits = torch.sigmoid(output), output
        probs = activated / activated.sum(-1, keepdim=True).clamp(min=torch.finfo(output.dtype).tiny)
    else:
        probs, logits = torch.softmax(output, dim=-1), output
    empty = torch.zeros_like(probs)
    chosen = empty.scatter(-1, expert_indices, 1.0 / expert_indices.shape[-1])
    return logits, Gate(probs, empty.scatter(-1, expert_indices, weights.float()), chosen, expert_indices)
