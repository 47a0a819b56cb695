"""Where things are, found by structure."""

import pytest
from torch import nn

from lmoe.backbones.layout import decoder_layers, default_attention_keywords, layouts
from lmoe.errors import BackboneError
from tests.tiny_models import DENSE_FAMILIES, tiny_model


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_decoder_layers_and_their_linears_are_found_in_order(family):
    model = tiny_model(family)
    path, layers = decoder_layers(model)
    assert path == "model.layers" and len(layers) == 2
    found = layouts(model)
    assert [layout.index for layout in found] == [0, 1]
    for layout in found:
        assert layout.native_experts is None
        for name, linear in {**layout.ffn, **layout.attention}.items():
            assert name.startswith(f"model.layers.{layout.index}.")
            assert model.get_submodule(name) is linear
    linears = sum(isinstance(m, nn.Linear) for m in layers.modules())
    assert sum(len(layout.ffn) + len(layout.attention) for layout in found) == linears


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_native_experts_are_named_and_offer_no_ffn_linear(family):
    for layout in layouts(tiny_model(family)):
        assert layout.native_experts == f"model.layers.{layout.index}.mlp.experts"
        assert not layout.ffn and layout.attention


def test_attention_defaults_to_q_and_v_or_the_fused_qkv_or_nothing():
    assert default_attention_keywords(layouts(tiny_model("qwen3"))) == ["q_proj", "v_proj"]
    assert default_attention_keywords(layouts(tiny_model("phi3"))) == ["qkv_proj"]
    assert default_attention_keywords([]) == []


def test_of_several_lists_of_layers_the_largest_is_the_decoder():
    def tower(width: int) -> nn.ModuleList:
        return nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(width, width)}) for _ in range(2)])

    model = nn.ModuleDict({"vision": tower(4), "text": tower(8)})
    assert decoder_layers(model)[0] == "text"


def test_a_model_without_decoder_layers_says_what_it_has():
    with pytest.raises(
        BackboneError, match=r"Sequential: no list of decoder layers .* Top-level modules: 0 \(Linear\)"
    ):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))
