"""What moves after an optimizer step to keep experts in use, without a gradient.

Shapes: E experts.
"""

import torch
from torch import Tensor

from lmoe.vocabulary import L1_LEAST, L1_MOST


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
