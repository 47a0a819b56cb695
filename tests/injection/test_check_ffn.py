"""A feed-forward block is believed only if it computes what its parts suggest."""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import lmoe
from lmoe.errors import InjectionError
from lmoe.injection.build_site import check_ffn, from_parts
from lmoe.ops.ffn_names import FfnNames
from tests.layers.small_ffn import KINDS, block
from tests.layers.small_site import D
from tests.tiny_models import tiny_model


class Swapped(LlamaMLP):
    """The other Linear is activated."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Clamped(LlamaMLP):
    """The inner values are bounded."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-0.1, 0.1))


class Shifted(LlamaMLP):
    """Something is added at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x


class Broken(LlamaMLP):
    """No number at all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


@pytest.mark.parametrize("other", [Swapped, Clamped, Shifted, Broken])
def test_a_block_with_another_formula_is_refused_by_its_name_and_the_model_stays_as_it_was(other):
    """It is the second one: the layer before it would have been fine."""
    model = tiny_model()
    model.model.layers[1].mlp.__class__ = other
    before = [(name, id(module)) for name, module in model.named_modules()]
    formula = "down_proj(act_fn(gate_proj(x)) * up_proj(x))"
    said = f"model.layers.1.mlp ({other.__name__}) computes something else than {formula}; use injection=mixture_lora"
    with pytest.raises(InjectionError, match=re.escape(said)):
        lmoe.inject(model, {"strategy": "moe_expert_lora"})
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    lmoe.inject(model, {"strategy": "mixture_lora"})  # as the message says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_of_transformers_are_believed_in_every_precision(kind, dtype):
    made = block(kind)
    check_ffn(made.module.to(dtype), made.names, "mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_put_together_are_the_block(kind):
    made, x = block(kind), torch.randn(2, 3, D)
    torch.testing.assert_close(from_parts(made.module, made.names, x), made.module(x))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_the_block_is_no_difference_and_its_mode_and_the_random_numbers_stay(training):
    made = block("Conv1D", dropout=0.5)
    made.module.train(training)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_ffn(made.module, made.names, "mlp")
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training is training for module in made.module.modules())


def test_a_block_without_numbers_is_believed():
    with torch.device("meta"):
        check_ffn(nn.Sequential(nn.Linear(2, 2)), FfnNames(), "mlp")
