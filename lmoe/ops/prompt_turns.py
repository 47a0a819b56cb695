"""A conversation as turns: each a prompt, and the answer to it.

Shapes: B sequences of T tokens, P turns of all the rows packed into one sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Turns(NamedTuple):
    """Turns in the order in which they stand in a sequence.

    prompt: (B, P, T) bool, the tokens of each turn before its answer.
    ids: (B, T) int64, the turn of each token, from 0 to P - 1.
    number: (B, P) int64, which turn of its row each one is, counted from 0.
    """

    prompt: Tensor
    ids: Tensor
    number: Tensor


def turns(answers: Tensor, row_ids: Tensor, valid: Tensor) -> Turns:
    """A turn begins where a row does, and at the first token after an answer that another answer follows.

    Args:
        answers: (B, T) bool, tokens of answers.
        row_ids: (B, T) int64, the row of each token, from 0 on.
        valid: (B, T) bool, False for padding, which belongs to the turn before it.
    """
    answers = answers & valid
    before = torch.nn.functional.pad(answers, (1, -1))
    new_row = torch.nn.functional.pad(row_ids[:, 1:] != row_ids[:, :-1], (1, 0))
    row_starts = (new_row & valid) | (valid.long().cumsum(-1) == 1) & valid
    starts = row_starts | (valid & ~answers & before & ~new_row & _followed(answers, row_ids))
    ids = (starts.long().cumsum(-1) - 1).clamp(min=0)
    count = max(int(ids.max()) + 1, 1)
    of_turn = ids.unsqueeze(1) == torch.arange(count, device=ids.device)[:, None]
    answered = (answers.unsqueeze(1) & of_turn).long().cumsum(-1) > 0
    first_of_row = torch.where(row_starts, ids, 0).cummax(-1).values
    number = torch.zeros(ids.shape[0], count, dtype=torch.long, device=ids.device)
    number = number.scatter_reduce(1, ids, ids - first_of_row, "amax")
    return Turns(of_turn & ~answered & valid.unsqueeze(1), ids, number)


def _followed(answers: Tensor, row_ids: Tensor) -> Tensor:
    """(B, T) bool: an answer stands at or after this token, in its row."""
    length = answers.shape[1]
    places = torch.where(answers, torch.arange(length, device=answers.device), length)
    following = places.flip(-1).cummin(-1).values.flip(-1)
    return (following < length) & (row_ids.gather(1, following.clamp(max=length - 1)) == row_ids)
