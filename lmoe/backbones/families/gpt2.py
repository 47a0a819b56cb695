"""GPT-2: Conv1D in place of Linear, fused q, k and v."""

from lmoe.backbones.family import Family, FfnNames

FAMILY = Family(
    model_types=("gpt2",),
    ffn_names=FfnNames(up="c_fc", down="c_proj", gate=None, activation="act", dropout="dropout"),
    attention=("attn",),
    query_value=("c_attn",),
)
