"""DeepSeek-V3: latent attention, dense first layers, then sigmoid routing with shared experts."""

from lmoe.backbones.family import Family, NativeNames, NativeScores

FAMILY = Family(
    model_types=("deepseek_v3", "glm4_moe"),
    query_value=("q_proj", "v_proj", "q_b_proj", "kv_b_proj"),
    native=NativeNames(shared="mlp.shared_experts", scores=NativeScores.sigmoid),
)
