"""The single branch."""

import torch
from torch import nn

from lmoe.layers.lora_linear import LoRALinear


def branch(*, dropout: float = 0.0) -> LoRALinear:
    """One whose B is away from its start."""
    layer = LoRALinear(nn.Linear(6, 5), lora_r=2, scaling=1.5, dropout=dropout)
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


def test_output_is_base_plus_scaled_low_rank_product():
    torch.manual_seed(0)
    layer, x = branch(), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 1.5 * x @ (layer.lora_B @ layer.lora_A).T)


def test_at_its_start_it_is_the_base_bitwise():
    layer, x = LoRALinear(nn.Linear(6, 5), lora_r=2, scaling=1.5, dropout=0.0), torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_disabled_is_the_base_bitwise():
    layer, x = branch(), torch.randn(3, 6)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer, x = branch(dropout=0.5), torch.randn(3, 6)
    assert not torch.equal(layer.train()(x), layer.eval()(x))
    assert torch.equal(layer.eval()(x), layer.eval()(x))


def test_float64_adapters_meet_a_float64_base():
    layer = branch().double()
    assert torch.autograd.gradcheck(layer, (torch.randn(2, 6, dtype=torch.float64, requires_grad=True),))
