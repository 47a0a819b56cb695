"""How the model types of each family name their parts: a table, one entry a family."""

from dataclasses import dataclass, field

from lmoe.ops.ffn_names import FfnNames
from lmoe.ops.gating import NativeScores


@dataclass(slots=True, frozen=True, kw_only=True)
class NativeNames:
    """A mixture that the backbone brings along, by paths inside a decoder layer.

    Args:
        block: the module whose output is the mixture's; None: the layer itself puts it together.
        experts: the module with the fused parameters.
        router: the module that returns (logits, weights, indices).
        shared: an FFN that is always on, or None.
        scores: what the router's first output is.
    """

    block: str | None = "mlp"
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    shared: str | None = None
    scores: NativeScores = NativeScores.softmax


@dataclass(slots=True, frozen=True, kw_only=True)
class Family:
    """Paths are inside a decoder layer.

    Args:
        model_types: as in config.json; of a multimodal model, its own or that of its text part.
        ffn: the dense FFN.
        ffn_names: its parts.
        attention: blocks of attention; a layer has some of them.
        query_value: Linears that carry a single LoRA by default.
        native: where a layer's mixture is, in families that have one.
    """

    model_types: tuple[str, ...]
    ffn: str = "mlp"
    ffn_names: FfnNames = field(default_factory=FfnNames)
    attention: tuple[str, ...] = ("self_attn",)
    query_value: tuple[str, ...] = ("q_proj", "v_proj")
    native: NativeNames | None = None


TABLE: tuple[Family, ...] = (
    # The layout that most dense families share: q, k, v, o and gate, up, down.
    Family(
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
    ),
    # Gemma 2 and 3, alone or as the language model of the multimodal one.
    Family(model_types=("gemma", "gemma2", "gemma3", "gemma3_text")),
    # Gemma 4: a dense FFN in every layer, and a mixture beside it in some models.
    Family(
        model_types=("gemma4", "gemma4_text"),
        native=NativeNames(block=None, experts="experts", router="router", scores=NativeScores.probabilities),
    ),
    # Phi 1 to 2: an FFN without a gate.
    Family(model_types=("phi",), ffn_names=FfnNames(up="fc1", down="fc2", gate=None, activation="activation_fn")),
    # Phi 3: fused q, k and v, fused gate and up.
    Family(
        model_types=("phi3",),
        ffn_names=FfnNames(up="gate_up_proj", gate=None, fused=True, activation="activation_fn"),
        query_value=("qkv_proj",),
    ),
    # GLM 4: fused gate and up.
    Family(
        model_types=("glm", "glm4"),
        ffn_names=FfnNames(up="gate_up_proj", gate=None, fused=True, activation="activation_fn"),
    ),
    # GPT-2: Conv1D in place of Linear, fused q, k and v.
    Family(
        model_types=("gpt2",),
        ffn_names=FfnNames(up="c_fc", down="c_proj", gate=None, activation="act", dropout="dropout"),
        attention=("attn",),
        query_value=("c_attn",),
    ),
    # Qwen 3.5 and Qwen3-Next: three layers of linear attention to one of full attention; dense or a mixture.
    Family(
        model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"),
        attention=("self_attn", "linear_attn"),
        native=NativeNames(shared="mlp.shared_expert"),
    ),
    # Mixtures with softmax routing named `gate`: Mixtral, OLMoE, Qwen 2 and 3 (Qwen 2 with a shared expert).
    Family(model_types=("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), native=NativeNames(shared="mlp.shared_expert")),
    # GPT-OSS: experts with biases, transposed, gate and up interleaved.
    Family(model_types=("gpt_oss",), native=NativeNames(router="mlp.router")),
    # DeepSeek-V3: latent attention, dense first layers, then sigmoid routing with shared experts.
    Family(
        model_types=("deepseek_v3", "glm4_moe"),
        query_value=("q_proj", "v_proj", "q_b_proj", "kv_b_proj"),
        native=NativeNames(shared="mlp.shared_experts", scores=NativeScores.sigmoid),
    ),
)

FAMILIES: dict[str, Family] = {model_type: family for family in TABLE for model_type in family.model_types}
"""By model type."""
