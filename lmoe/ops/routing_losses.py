"""Auxiliary losses of one site, over valid tokens only.

Shapes: N tokens of any leading dimensions, E experts.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid tokens: sum_t m_t v_t / sum_t m_t, and 0 where no token is valid.

    In float32 at least, whatever autocast says: a bfloat16 mean over thousands of tokens would be off by up to 0.4 %.

    Args:
        values: (*N, E); N may be flattened.
        valid: (*N,) bool.

    Returns:
        (E,) in float32, or float64 for float64 values.

    Raises:
        ValueError: the mask has another number of tokens.
    """
    flat_NE = values.reshape(-1, values.shape[-1])
    if flat_NE.shape[0] != valid.numel():
        raise ValueError(f"routing of {flat_NE.shape[0]} tokens, but the mask of valid tokens has {valid.numel()}")
    flat_NE = flat_NE.to(torch.promote_types(values.dtype, torch.float32))
    mask_N = valid.reshape(-1).to(flat_NE.dtype)
    # NOTE no matmul: autocast would turn it into bfloat16.
    return (flat_NE * mask_N[:, None]).sum(0) / mask_N.sum().clamp(min=1)


def load_balancing_loss(assignment: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
    """E * sum_e f_e P_e, with f_e = count_e / (N K) and P_e = mean_t p_te (Switch, 2101.03961, equations 4 to 6).

    Uniform routing gives 1. f has no gradient. Soft routing has f = p, so that the loss is E * sum_e P_e^2 with the
    gradient through one factor. Differs from the paper in dividing f by K, so that the value does not grow with it.

    Args:
        assignment: (*N, E) share of each token that each expert gets, sums to 1.
        probs: (*N, E) router probabilities.
        valid: (*N,) bool, False for padding.

    Returns:
        () in float32, or float64 for float64 probs.
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
        () in float32, or float64 for float64 logits.
    """
    z_NE = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return masked_mean(torch.logsumexp(z_NE, dim=-1, keepdim=True).square(), valid).squeeze(0)
