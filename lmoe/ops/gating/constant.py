"""Gates that look at no hidden state: baselines of a study."""

import torch
from torch import Tensor

from lmoe.ops.gating.gate import Gate
from lmoe.vocabulary import MixtureScale


def uniform_gate(like: Tensor, num_experts: int, *, scale: MixtureScale = MixtureScale.sum_to_one) -> Gate:
    """w_e = 1 / E, or 1 with `unit`: the mixture is one LoRA of rank E * R.

    Args:
        like: (...,) a tensor with the shape, the device and the floating type of the result, less E.
        num_experts: E.
        scale: sum_to_one or unit.

    Returns:
        Gate of (..., E) tensors.
    """
    probs = like.new_full((*like.shape, num_experts), 1 / num_experts)
    return Gate(probs, torch.ones_like(probs) if scale is MixtureScale.unit else probs, probs, None)


def oracle_gate(expert: Tensor, num_experts: int, dtype: torch.dtype) -> Gate:
    """w_e = 1 for the expert of the token's domain, else 0: what perfect knowledge of the domain would choose.

    Args:
        expert: (...,) int64, from 0 to E - 1.
        num_experts: E.
        dtype: type of the result.

    Returns:
        Gate of (..., E) tensors; K = 1.
    """
    # NOTE one_hot would read its largest value back to the host.
    weights = (expert.unsqueeze(-1) == torch.arange(num_experts, device=expert.device)).to(dtype)
    return Gate(weights, weights, weights, expert.unsqueeze(-1))
