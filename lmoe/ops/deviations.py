"""How far samples lie apart in each dimension, to divide by.

Shapes: N samples, D dimensions.
"""

from torch import Tensor

SMALLEST = 1e-6
"""Of a dimension that hardly varies, so that nothing is divided by 0."""


def deviations(samples_ND: Tensor) -> Tensor:
    """(D,) standard deviation of each dimension, sqrt(mean_n (x_n - mean x)^2), at least SMALLEST.

    Some dimensions of hidden states are many times as large as the others: divided by it, each counts alike.
    """
    return samples_ND.std(0, correction=0).clamp(min=SMALLEST)
