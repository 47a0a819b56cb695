"""Qwen 3.5 and Qwen3-Next: three layers of linear attention to one of full attention; dense or a mixture."""

from lmoe.backbones.family import Family, NativeNames

FAMILY = Family(
    model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"),
    attention=("self_attn", "linear_attn"),
    native=NativeNames(shared="mlp.shared_expert"),
)
