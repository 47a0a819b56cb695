"""Sizes and numbers of what counts as a Linear."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lmoe.ops.linear_sizes import is_linear, sizes, weight_OD

D, O = 6, 10  # noqa: E741 - the letters of the docstrings


def made(kind: str) -> nn.Module:
    return nn.Linear(D, O) if kind == "Linear" else Conv1D(O, D)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_both_count_as_linear_with_the_sizes_of_their_input_and_output(kind):
    linear = made(kind)
    assert is_linear(linear)
    assert sizes(linear) == (D, O)
    assert linear(torch.randn(3, D)).shape == (3, O)


@pytest.mark.parametrize("other", [nn.Embedding(O, D), nn.LayerNorm(D), nn.Conv1d(D, O, 1), nn.Bilinear(D, D, O)])
def test_other_modules_with_a_weight_do_not(other):
    assert not is_linear(other)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_numbers_are_those_that_the_forward_multiplies_by_whichever_way_they_lie(kind):
    linear, x = made(kind), torch.randn(3, D)
    torch.testing.assert_close(linear(x), x @ weight_OD(linear).t() + linear.bias)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_numbers_are_a_view(kind):
    linear = made(kind)
    with torch.no_grad():
        weight_OD(linear).zero_()
    assert not linear.weight.any()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(D * O // 2, 1, dtype=torch.uint8),
        torch.zeros(O, D, dtype=torch.int8),
        torch.zeros(O, D // 2),
        torch.zeros(O, D).to(torch.float8_e4m3fn),
    ],
    ids=["4 bit, flat", "8 bit", "two numbers in one", "8 bit, floating point"],
)
def test_a_packed_weight_has_no_numbers_and_yet_its_sizes(kind, packed):
    linear = made(kind)
    lies_as = packed.t() if kind == "Conv1D" else packed
    linear.weight = nn.Parameter(lies_as, requires_grad=False)
    assert sizes(linear) == (D, O)
    with pytest.raises(ValueError, match="the weight is quantised"):
        weight_OD(linear)
