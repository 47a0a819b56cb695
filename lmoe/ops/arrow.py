"""Routing without training: a token goes to the experts that answer its direction.

Shapes: D in, S sites that read one input, E experts; `...` leading token dimensions.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def arrow_weights(x: Tensor, directions: Tensor, present: Tensor, *, top_k: int, temperature: float) -> Tensor:
    """softmax over the top_k experts of |x . v_e| / temperature (Arrow, 2405.11157, section 4).

    v_e is the top right singular vector of B_e A_e at the site; its sign says nothing, so the absolute value counts.
    Differs from the paper: several sites that read the same input are one matmul, and an expert without a branch at a
    site does not take part there.

    Args:
        x: (..., D).
        directions: (S, E, D) of length 1, float32.
        present: (S, E) bool; False leaves an expert out at a site.
        top_k: experts of each token; more than a site has means all of them.
        temperature: above 0.

    Returns:
        (..., S, E) in float32; rows of a site without experts are 0.
    """
    sites, experts, width = directions.shape
    scores = linear(x.float(), directions.view(sites * experts, width)).abs()
    scores = scores.unflatten(-1, (sites, experts)).masked_fill(~present, -torch.inf)
    kept = scores.topk(min(top_k, experts), dim=-1)
    shares = torch.softmax(kept.values / temperature, dim=-1).masked_fill(kept.values == -torch.inf, 0.0)
    return torch.zeros_like(scores).scatter(-1, kept.indices, shares)
