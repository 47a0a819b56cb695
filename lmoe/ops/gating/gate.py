"""What a gate returns, the choice of the K largest, and what the chosen experts' weights add up to."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmoe.vocabulary import MixtureScale


class Gate(NamedTuple):
    """What a router decided for each token.

    probs: (..., E) scores of all experts, made to sum to 1; what the balance losses and statistics take.
    weights: (..., E) factor of each expert's output; 0 for experts that were not chosen.
    assignment: (..., E) share of the token that each expert gets, without gradient; sums to 1 (relu: or 0, where no
        expert is active). Chosen experts share alike; soft: the probabilities.
    expert_indices: (..., K) the chosen experts, where every token has the same number of them, else None.
    """

    probs: Tensor
    weights: Tensor
    assignment: Tensor
    expert_indices: Tensor | None


def weigh(scores: Tensor, chosen: Tensor, scale: MixtureScale) -> Tensor:
    """Weights of the chosen experts.

    sum_to_one: w_e = s_e / sum_S s;  raw: w_e = s_e;  unit: w_e = 1 with the gradient of s_e (straight-through,
    1308.3432);  for e in S, and 0 elsewhere.

    Args:
        scores: (..., E) probabilities or other scores from 0.
        chosen: (..., E) 1 for e in S, else 0, in the dtype of the scores.
        scale: which of the three.

    Returns:
        (..., E); a token with no chosen expert, or whose chosen scores are all 0, has weights 0 (unit: 1 if chosen).
    """
    kept = scores * chosen
    if scale is MixtureScale.raw:
        return kept
    if scale is MixtureScale.unit:
        return chosen + (kept - kept.detach())  # in this order: exactly 1 or 0
    return kept / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


def gate_of_largest(
    scores: Tensor, probs: Tensor, logits: Tensor, *, top_k: int, scale: MixtureScale, selection_bias: Tensor | None
) -> Gate:
    """S = the K largest s + b;  weights from s by `scale`; the chosen experts share the token alike.

    Args:
        scores: (..., E) s.
        probs: (..., E) the scores, made to sum to 1.
        logits: (..., E) router logits z.
        top_k: K.
        scale: what the weights add up to.
        selection_bias: (E,) b, which only chooses; None: 0.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    chosen, expert_indices = top_k_mask(selection(scores, logits, selection_bias), top_k)
    return Gate(probs, weigh(scores, chosen, scale), chosen / top_k, expert_indices)


def selection(scores: Tensor, logits: Tensor, bias: Tensor | None) -> Tensor:
    """What the K largest are chosen by: s + b, and -inf for experts that expert dropout has left out (z = -inf).

    Args:
        scores: (..., E).
        logits: (..., E) router logits z.
        bias: (E,) b; None: 0.
    """
    return scores if bias is None else (scores + bias).masked_fill(logits == -torch.inf, -torch.inf)


def top_k_mask(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest scores.

    Args:
        scores: (..., E).
        top_k: K.

    Returns:
        chosen: (..., E) 1 for the K largest, else 0; without gradient.
        expert_indices: (..., K) in falling order of score.

    Raises:
        ValueError: top_k outside 1 to E.
    """
    num_experts = scores.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, must be from 1 to the number of experts, {num_experts}")
    expert_indices = scores.detach().topk(top_k, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, expert_indices, 1.0).detach(), expert_indices
