"""What routers are taught, token by token and expert by expert: E experts, C targets."""

import torch
from torch import Tensor


def experts_of(target: int, experts: int, count: int) -> list[int]:
    """Dealt like cards: expert 0 to target 0, 1 to 1, and again from 0 when every target has one."""
    hands: list[list[int]] = [[] for _ in range(count)]
    for e in range(experts):
        hands[e % count].append(e)
    return hands[target] if target >= 0 else list(range(experts))


def cross_entropy(z: Tensor, target: int, count: int) -> Tensor:
    """-ln of what softmax gives to the experts of the target; 0 for a token without one."""
    if target < 0:
        return z.new_zeros(())
    powers = [torch.exp(value) for value in z]
    return -torch.log(sum(powers[e] for e in experts_of(target, len(z), count)) / sum(powers))


def loss(logits_NE: Tensor, targets: list[int], valid: list[bool], count: int) -> Tensor:
    """Mean over valid tokens."""
    kept = [cross_entropy(z, c, count) for z, c, v in zip(logits_NE, targets, valid, strict=True) if v]
    return sum(kept) / max(len(kept), 1) + logits_NE.new_zeros(())


def turns(answers: list[bool], rows: list[int], valid: list[bool]) -> list[list[list[int]]]:
    """Of one sequence: for each row its turns, and of each turn the tokens before its answer, in order.

    A turn begins with its row, and at the first token behind an answer that another answer of the row follows.
    """
    found = []
    for row in dict.fromkeys(r for r, v in zip(rows, valid, strict=True) if v):
        places = [t for t in range(len(rows)) if valid[t] and rows[t] == row]
        own: list[list[int]] = [[]]
        answered = False
        for number, t in enumerate(places):
            behind = number > 0 and answers[places[number - 1]] and not answers[t]
            if behind and any(answers[later] for later in places[number:]):
                own.append([])
                answered = False
            answered = answered or answers[t]
            if not answered:
                own[-1].append(t)
        found.append(own)
    return found
