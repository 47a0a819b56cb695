"""A site and its losses, token by token and expert by expert.

N tokens, E experts, D in, O out, R rank. Nothing is stacked before it is multiplied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.dumb_gates import Choice


@dataclass
class Branch:
    """scale * B A x: an expert that is always on."""

    lora_A: Tensor
    lora_B: Tensor
    scale: float


def mixture(
    x_ND: Tensor,
    base_OD: Tensor,
    bias_O: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: list[list[Tensor]],
    *,
    scaling: float,
    mixing: str = "outputs",
    start: tuple[Tensor, Tensor] | None = None,
    shared: Branch | None = None,
) -> Tensor:
    """(N, O): W x + b + s * sum_e w_e (B_e A_e - B_e0 A_e0) x, or with averaged factors (see 2510.17898).

    Args:
        lora_A: (E, R, D), or (1, R, D) where the experts share it.
        weights: E routing weights of each token.
        start: A_0 and B_0, whose own function is taken off (init_lora=svd).
    """
    rows = []
    for x, w in zip(x_ND, weights, strict=True):
        y = base_OD @ x + bias_O
        y = y + scaling * delta(x, lora_A, lora_B, w, mixing)
        if start is not None:
            y = y - scaling * delta(x, start[0], start[1], w, mixing)
        if shared is not None:
            y = y + shared.scale * (shared.lora_B @ (shared.lora_A @ x))
        rows.append(y)
    return torch.stack(rows)


def delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, w: list[Tensor], mixing: str) -> Tensor:
    """sum_e w_e B_e (A_e x), or (sum_e w_e B_e) ((sum_e w_e A_e) x)."""
    experts = range(len(w))
    own_A = [lora_A[e if len(lora_A) > 1 else 0] for e in experts]
    if mixing == "factors":
        return sum(w[e] * lora_B[e] for e in experts) @ (sum(w[e] * own_A[e] for e in experts) @ x)
    return sum(w[e] * (lora_B[e] @ (own_A[e] @ x)) for e in experts)


def logits(x_ND: Tensor, router_ED: Tensor) -> Tensor:
    """(N, E): z_te = W_e x_t."""
    return torch.stack([torch.stack([row @ x for row in router_ED]) for x in x_ND])


def pooled(x_TD: Tensor, prompt: list[bool]) -> Tensor:
    """(D,): mean of the prompt's tokens; 0 without any."""
    inside = [x for x, is_prompt in zip(x_TD, prompt, strict=True) if is_prompt]
    return sum(inside) / len(inside) if inside else x_TD[0] * 0


def balance_loss(choices: list[Choice], valid: list[bool]) -> Tensor:
    """E * sum_e f_e P_e over valid tokens (Switch, 2101.03961, equations 4 to 6, over K)."""
    kept = [choice for choice, is_valid in zip(choices, valid, strict=True) if is_valid]
    experts = len(kept[0].probs)
    f = [sum(choice.shares[e] for choice in kept) / len(kept) for e in range(experts)]
    p = [sum(choice.probs[e] for choice in kept) / len(kept) for e in range(experts)]
    return experts * sum(f[e] * p[e] for e in range(experts))


def importance_cv(choices: list[Choice], valid: list[bool]) -> Tensor:
    """(standard deviation / mean)^2 of each expert's summed weight (1701.06538, equation 7)."""
    kept = [choice for choice, is_valid in zip(choices, valid, strict=True) if is_valid]
    experts = len(kept[0].weights)
    importance = [sum(choice.weights[e] for choice in kept) for e in range(experts)]
    mean = sum(importance) / experts
    return sum((value - mean) ** 2 for value in importance) / experts / mean**2


def relu_l1(choices: list[Choice], valid: list[bool], top_k: int) -> Tensor:
    """mean_t sum_e f_e w_te with f_e = E / K * share of the tokens that use e (ReMoE, 2412.14711, eq. 8, 9)."""
    kept = [choice for choice, is_valid in zip(choices, valid, strict=True) if is_valid]
    experts = len(kept[0].weights)
    f = [experts / top_k * sum(e in choice.chosen for choice in kept) / len(kept) for e in range(experts)]
    return sum(f[e] * choice.weights[e] for choice in kept for e in range(experts)) / len(kept)


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Lengths of the rows of W + s B A, from the dense sum (DoRA, 2402.09353, equation 5)."""
    dense = weight + scaling * lora_B @ lora_A
    return torch.stack([sum(value * value for value in row) ** 0.5 for row in dense])
