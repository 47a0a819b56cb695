"""Low-rank deltas: two matmuls equal the sum over experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.ops.lora import kaiming_lora_A, lora_delta, stacked_delta


def loop_delta(x, lora_A, lora_B, weights, scaling):
    """Expert by expert, with the matrices multiplied out."""
    return sum(scaling * weights[..., e : e + 1] * (x @ (lora_B[e] @ lora_A[e]).T) for e in range(lora_A.shape[0]))


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    experts=st.integers(1, 5),
    rank=st.integers(1, 4),
    lead=st.sampled_from([(), (3,), (2, 3), (1, 2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_stacked_delta_and_its_gradients_equal_the_sum_over_experts(experts, rank, lead, dtype, seed):
    torch.manual_seed(seed)
    inputs = [
        torch.randn(*lead, 6, dtype=dtype, requires_grad=True),
        torch.randn(experts, rank, 6, dtype=dtype, requires_grad=True),
        torch.randn(experts, 5, rank, dtype=dtype, requires_grad=True),
        torch.rand(*lead, experts, dtype=dtype, requires_grad=True),
    ]
    ours, theirs = stacked_delta(*inputs, 1.7), loop_delta(*inputs, 1.7)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * upstream).sum(), inputs),
        torch.autograd.grad((theirs * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_gradcheck_of_stacked_delta():
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (2, 2, 4), (2, 3, 2))]
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: stacked_delta(*t, 0.5), (*inputs, weights))


def test_an_expert_with_weight_zero_gets_exactly_no_gradient():
    torch.manual_seed(0)
    x, lora_A, lora_B = torch.randn(3, 4), torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 5, 2)
    lora_B.requires_grad_()
    stacked_delta(x, lora_A, lora_B, torch.tensor([[1.0, 0.0]] * 3), 1.0).sum().backward()
    assert lora_A.grad is not None and lora_B.grad is not None
    assert lora_A.grad[0].any() and not lora_A.grad[1].any()
    assert lora_B.grad[0].any() and not lora_B.grad[1].any()


def test_one_expert_with_weight_one_is_the_single_branch():
    torch.manual_seed(0)
    x, lora_A, lora_B = torch.randn(3, 4), torch.randn(1, 2, 4), torch.randn(1, 5, 2)
    torch.testing.assert_close(
        stacked_delta(x, lora_A, lora_B, torch.ones(3, 1), 0.5), lora_delta(x, lora_A[0], lora_B[0], 0.5)
    )


@pytest.mark.parametrize("width", [16, 100])
def test_lora_A_starts_as_kaiming_uniform_with_a_sqrt_5(width):
    torch.manual_seed(0)
    ours = kaiming_lora_A((4, 50, width), torch.device("cpu"))
    theirs = torch.empty(50, width)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    assert float(ours.abs().max()) <= width**-0.5
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)
    assert ours.dtype == torch.float32
