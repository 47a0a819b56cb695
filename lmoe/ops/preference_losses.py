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

    sigmoid: -(1 - e) log s(b h) - e log s(-b h) (DPO, 2305.18290, equation 7; with e > 0 conservative DPO, Mitchell, "A
    note on DPO with noisy preferences and relationship to IPO", 2023). hinge: max(0, 1 - b h) (hinge of SLiC,
    2305.10425, on log ratios, as RSO has it, 2309.06657). ipo: (h - 1 / (2 b))^2 (2310.12036, equation 17).
    sigmoid with b = 1 of the difference of two rewards is the loss of a Bradley-Terry reward model.

    Args:
        margin: (B,) h = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected), of whole answers in the papers.
            TRL takes the mean of a token of each answer for ipo.
        beta: b, above 0.
        label_smoothing: e, from 0 to below 0.5; hinge and ipo have none.

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
    """-log s(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) (ORPO, 2403.07691, equations 4 and 7).

    Args:
        chosen, rejected: (B,) log p, mean of a token of each answer, at most 0. At 0, where the odds are infinite,
            1 - p is the smallest normal number of the type, and passes no gradient.

    Returns:
        (B,), to be weighed by lambda beside the cross-entropy of the chosen answer.
    """
    return -logsigmoid((chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected)))


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0: by expm1 near 0, by log1p far from it.

    NOTE each branch gets what is harmless to it where the other one counts: an infinite derivative times the 0 that
    `where` sends back is not a number.
    """
    near = x > -0.6931
    x_near = torch.where(near, x, -1.0).clamp(max=-torch.finfo(x.dtype).tiny)
    x_far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(x_near)), torch.log1p(-torch.exp(x_far)))


def kto_loss(
    reward: Tensor, good: Tensor, baseline: Tensor, *, beta: float, good_weight: float, bad_weight: float
) -> Tensor:
    """w (1 - s(b (r - z))) of a good answer, w (1 - s(b (z - r))) of a bad one (KTO, 2402.01306, section 4.1).

    Computed as w s(-b (r - z)) and w s(-b (z - r)), which stay above 0 where s is 1 to the last bit.

    Args:
        reward: (B,) r = log p - log p_ref of each answer.
        good: (B,) bool.
        baseline: () z, how far the policy is from its reference (`kto_baseline`); no gradient goes through it.
        beta: b, above 0.
        good_weight, bad_weight: w of the good and of the bad answers.

    Returns:
        (B,) in the type of the rewards.
    """
    gained = beta * (reward - baseline.detach())
    return torch.where(good, good_weight * torch.sigmoid(-gained), bad_weight * torch.sigmoid(gained))


def kto_baseline(mismatched_reward: Tensor) -> Tensor:
    """max(0, mean r) over answers that were given to other prompts (KTO, 2402.01306, section 4.1): () without gradient.

    Args:
        mismatched_reward: (B,) log p - log p_ref of such answers, behind prompts that they do not belong to; at least
            one.
    """
    return mismatched_reward.detach().mean().clamp(min=0)
