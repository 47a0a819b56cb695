"""A frozen Linear with one branch in one function equals both in plain operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from lmoe.ops.frozen_lora import frozen_and_lora
from lmoe.ops.lora import lora_delta

FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)
D, O = 6, 5  # noqa: E741 - the letters of the docstrings


def made(lead: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[Tensor]:
    """x, A and B, random, with gradients, and W and bias without."""
    shapes = ((*lead, D), (rank, D), (O, rank))
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return [*leaves, torch.randn(O, D, dtype=dtype), torch.randn(O, dtype=dtype)]


@FEW
@given(
    lead=st.sampled_from([(), (4,), (2, 3), (0,)]),
    rank=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_equal_the_plain_operations(lead, rank, bias, dtype, seed):
    torch.manual_seed(seed)
    x, lora_A, lora_B, weight, offset = made(lead, rank, dtype)
    given_bias = offset if bias else None
    ours = frozen_and_lora(x, weight, given_bias, lora_A, lora_B, 1.7, dtype)
    plain = linear(x, weight, given_bias) + lora_delta(x, lora_A, lora_B, 1.7)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    along = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, [x, lora_A, lora_B], along) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_gradcheck():
    torch.manual_seed(0)
    x, lora_A, lora_B, weight, bias = made((2, 3), 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: frozen_and_lora(leaves[0], weight, bias, leaves[1], leaves[2], 0.5, torch.float64),
        (x, lora_A, lora_B),
    )


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_each_gradient_is_the_same_whatever_else_is_asked_for(trained):
    torch.manual_seed(0)
    x, lora_A, lora_B, weight, bias = made((4,), 2, torch.float64)
    leaves = [x, lora_A, lora_B]
    every = torch.autograd.grad(frozen_and_lora(*_ordered(leaves, weight, bias)).square().sum(), leaves)
    fewer = [leaf if index in trained else leaf.detach() for index, leaf in enumerate(leaves)]
    some = torch.autograd.grad(
        frozen_and_lora(*_ordered(fewer, weight, bias)).square().sum(), [leaves[i] for i in trained]
    )
    for index, gradient in zip(trained, some, strict=True):
        torch.testing.assert_close(gradient, every[index])


def _ordered(leaves: list[Tensor], weight: Tensor, bias: Tensor):
    x, lora_A, lora_B = leaves
    return x, weight, bias, lora_A, lora_B, 1.7, torch.float64


def test_a_bfloat16_branch_gives_float32_gradients_near_those_of_float64():
    torch.manual_seed(0)
    x, lora_A, lora_B, weight, bias = made((9,), 3, torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    y = frozen_and_lora(half, weight.bfloat16(), bias, lora_A, lora_B, 0.5, torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in (half, lora_A, lora_B)]
    plain = linear(exact[0], weight.double(), bias.double()) + lora_delta(*exact, 0.5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), plain, atol=0.05, rtol=0.02)
    along = torch.randn(9, O).bfloat16()
    ours = torch.autograd.grad(y, [half, lora_A, lora_B], along)
    theirs = torch.autograd.grad(plain, exact, along.double())
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.15, rtol=0.03)
