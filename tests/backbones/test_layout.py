"""Where things are: by family, and by structure in a family that nobody has described."""

import pytest
from torch import nn

from lmoe.backbones.families import FAMILIES, TABLE, Family
from lmoe.backbones.layout import decoder_layers, default_attention_keywords, family_of, layouts
from lmoe.backbones.structure import guessed_family
from lmoe.errors import BackboneError
from lmoe.ops.linear_sizes import is_linear
from tests.tiny_models import DENSE_FAMILIES, NATIVE_FAMILIES, tiny_model

EVERY_FAMILY = (*DENSE_FAMILIES, *NATIVE_FAMILIES)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_linear_of_every_decoder_layer_is_found_once(family):
    model = tiny_model(family)
    path, layers = decoder_layers(model)
    found = layouts(model)
    assert [layout.index for layout in found] == list(range(len(layers)))
    linears = 0
    for layout in found:
        parts = [layout.ffn, layout.attention, layout.shared, layout.other]
        assert layout.attention
        for name, linear in (item for part in parts for item in part.items()):
            assert name.startswith(f"{path}.{layout.index}.")
            assert model.get_submodule(name) is linear
        linears += sum(len(part) for part in parts)
        if layout.native is not None:
            linears += sum(is_linear(module) for module in model.get_submodule(layout.native.router).modules())
    assert linears == sum(is_linear(module) for module in layers.modules())


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_a_dense_family_has_an_ffn_of_known_parts_and_no_mixture(family):
    for layout in layouts(tiny_model(family)):
        assert layout.native is None and layout.ffn
        assert layout.ffn_block is not None and layout.ffn_block.whole
        names = {f"{layout.ffn_block.path}.{name}" for name in layout.ffn_block.names.linears}
        assert names == layout.ffn.keys()


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_a_native_mixture_is_found_with_its_router(family):
    model = tiny_model(family)
    native = [layout.native for layout in layouts(model) if layout.native is not None]
    assert native
    for layout in native:
        assert model.get_submodule(layout.experts).down_proj.dim() == 3
        assert list(model.get_submodule(layout.router).parameters())


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_has_a_file(family):
    assert isinstance(family_of(tiny_model(family)), Family)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_structure_alone_finds_the_same_layout_as_the_family(family, monkeypatch):
    model = tiny_model(family)
    described, known = layouts(model), family_of(model)
    monkeypatch.setattr("lmoe.backbones.layout.FAMILIES", {})
    assert family_of(model) is None
    for ours, guessed in zip(described, layouts(model), strict=True):
        assert (ours.ffn.keys(), ours.attention.keys()) == (guessed.ffn.keys(), guessed.attention.keys())
        assert (ours.native is None) == (guessed.native is None)
        if ours.ffn_block is not None and guessed.ffn_block is not None:
            assert guessed.ffn_block.whole and guessed.ffn_block.names.formula() == ours.ffn_block.names.formula()
    assert known is not None
    if "qkv" not in "".join(known.query_value):
        assert default_attention_keywords(model, described)


def test_attention_defaults_to_q_and_v_or_the_fused_qkv_or_nothing():
    keywords = {
        family: default_attention_keywords(model, layouts(model))
        for family in ("qwen3", "phi3", "gpt2", "deepseek_v3")
        for model in [tiny_model(family)]
    }
    assert keywords == {
        "qwen3": ["q_proj", "v_proj"],
        "phi3": ["qkv_proj"],
        "gpt2": ["c_attn"],
        "deepseek_v3": ["q_b_proj", "kv_b_proj"],
    }
    assert default_attention_keywords(tiny_model(), []) == []


def test_no_model_type_belongs_to_two_families():
    assert len(TABLE) >= 11
    assert len(FAMILIES) == sum(len(family.model_types) for family in TABLE)


def layer(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"self_attn": nn.Linear(width, width), "mlp": nn.Linear(width, width)})


def test_of_several_lists_of_layers_the_largest_is_the_decoder():
    model = nn.ModuleDict({name: nn.ModuleList([layer(width)]) for name, width in (("vision", 4), ("text", 8))})
    assert decoder_layers(model)[0] == "text"


def test_the_decoder_of_a_multimodal_model_is_its_text_part_however_large_the_other_is():
    model = tiny_model("gemma3")
    path, layers = decoder_layers(model)
    assert "language_model" in path and "vision" not in path
    assert len(layers) == 2


def test_a_model_without_decoder_layers_says_what_it_has_and_what_to_do():
    text = r"Sequential: no list of decoder layers .* Top-level modules: 0 \(Linear\).* lmoe/backbones/families"
    with pytest.raises(BackboneError, match=text):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_an_unknown_layer_is_guessed_by_the_names_of_its_parts():
    ffn = nn.ModuleDict({"w1": nn.Linear(4, 8), "w2": nn.Linear(8, 4), "w3": nn.Linear(4, 8), "act": nn.SiLU()})
    unknown = nn.ModuleDict({"attention": nn.ModuleDict({"Wqkv": nn.Linear(4, 12)}), "feed_forward": ffn})
    family = guessed_family(unknown)
    assert family.ffn_names.formula() == "w2(act(w1(x)) * w3(x))"
    assert (family.ffn, family.attention, family.query_value) == ("feed_forward", ("attention",), ("Wqkv",))
