"""Losses of preference objectives, from log-probabilities of answers; gradients by autograd.

Shapes: B pairs of a chosen and a rejected answer, or B single answers. log p is in nats, of a whole answer (its sum
over the label tokens) or of one of its tokens (its mean over them), as each function says.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from lmoe.vocabulary import PreferenceLoss


def preference_loss(
    margin: Tensor, *, beta: float, loss_type: PreferenceLoss = PreferenceLoss.sigmoid, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of DPO and its kin, of h, by how much more the chosen answer has gained on its reference.

    sigmoid: -(1 - e) log s(b h) - e log s(-b h) (DPO, 2305.18290, equation 7; e > 0: 2305.18290's authors' conservative
    DPO). hinge: max(0, 1 - b h) (SLiC, 2305.10425, equation 3, on log ratios). ipo: (h - 1 / (2 b))^2 (2310.12036,
    equation 17).

    Args:
        margin: (B,) h = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected).
        beta: b, above 0.
        label_smoothing: e, from 0 to below 0.5, of sigmoid alone.

    Returns:
        (B,) in the type of the margin.
    """
    match loss_type:
        case PreferenceLoss.hinge:
            return relu(1 - beta * margin)
        case PreferenceLoss.ipo:
            return (margin - 1 / (2 * beta)).square()
    gained = beta * margin
    if not label_smoothing:
        return -logsigmoid(gained)
    return -(1 - label_smoothing) * logsigmoid(gained) - label_smoothing * logsigmoid(-gained)


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log s(b (c - r) - g), without a reference (SimPO, 2405.14734, equation 6).

    Args:
        chosen, rejected: (B,) c and r, mean log p of a token of each answer.
        beta: b, above 0.
        gamma: g, the margin that is aimed at.

    Returns:
        (B,).
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log s(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) (ORPO, 2403.07691, equation 7).

    Args:
        chosen, rejected: (B,) log p, mean of a token of each answer; below 0.

    Returns:
        (B,), to be weighed by lambda beside the cross-entropy of the chosen answer.
    """
    return -logsigmoid((chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected)))


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0; near 0 by expm1, or it would be log(0)."""
    near = x > -0.6931
    safe = torch.where(near, x, -0.6931).clamp(max=-torch.finfo(x.dtype).tiny)
    return torch.where(near, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(x)))


def kto_loss(
    reward: Tensor, good: Tensor, baseline: Tensor, *, beta: float, good_weight: float, bad_weight: float
) -> Tensor:
    """w (1 - s(b (r - z))) of a good answer, w (1 - s(b (z - r))) of a bad one (KTO, 2402.01306, equation 8).

    Args:
        reward: (B,) r = log p - log p_ref of each answer.
        good: (B,) bool.
        baseline: () z, how far the policy is from its reference (`kto_baseline`); no gradient goes through it.
        beta: b, above 0.
        good_weight, bad_weight: w of the good and of the bad answers.

    Returns:
        (B,).
    """
    gained = beta * (reward - baseline.detach())
    signed = torch.where(good, gained, -gained)
    return torch.where(good, good_weight, bad_weight) * (1 - torch.sigmoid(signed))


def kto_baseline(mismatched_reward: Tensor) -> Tensor:
    """max(0, mean r) over answers that were given to other prompts (KTO, 2402.01306, section 4.1): () without gradient.

    Args:
        mismatched_reward: (B,) log p - log p_ref of such answers, behind prompts that they do not belong to.
    """
    return mismatched_reward.detach().mean().clamp(min=0)
