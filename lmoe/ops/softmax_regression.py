"""A linear classifier, fitted to the end.

Shapes: N samples, D dimensions, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lmoe.ops.deviations import deviations

PENALTY = 1e-2
"""Of the mean squared weight, against overfitting to a hundred samples a class."""
ITERATIONS = 100


def softmax_regression(
    samples: Tensor, targets: Tensor, classes: int, *, with_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """W and b of softmax(x W^T + b), from L-BFGS on the mean cross-entropy plus PENALTY sum(V^2) / C.

    Dimensions are standardised while it is fitted, so that each counts alike: V = W std is what is penalised. Without a
    bias they are divided by their deviation alone.

    Args:
        samples: (N, D).
        targets: (N,) int64 classes.
        classes: C.
        with_bias: fit b too.

    Returns:
        W (C, D) and b (C,) in float64, for samples as they are; without a bias b is 0.
    """
    samples = samples.double()
    std = deviations(samples)
    mean = samples.mean(0) if with_bias else torch.zeros_like(std)
    inputs = (samples - mean) / std
    weight = torch.zeros(classes, samples.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=with_bias)
    fitted = [weight, bias] if with_bias else [weight]
    optimizer = torch.optim.LBFGS(fitted, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(inputs @ weight.t() + bias, targets) + PENALTY * weight.square().sum() / classes
        loss.backward()
        return loss

    optimizer.step(closure)
    own = weight.detach() / std
    return own, bias.detach() - own @ mean
