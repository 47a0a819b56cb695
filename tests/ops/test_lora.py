"""Low-rank deltas: one branch, and where it starts; the mixture of many is in test_stacked.py."""

import math

import pytest
import torch

from lmoe.ops.lora import kaiming_lora_A, lora_delta


def test_one_branch_is_the_matrices_multiplied_out():
    torch.manual_seed(0)
    x, lora_A, lora_B = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 4), (2, 4), (5, 2)))
    torch.testing.assert_close(lora_delta(x, lora_A, lora_B, 1.7), 1.7 * x @ (lora_B @ lora_A).T)


@pytest.mark.parametrize("width", [16, 100])
def test_lora_A_starts_as_kaiming_uniform_with_a_sqrt_5(width):
    torch.manual_seed(0)
    ours = kaiming_lora_A((4, 50, width), torch.device("cpu"))
    theirs = torch.empty(50, width)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    assert float(ours.abs().max()) <= width**-0.5
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)
    assert ours.dtype == torch.float32
