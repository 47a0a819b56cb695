"""GLM 4: fused gate and up."""

from lmoe.backbones.family import Family, FfnNames

FAMILY = Family(
    model_types=("glm", "glm4"),
    ffn_names=FfnNames(up="gate_up_proj", gate=None, fused=True, activation="activation_fn"),
)
