"""Losses of preferences, one pair and one token after the other, in float64, so that nobody can doubt them.

They are written as in the papers, with 1 / (1 + e^-x) and plain logarithms: for numbers of ordinary size.
"""

import torch
from torch import Tensor, nn

IGNORE = -100


def token_log_probabilities(logits_TV: Tensor, labels_T: Tensor) -> list[Tensor]:
    """log p of each token that carries a label, given the logits of the token before it."""
    found = []
    for t in range(1, len(labels_T)):
        label = int(labels_T[t])
        if label != IGNORE:
            log_p_V = torch.log_softmax(logits_TV[t - 1].double(), dim=0)
            found.append(log_p_V[label])
    return found


def answer_log_probabilities(model: nn.Module, prompt: list[int], answer: list[int]) -> list[Tensor]:
    """log p of each token of an answer behind its prompt, of a model that sees no other row and no padding."""
    logits_TV = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    return token_log_probabilities(logits_TV, torch.tensor([IGNORE] * len(prompt) + answer))


def total(values: list[Tensor]) -> Tensor:
    """Their sum."""
    added = torch.zeros((), dtype=torch.float64)
    for value in values:
        added = added + value
    return added


def mean(values: list[Tensor]) -> Tensor:
    """Their mean."""
    return total(values) / len(values)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return 1 / (1 + torch.exp(-x))


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of one pair, from log p of its answers."""
    gain_of_chosen = chosen - reference_chosen
    gain_of_rejected = rejected - reference_rejected
    margin = gain_of_chosen - gain_of_rejected
    if loss_type == "hinge":
        short = 1 - beta * margin
        return short if short > 0 else short * 0
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    right = sigmoid(beta * margin)
    return -(1 - label_smoothing) * torch.log(right) - label_smoothing * torch.log(1 - right)


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """The loss of one pair, from the mean log p of a token of its answers."""
    return -torch.log(sigmoid(beta * chosen - beta * rejected - gamma))


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The odds-ratio term of one pair, from the mean log p of a token of its answers."""
    p_chosen, p_rejected = torch.exp(chosen), torch.exp(rejected)
    odds_of_chosen, odds_of_rejected = p_chosen / (1 - p_chosen), p_rejected / (1 - p_rejected)
    return -torch.log(sigmoid(torch.log(odds_of_chosen / odds_of_rejected)))


def orpo(chosen: Tensor, rejected: Tensor, *, weight: float) -> Tensor:
    """The loss of one pair: cross-entropy of a token of the chosen answer, plus the weighted odds-ratio term."""
    return -chosen + weight * odds_ratio(chosen, rejected)


def kto_baseline(mismatched_rewards: list[Tensor]) -> Tensor:
    """Mean reward of mismatched answers, or 0 where it is below 0; a number, without gradient."""
    found = mean(mismatched_rewards).item()
    return torch.tensor(found if found > 0 else 0.0, dtype=torch.float64)


def kto(reward: Tensor, good: bool, baseline: Tensor, *, beta: float, good_weight: float, bad_weight: float) -> Tensor:
    """The loss of one answer, from log p - log p_ref of it."""
    if good:
        return good_weight * (1 - sigmoid(beta * (reward - baseline)))
    return bad_weight * (1 - sigmoid(beta * (baseline - reward)))


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The loss of a reward model on one pair, from the rewards of its answers."""
    return -torch.log(torch.exp(chosen) / (torch.exp(chosen) + torch.exp(rejected)))
