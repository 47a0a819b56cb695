"""A linear classifier that is fitted to the end."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lmoe.ops.softmax_regression import PENALTY, softmax_regression


@pytest.mark.parametrize("with_bias", [True, False])
def test_nothing_near_it_loses_less(with_bias):
    torch.manual_seed(0)
    samples, targets = torch.randn(60, 5) * torch.tensor([1, 10, 0.1, 3, 1]) + 2, torch.arange(60) % 3
    samples[targets == 1, 0] += 1.5
    weight, bias = softmax_regression(samples, targets, 3, with_bias=with_bias)
    assert with_bias == bool(bias.any())
    std = samples.double().std(0, correction=0)

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        z = samples.double() @ weight.t() + bias
        return cross_entropy(z, targets) + PENALTY * (weight * std).square().sum() / 3

    best = loss(weight, bias)
    for _ in range(50):
        moved = 0.05 * torch.randn(3, dtype=torch.float64) if with_bias else torch.zeros(3)
        assert loss(weight + 0.05 * torch.randn_like(weight) / std, bias + moved) > best
