"""Mixtures with softmax routing named `gate`: Mixtral, OLMoE, Qwen 2 and 3 (Qwen 2 with a shared expert)."""

from lmoe.backbones.family import Family, NativeNames

FAMILY = Family(
    model_types=("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), native=NativeNames(shared="mlp.shared_expert")
)
