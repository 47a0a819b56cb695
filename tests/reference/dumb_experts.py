"""Whole experts, token by token and expert by expert, each with its own full weights W + s B A.

N tokens, K chosen, E experts, D in, O out, R rank. Nothing is sorted, stacked or shared between experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Weight:
    """One weight of the block, and what each expert adds to it.

    Args:
        base: E matrices (O, D), the same one E times where the experts share it.
        bias: E vectors (O,), or E times None.
        lora_A, lora_B: (E, R, D) and (E, O, R), or None where the experts add nothing.
        scale: s.
    """

    base: list[Tensor]
    bias: list[Tensor | None]
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: float = 0.0

    def of(self, x: Tensor, expert: int) -> Tensor:
        """(W_e + s B_e A_e) x + b_e."""
        full = self.base[expert]
        if self.lora_A is not None and self.lora_B is not None:
            full = full + self.scale * (self.lora_B[expert] @ self.lora_A[expert])
        y, bias = full @ x, self.bias[expert]
        return y if bias is None else y + bias


@dataclass
class Ffn:
    """down(inner(first(x))), for one token and one expert.

    Args:
        firsts: the weights that read x, in the order in which `inner` wants what they give.
        inner: between them and `down`.
        down: the last weight.
    """

    firsts: list[Weight]
    inner: Callable[..., Tensor]
    down: Weight

    def of(self, x: Tensor, expert: int) -> Tensor:
        """(O,)."""
        return self.down.of(self.inner(*(first.of(x, expert) for first in self.firsts)), expert)


def mixture(x_ND: Tensor, ffn: Ffn, chosen: list[list[int]], weights: list[list[Tensor]]) -> Tensor:
    """(N, O): sum over the chosen experts of w_e FFN_e(x).

    Args:
        chosen: experts of each token.
        weights: E weights of each token.
    """
    rows = []
    for x, experts, w in zip(x_ND, chosen, weights, strict=True):
        y = ffn.of(x, 0) * 0
        for e in experts:
            y = y + w[e] * ffn.of(x, e)
        rows.append(y)
    return torch.stack(rows)


def rows_of_expert(rows: Tensor, experts: list[int], of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """(S, O): what the expert of each row makes of it."""
    return torch.stack([of(row, expert) for row, expert in zip(rows, experts, strict=True)])


def summed_over_choices(rows: Tensor, order: list[int], weights: Tensor) -> Tensor:
    """(N, O): row number s belongs to choice k of token n where order[s] = n K + k."""
    tokens, choices = weights.shape
    total = [rows[0] * 0 for _ in range(tokens)]
    for n in range(tokens):
        for k in range(choices):
            total[n] = total[n] + weights[n, k] * rows[order.index(n * choices + k)]
    return torch.stack(total)
