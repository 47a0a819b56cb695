"""Auxiliary losses of a site, over valid tokens only.

Shapes: N tokens of any leading dimensions, E experts, S sites of the same E, which may stand in front and keep apart.
"""

import torch
from torch import Tensor

from lmoe.vocabulary import L1_LEAST, L1_MOST


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid tokens: sum_t m_t v_t / sum_t m_t, and 0 where no token is valid.

    In float32 at least, whatever autocast says: a bfloat16 mean over thousands of tokens would be off by up to 0.4 %.

    Args:
        values: (*N, E) or (S, *N, E); N may be flattened.
        valid: (*N,) bool.

    Returns:
        (E,) or (S, E) in float32, or float64 for float64 values.

    Raises:
        ValueError: the mask has another number of tokens.
    """
    before = values.shape[: max(values.dim() - valid.dim() - 1, 0)]
    flat_NE = values.reshape(*before, -1, values.shape[-1])
    if flat_NE.shape[-2] != valid.numel():
        raise ValueError(f"routing of {flat_NE.shape[-2]} tokens, but the mask of valid tokens has {valid.numel()}")
    flat_NE = flat_NE.to(torch.promote_types(values.dtype, torch.float32))
    mask_N1 = valid.reshape(-1, 1).bool()
    # NOTE no matmul: autocast would turn it into bfloat16. No product: padding may hold NaN, and 0 * NaN is NaN.
    return torch.where(mask_N1, flat_NE, 0).sum(-2) / mask_N1.sum().clamp(min=1)


def load_balancing_loss(assignment: Tensor, probs: Tensor, valid: Tensor, load: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e, with f_e = count_e / (N K) and P_e = mean_t p_te (Switch, 2101.03961, equations 4 to 6).

    Uniform routing gives 1. f has no gradient. Soft routing has f = p, so that the loss is E * sum_e P_e^2 with the
    gradient through one factor. Differs from the paper in dividing f by K, so that the value does not grow with it.

    Args:
        assignment: (*N, E) or (S, *N, E) share of each token that each expert gets, sums to 1.
        probs: (*N, E) or (S, *N, E) router probabilities.
        valid: (*N,) bool, False for padding.
        load: (E,) or (S, E) f over more tokens than these (global-batch balance, 2501.11873); None: of these.

    Returns:
        () or (S,) in float32, or float64 for float64 probs.
    """
    f_E = masked_mean(assignment.detach(), valid) if load is None else load
    P_E = masked_mean(probs, valid)
    return probs.shape[-1] * (f_E * P_E).sum(-1)


def importance_cv_loss(weights: Tensor, valid: Tensor) -> Tensor:
    """CV(importance)^2 with importance_e = sum_t w_te: the squared coefficient of variation (1701.06538, equation 7).

    Equal importance gives 0, one expert alone E - 1. The variance is that of the population.

    Args:
        weights: (*N, E) or (S, *N, E) routing weights.
        valid: (*N,) bool, False for padding.

    Returns:
        () or (S,) in float32, or float64 for float64 weights; 0 where all weights are 0.
    """
    importance_E = masked_mean(weights, valid)
    mean = importance_E.mean(-1)
    return importance_E.var(-1, correction=0) / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)


def relu_l1(weights: Tensor, assignment: Tensor, valid: Tensor, top_k: int) -> Tensor:
    """mean_t sum_e f_e w_te with f_e = E / K * mean_t [w_te > 0]: ReMoE's balanced L1 (2412.14711, eq. 8, 9).

    Args:
        weights: (*N, E) or (S, *N, E) relu of the router logits.
        assignment: the same shape, above 0 for active experts.
        valid: (*N,) bool, False for padding.
        top_k: K, the mean number of active experts that is aimed at.

    Returns:
        () or (S,) in float32, or float64 for float64 weights.
    """
    active_E = masked_mean((assignment > 0).to(weights.dtype), valid)
    f_E = active_E * weights.shape[-1] / top_k
    return (f_E * masked_mean(weights, valid)).sum(-1)


def router_z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """mean_t (logsumexp_e z_te)^2 on the logits before the temperature (ST-MoE, 2202.08906, equation 5).

    Args:
        logits: (*N, E) or (S, *N, E) router logits z.
        valid: (*N,) bool, False for padding.

    Returns:
        () or (S,) in float32, or float64 for float64 logits.
    """
    z_NE = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask = valid.reshape(valid.shape if z_NE.dim() > 2 else (-1,)).bool().unsqueeze(-1)
    z_NE = torch.where(mask, z_NE, 0)  # before logsumexp, or its gradient at padding could be NaN
    return masked_mean(torch.logsumexp(z_NE, dim=-1, keepdim=True).square(), valid).squeeze(-1)


def moved_bias(bias: Tensor, activity: Tensor, rate: float) -> Tensor:
    """b + u * sign(mean(c) - c): rarely used experts become easier to choose (2408.15664, algorithm 1).

    Args:
        bias: (E,) selection bias b.
        activity: (E,) share of the step's tokens that chose each expert, or counts c.
        rate: u.

    Returns:
        (E,) in the dtype of the bias.
    """
    return bias + rate * torch.sign(activity.mean() - activity).to(bias.dtype)


def moved_l1(coef: Tensor, active: Tensor, target: float, growth: float) -> Tensor:
    """lambda * alpha ** sign(active - target): more L1 while too many are active (ReMoE, 2412.14711, equation 7).

    The paper writes it with sparsities, 1 - active / E; the sign is the same. Unlike there lambda has bounds: a
    router that cannot reach K would otherwise wind it up or down for ever.

    Args:
        coef: () lambda.
        active: () mean number of active experts a token, over all sites.
        target: K.
        growth: alpha, above 1.

    Returns:
        () in the dtype of coef.
    """
    moved = coef * growth ** torch.sign(active - target).to(coef.dtype)
    return moved.clamp(L1_LEAST, L1_MOST)
