"""All experts in two matmuls equal the sum over experts, in plain operations and written into the output."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from lmoe.ops.lora import lora_delta
from lmoe.ops.stacked import add_stacked, stacked_delta
from lmoe.vocabulary import Mixing

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)
SHAPES = st.sampled_from([(), (3,), (2, 3), (1, 2, 2)])
DTYPES = st.sampled_from([torch.float32, torch.float64])


def loop_delta(x, lora_A, lora_B, weights, scaling):
    """Expert by expert, with the matrices multiplied out; one lora_A serves all where there is one only."""
    return sum(
        scaling * weights[..., e : e + 1] * (x @ (lora_B[e] @ lora_A[e % len(lora_A)]).T) for e in range(len(lora_B))
    )


def loop_of_factors(x, lora_A, lora_B, weights):
    """Token by token, with both factors averaged before they are multiplied."""
    rows = []
    for token, w in zip(x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1]), strict=True):
        B = sum(w[e] * lora_B[e] for e in range(len(lora_B)))
        A = sum(w[e] * lora_A[e % len(lora_A)] for e in range(len(lora_B)))
        rows.append(B @ (A @ token))
    return torch.stack(rows).view(*x.shape[:-1], -1)


def down(x: Tensor, lora_A: Tensor) -> Tensor:
    """h_e = A_e x."""
    return linear(x, lora_A.flatten(0, 1)).unflatten(-1, lora_A.shape[:2])


def plain(x, lora_A, lora_B, weights, scaling):
    return stacked_delta(down(x, lora_A), lora_B, weights * scaling)


def written(x, lora_A, lora_B, weights, scaling):
    """`add_stacked` into zeros."""
    y = torch.zeros(*x.shape[:-1], lora_B.shape[1], dtype=x.dtype)
    return add_stacked(y, down(x, lora_A), lora_B, weights * scaling)


def factors(lead, experts, rank, dtype, *, shared_A=False) -> list[Tensor]:
    """x, A, B and weights, random, with gradients."""
    shapes = ((*lead, 6), (1 if shared_A else experts, rank, 6), (experts, 5, rank))
    inputs = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return [*inputs, torch.rand(*lead, experts, dtype=dtype, requires_grad=True)]


def agree(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * upstream).sum(), inputs),
        torch.autograd.grad((theirs * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("delta", [plain, written])
@FEW
@given(
    experts=st.integers(1, 5),
    rank=st.integers(1, 4),
    lead=SHAPES,
    shared_A=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_the_delta_and_its_gradients_equal_the_sum_over_experts(delta, experts, rank, lead, shared_A, dtype, seed):
    torch.manual_seed(seed)
    inputs = factors(lead, experts, rank, dtype, shared_A=shared_A)
    agree(delta(*inputs, 1.7), loop_delta(*inputs, 1.7), inputs)


@FEW
@given(experts=st.integers(1, 4), lead=SHAPES, shared_A=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99))
def test_averaged_factors_and_their_gradients_equal_the_loop(experts, lead, shared_A, dtype, seed):
    torch.manual_seed(seed)
    inputs = x, lora_A, lora_B, weights = factors(lead, experts, 2, dtype, shared_A=shared_A)
    # With one A for all, (sum_e w_e) A x: the loop says the same.
    agree(
        stacked_delta(down(x, lora_A), lora_B, weights, mixing=Mixing.factors), loop_of_factors(*inputs), list(inputs)
    )


@pytest.mark.parametrize("delta", [plain, written])
@pytest.mark.parametrize("shared_A", [False, True])
def test_gradcheck_of_the_delta(delta, shared_A):
    torch.manual_seed(0)
    inputs = factors((3,), 2, 2, torch.float64, shared_A=shared_A)
    assert torch.autograd.gradcheck(lambda *t: delta(*t, 0.5), inputs)


def test_adding_writes_into_y_and_hands_its_gradient_on():
    torch.manual_seed(0)
    x, lora_A, lora_B, weights = factors((2, 3), 3, 2, torch.float64)
    start = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    y = start.clone()
    where = y.data_ptr()
    out = add_stacked(y, down(x, lora_A), lora_B, weights)
    assert out.data_ptr() == where
    torch.testing.assert_close(out, start + plain(x, lora_A, lora_B, weights, 1.0))
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * upstream).sum(), start)
    assert torch.equal(gradient, upstream)


def test_adding_to_a_bfloat16_y_adds_the_delta_in_float32_and_gives_float32_gradients():
    torch.manual_seed(0)
    inputs = x, lora_A, lora_B, weights = factors((4,), 3, 2, torch.float32)
    y = torch.randn(4, 5).bfloat16()
    out = add_stacked(y.clone(), down(x, lora_A), lora_B, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), y.float() + plain(*inputs, 1.0), atol=0.05, rtol=0.02)
    for gradient, leaf in zip(torch.autograd.grad(out.float().sum(), inputs), inputs, strict=True):
        assert gradient.dtype == torch.float32 and gradient.shape == leaf.shape


@pytest.mark.parametrize("delta", [plain, written])
def test_an_expert_with_weight_zero_gets_exactly_no_gradient(delta):
    torch.manual_seed(0)
    x, lora_A, lora_B = torch.randn(3, 4), torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 5, 2)
    lora_B.requires_grad_()
    delta(x, lora_A, lora_B, torch.tensor([[1.0, 0.0]] * 3), 1.0).sum().backward()
    assert lora_A.grad is not None and lora_B.grad is not None
    assert lora_A.grad[0].any() and not lora_A.grad[1].any()
    assert lora_B.grad[0].any() and not lora_B.grad[1].any()


@pytest.mark.parametrize("delta", [plain, written])
def test_one_expert_with_weight_one_is_the_single_branch(delta):
    torch.manual_seed(0)
    x, lora_A, lora_B = torch.randn(3, 4), torch.randn(1, 2, 4), torch.randn(1, 5, 2)
    torch.testing.assert_close(
        delta(x, lora_A, lora_B, torch.ones(3, 1), 0.5), lora_delta(x, lora_A[0], lora_B[0], 0.5)
    )
