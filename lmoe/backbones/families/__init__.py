"""The families by model type: one file each, one line here."""

from lmoe.backbones.families import (
    deepseek_v3,
    gemma,
    gemma4,
    glm4,
    gpt2,
    gpt_oss,
    llama,
    phi,
    phi3,
    qwen3_5,
    qwen_moe,
)
from lmoe.backbones.family import Family

_MODULES = (llama, gemma, gemma4, phi, phi3, glm4, gpt2, qwen3_5, qwen_moe, gpt_oss, deepseek_v3)

FAMILIES: dict[str, Family] = {
    model_type: module.FAMILY for module in _MODULES for model_type in module.FAMILY.model_types
}
