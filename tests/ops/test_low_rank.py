"""Low-rank products through their factors: the same as through the product."""

import pytest
import torch
from torch.testing import assert_close

from lmoe.ops.arrow import arrow_weights
from lmoe.ops.low_rank import product_svd, top_direction, truncated
from tests.reference.dumb_arrow import dumb_arrow


def factors(rank=5, width=12, out=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_singular_values_are_those_of_the_product(rank):
    lora_A, lora_B = factors(rank)
    left, values, right = product_svd(lora_A, lora_B)
    product = lora_B.double() @ lora_A.double()
    assert_close(left @ values.diag() @ right, product)
    assert_close(values, torch.linalg.svdvals(product)[: len(values)])


def test_truncation_is_the_nearest_of_its_rank_and_says_how_far_it_is():
    lora_A, lora_B = factors()
    near_A, near_B, error = truncated(lora_A, lora_B, 2)
    values = torch.linalg.svdvals(lora_B @ lora_A)
    assert near_A.shape == (2, 12) and near_B.shape == (9, 2)
    assert error == pytest.approx((values[2:].norm() / values.norm()).item(), rel=1e-5)
    assert ((lora_B @ lora_A - near_B @ near_A).norm() / values.norm()).item() == pytest.approx(error, rel=1e-4)


def test_the_whole_rank_loses_nothing_and_a_product_of_0_stays_0():
    lora_A, lora_B = factors()
    near_A, near_B, error = truncated(lora_A, lora_B, 99)
    assert_close(near_B @ near_A, lora_B @ lora_A, atol=1e-5, rtol=1e-4)
    assert error < 1e-6
    assert truncated(lora_A, torch.zeros_like(lora_B), 2)[2] == 0.0


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_the_top_direction_is_the_first_right_singular_vector_up_to_its_sign(rank):
    lora_A, lora_B = factors(rank)
    expected = torch.linalg.svd(lora_B @ lora_A).Vh[0]
    assert abs(top_direction(lora_A, lora_B) @ expected) == pytest.approx(1, abs=1e-5)


def test_the_top_direction_of_dependent_or_zero_factors_is_finite():
    lora_A, lora_B = factors()
    twice = lora_A.clone()
    twice[1] = twice[0]
    assert abs(top_direction(twice, lora_B) @ torch.linalg.svd(lora_B @ twice).Vh[0]) == pytest.approx(1, abs=1e-5)
    assert not top_direction(lora_A, torch.zeros_like(lora_B)).any()
    assert not top_direction(torch.zeros_like(lora_A), lora_B).any()


@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_arrow_weights_equal_a_loop_and_leave_absent_experts_out(top_k):
    pairs = [[factors(3, seed=site * 4 + e) for e in range(4)] for site in range(2)]
    branches = [[(*pair, 1.0) for pair in site] for site in pairs]
    branches[1][2] = None
    directions = torch.stack([torch.stack([top_direction(*pair) for pair in site]) for site in pairs])
    present = torch.tensor([[branch is not None for branch in site] for site in branches])
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(9))
    found = arrow_weights(x, directions, present, top_k=top_k, temperature=0.5)
    for site in range(2):
        assert_close(found[:, site], dumb_arrow(x, branches[site], top_k, 0.5)[1], atol=1e-5, rtol=1e-4)
    assert not arrow_weights(x, directions, torch.zeros_like(present), top_k=2, temperature=1.0).any()
