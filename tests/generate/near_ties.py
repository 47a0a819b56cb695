"""Whether two answers part at a near-tie: where the two likeliest tokens are as likely as rounding can tell."""

import torch
from torch import Tensor

GAP = 1e-3
"""Of the two largest logits; float32 rounds those of tiny models to about 1e-5."""


@torch.no_grad()
def part_at_a_near_tie(model, prompt: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether the first token in which the answers (N,) and (M,) to a prompt (T,) differ is a near-tie."""
    common = min(len(one), len(other))
    different = (one[:common] != other[:common]).nonzero()
    if not len(different):
        return False
    first = int(different[0])
    logits = model(input_ids=torch.cat([prompt, one[:first]])[None]).logits[0, -1].float()
    top = logits.topk(2)
    return set(top.indices.tolist()) == {int(one[first]), int(other[first])} and bool(top.values.diff().abs() < GAP)
