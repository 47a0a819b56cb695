"""The weights of the K experts with the largest probabilities, with their gradient by hand.

Shapes: E experts, K chosen; `...` any leading token dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmoe.vocabulary import MixtureScale


def top_k_weights(
    logits: Tensor, *, top_k: int, scale: MixtureScale, chosen_by: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """p = softmax(z);  S = the K largest of `chosen_by`;  sum_to_one: w_e = p_e / sum_S p;  raw: w_e = p_e;  unit:
    w_e = 1 with the gradient of p_e (straight-through, 1308.3432);  for e in S, and 0 elsewhere.

    As a graph of operators this would be some twelve launches on (..., E) forward and as many backward; here they are
    four or five and one to four. sum_to_one is computed as the softmax over S, which is the same, and for which the
    probabilities of all experts are not needed: dz = w * (dw - sum_e w_e dw_e).

    Args:
        logits: (..., E) z, after noise and temperature; at least one of S is above -inf.
        top_k: K.
        scale: which of the three.
        chosen_by: (..., E), of which the K largest are chosen; None: z, which has the order of p.

    Returns:
        weights: (..., E) in the dtype of the logits.
        expert_indices: (..., K) in falling order.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    check_top_k(top_k, logits.shape[-1])
    weights, indices = _TopKWeights.apply(logits, chosen_by, top_k, scale)  # type: ignore[misc]
    return weights, indices


def check_top_k(top_k: int, num_experts: int) -> None:
    """Refuse a K that there are not enough experts for.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, must be from 1 to the number of experts, {num_experts}")


class _TopKWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, chosen_by: Tensor | None, top_k: int, scale: MixtureScale
    ) -> tuple[Tensor, Tensor]:
        kept, indices = (logits if chosen_by is None else chosen_by).topk(top_k, dim=-1)  # (..., K)
        ctx.scale = scale
        if scale is MixtureScale.sum_to_one:
            kept = kept if chosen_by is None else logits.gather(-1, indices)
            weights = torch.zeros_like(logits).scatter_(-1, indices, torch.softmax(kept, dim=-1))
            ctx.save_for_backward(weights)
        else:
            probs = torch.softmax(logits, dim=-1)
            kept = 1.0 if scale is MixtureScale.unit else probs.gather(-1, indices)
            weights = torch.zeros_like(logits).scatter_(-1, indices, kept)  # type: ignore[call-overload]
            ctx.save_for_backward(weights, probs)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)  # or each backward would make zeros for the indices
        return weights, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        weights, *rest = ctx.saved_tensors
        if ctx.scale is MixtureScale.sum_to_one:
            return torch._softmax_backward_data(grad, weights, -1, weights.dtype), None, None, None
        (probs,) = rest
        kept = grad * weights  # (..., E) dw_e p_e of S
        if ctx.scale is MixtureScale.unit:
            kept = kept * probs
        return torch.addcmul(kept, probs, kept.sum(-1, keepdim=True), value=-1), None, None, None
