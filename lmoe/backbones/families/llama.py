"""The layout that most dense families share: q, k, v, o and gate, up, down."""

from lmoe.backbones.family import Family

FAMILY = Family(
    model_types=(
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "qwen2",
        "qwen3",
        "smollm3",
        "olmo2",
        "olmo3",
        "granite",
    )
)
