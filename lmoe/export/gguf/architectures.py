"""Which classes of Transformers llama.cpp computes, and what it calls their weights.

Names: `MODEL_TENSORS` of the package gguf, which is llama.cpp's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from lmoe.errors import BackboneError
from lmoe.files.wording import shown

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FFN = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
ROUTER = {"mlp.gate": "ffn_gate_inp"}
SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
OUTER = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
LAYERS = "model.layers"
QKV = tuple(ATTENTION)[:3]
ROPE_TYPES = ("default", "linear")


@dataclass(slots=True, frozen=True, kw_only=True)
class Architecture:
    """One class of models, as llama.cpp knows it.

    Args:
        name: general.architecture of the file.
        layer: names in llama.cpp of the weights of a decoder layer, by module.
        biases: modules of a layer that may have a bias.
        needs_biases: whether all of these must have one.
        norm_topk_prob: whether llama.cpp renormalises the weights of the chosen experts; None: the model is no mixture.
        swaps_rope: whether llama.cpp turns neighbouring rows of a head, and not rows half a head apart as Transformers.
        rope_types: of the rotary embedding.
    """

    name: str
    layer: Mapping[str, str]
    biases: tuple[str, ...] = ()
    needs_biases: bool = False
    norm_topk_prob: bool | None = None
    swaps_rope: bool = False
    rope_types: tuple[str, ...] = field(default=ROPE_TYPES)

    @property
    def is_mixture(self) -> bool:
        """Whether each layer has experts and a router."""
        return self.norm_topk_prob is not None


def _llama(**changes: Any) -> Architecture:
    types = (*ROPE_TYPES, "llama3")
    return Architecture(name="llama", swaps_rope=True, rope_types=types, **changes)


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _llama(layer=ATTENTION | NORMS | FFN, biases=(*ATTENTION, *FFN)),
    "MixtralForCausalLM": _llama(layer=ATTENTION | NORMS | ROUTER, norm_topk_prob=True),
    "Qwen2ForCausalLM": Architecture(name="qwen2", layer=ATTENTION | NORMS | FFN, biases=QKV, needs_biases=True),
    "Qwen2MoeForCausalLM": Architecture(
        name="qwen2moe",
        layer=ATTENTION | NORMS | ROUTER | SHARED_EXPERT,
        biases=QKV,
        needs_biases=True,
        norm_topk_prob=False,
    ),
    "Qwen3ForCausalLM": Architecture(name="qwen3", layer=ATTENTION | NORMS | QK_NORMS | FFN),
    "Qwen3MoeForCausalLM": Architecture(
        name="qwen3moe", layer=ATTENTION | NORMS | QK_NORMS | ROUTER, norm_topk_prob=True
    ),
}
"""By class in Transformers."""


def architecture_of(model_class: str, config: PreTrainedConfig, where: object) -> Architecture:
    """The architecture of a model, which computes in llama.cpp what it computes here.

    Args:
        model_class: name of its class in Transformers.
        where: it is, for messages.

    Raises:
        BackboneError: another class, or settings that llama.cpp does not have.
    """
    found = ARCHITECTURES.get(model_class)
    if found is None:
        raise BackboneError(f"{where}: {model_class} is not written as GGUF; these are: {', '.join(ARCHITECTURES)}")
    if problems := _problems(found, config):
        raise BackboneError(f"{where}: {model_class} as llama.cpp computes it lacks {'; '.join(problems)}")
    return found


def head_size(config: PreTrainedConfig) -> int:
    """Numbers of one head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_experts(config: PreTrainedConfig) -> int:
    """Experts of a mixture in each layer."""
    return config.num_experts if hasattr(config, "num_experts") else config.num_local_experts


def weight_name(architecture: Architecture, module: str) -> str | None:
    """What llama.cpp calls the weight of a module, without `.weight`; None: it has none that is its own.

    Args:
        module: its path in the model, as in `model.layers.3.self_attn.q_proj`.
    """
    if module in OUTER:
        return OUTER[module]
    number, _, inner = module.removeprefix(f"{LAYERS}.").partition(".")
    if not module.startswith(f"{LAYERS}.") or not number.isdecimal() or inner not in architecture.layer:
        return None
    return f"blk.{number}.{architecture.layer[inner]}"


def _problems(architecture: Architecture, config: PreTrainedConfig) -> list[str]:
    """What of a config llama.cpp does not have."""
    problems = []
    if (act := config.hidden_act) not in ("silu", "swish"):
        problems.append(f"hidden_act={shown(act)} (silu is there)")
    rope = config.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) not in architecture.rope_types:
        problems.append(f"rope_type={shown(kind)} ({', '.join(architecture.rope_types)} are there)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']} (1 is there)")
    if _has_window(config):
        problems.append(f"sliding_window={config.sliding_window} (null is there)")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("quantization_config (save the weights unquantised)")
    if architecture.is_mixture:
        problems += _mixture_problems(architecture, config)
    return problems


def _has_window(config: PreTrainedConfig) -> bool:
    """Whether some layers attend to the last tokens only."""
    if getattr(config, "sliding_window", None) is None:
        return False
    return bool(getattr(config, "use_sliding_window", True))


def _mixture_problems(architecture: Architecture, config: PreTrainedConfig) -> list[str]:
    problems = []
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        problems.append("layers without experts (mlp_only_layers=[] and decoder_sparse_step=1 are there)")
    normed = getattr(config, "norm_topk_prob", architecture.norm_topk_prob)
    if bool(normed) != architecture.norm_topk_prob:
        problems.append(f"norm_topk_prob={shown(bool(normed))} ({shown(architecture.norm_topk_prob)} is there)")
    return problems
