"""Phi 3: fused q, k and v, fused gate and up."""

from lmoe.backbones.family import Family, FfnNames

FAMILY = Family(
    model_types=("phi3",),
    ffn_names=FfnNames(up="gate_up_proj", gate=None, fused=True, activation="activation_fn"),
    query_value=("qkv_proj",),
)
