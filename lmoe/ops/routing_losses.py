"""Auxiliary losses of one site, over valid tokens only.

Shapes: N tokens of any leading dimensions, E experts.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid tokens: sum_t m_t v_t / sum_t m_t, and 0 where no token is valid.

    Args:
        values: (*N, E) or (*N,).
        valid: (*N,) bool.

    Returns:
        (E,) or ().
    """
    flat = values.reshape(valid.numel(), -1) if values.dim() > valid.dim() else values.reshape(-1)
    mask = valid.reshape(-1).to(flat.dtype)
    return mask @ flat / mask.sum().clamp(min=1)


def load_balancing_loss(assignment: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
    """E * sum_e f_e P_e, with f_e = count_e / (N K) and P_e = mean_t p_te (Switch, 2101.03961, equations 4 to 6).

    Uniform routing gives 1. f has no gradient. Soft routing has f = p, so that the loss is E * sum_e P_e^2 with the
    gradient through one factor. Differs from the paper in dividing f by K, so that the value does not grow with it.

    Args:
        assignment: (*N, E) share of each token that each expert gets, sums to 1.
        probs: (*N, E) router probabilities.
        valid: (*N,) bool, False for padding.

    Returns:
        () in the dtype of probs.
    """
    f_E = masked_mean(assignment.detach(), valid)
    P_E = masked_mean(probs, valid)
    return probs.shape[-1] * (f_E * P_E).sum()


def router_z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """mean_t (logsumexp_e z_te)^2 on the logits before the temperature (ST-MoE, 2202.08906, equation 5).

    Args:
        logits: (*N, E) router logits z.
        valid: (*N,) bool, False for padding.

    Returns:
        () in the dtype of the logits.
    """
    return masked_mean(torch.logsumexp(logits, dim=-1).square(), valid)
