"""Adapters are folded into weights that hold plain numbers and belong to one module; the others are refused."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import lmoe
from lmoe.errors import BlendError, CheckpointError, InjectionError
from lmoe.export.merge import merge_adapters, merge_average
from tests.peft_experts import write_peft
from tests.tiny_models import randomise, tiny_model

FP8 = torch.float8_e4m3fn
ON_O = {"lora_r": 4, "target_keywords": ["o_proj"], "attn_lora": {"enabled": False}}


def stored_in_8_bits() -> PreTrainedModel:
    """The weights of the layers are codes, as of a base whose files hold them beside their scales."""
    model = tiny_model()
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().to(FP8), requires_grad=False)
    return model


# --- 8-bit floats


@pytest.mark.parametrize(
    ("injection", "merge"),
    [(ON_O | {"strategy": "dense_lora"}, merge_adapters), (ON_O, merge_average)],
    ids=["dense_lora", "average of experts"],
)
def test_a_base_of_8_bit_floats_is_not_merged_into(injection, merge):
    model = stored_in_8_bits()
    lmoe.inject(model, injection)
    randomise(model)
    weight = model.model.layers[0].self_attn.o_proj.base_layer.weight.view(torch.uint8)
    codes = weight.clone()
    with pytest.raises(CheckpointError, match="o_proj is quantised, and a merged weight would be another one"):
        merge(model)
    assert torch.equal(weight, codes)


def test_a_blend_is_not_folded_into_8_bit_floats(tmp_path):
    blend = lmoe.Blend(stored_in_8_bits(), {"code": write_peft(tiny_model(), tmp_path / "code")}, {"code": 1.0})
    with pytest.raises(BlendError, match="is quantised: adding to it would round"):
        blend.fold()


@pytest.mark.parametrize(
    ("injection", "what"),
    [
        ({"attn_lora": {"use_dora": True}}, "injection.attn_lora.use_dora needs the numbers of the weight"),
        ({"init_lora": "svd"}, "init_lora=svd needs the numbers of the weight"),
        ({"strategy": "moe_expert_lora", "share_base": False}, r"share_base=false \(gate_proj\) needs the numbers"),
    ],
)
def test_what_needs_numbers_is_refused_over_8_bit_floats(injection, what):
    with pytest.raises(InjectionError, match=what):
        lmoe.inject(stored_in_8_bits(), injection)


# --- rows of zeros


def test_dora_merges_a_row_of_zeros_as_its_forward_has_it():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    lmoe.inject(model, {"strategy": "dense_lora", "target_keywords": [], "attn_lora": {"use_dora": True}})
    randomise(model)
    site = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        site.lora_B[3] = 0
    x = torch.randn(2, 5, site.lora_A.shape[1])
    with torch.no_grad():
        expected = site(x)
    merged = merge_adapters(model)["model.layers.0.self_attn.q_proj.weight"]
    assert not merged[3].any() and merged.isfinite().all()
    torch.testing.assert_close(x @ merged.t(), expected, atol=1e-5, rtol=1e-4)


# --- weights that two modules hold


@pytest.mark.parametrize(
    ("injection", "merge"),
    [(ON_O | {"strategy": "dense_lora"}, merge_adapters), (ON_O, merge_average)],
    ids=["dense_lora", "average of experts"],
)
def test_a_weight_that_two_linears_hold_is_not_merged_into(injection, merge):
    model = tiny_model()
    first, second = (layer.self_attn.o_proj for layer in model.model.layers)
    second.weight = first.weight
    lmoe.inject(model, injection)
    randomise(model)
    before = first.weight.clone()
    names = r"layers\.0\.self_attn\.o_proj shares its weight with model\.layers\.1\.self_attn\.o_proj\.weight"
    with pytest.raises(CheckpointError, match=names):
        merge(model)
    assert torch.equal(first.weight, before)
