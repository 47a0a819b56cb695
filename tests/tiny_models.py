"""Random models of two layers and a few thousand parameters, built from their configs alone."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmoe.injection.roles import parameter_roles
from lmoe.vocabulary import Role

VOCAB = 64
DENSE_FAMILIES = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gemma4_text",
    "phi",
    "phi3",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "glm4",
    "gpt2",
)
NATIVE_FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_5_moe_text",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "gemma4_moe",
)
MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LINEAR_ATTENTION = {  # every fourth layer has full attention, the others linear attention
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
}
OWN_SETTINGS: dict[str, dict] = {
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    "gemma4_moe": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 48,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_oss": {"sliding_window": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
    },
}
VISION = {  # larger than the text model, which is the one to find
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MODEL_TYPES = {"gemma4_moe": "gemma4_text"}


def tiny_model(family: str = "qwen3", *, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of a family in evaluation mode, with logits far from flat."""
    settings: dict = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in NATIVE_FAMILIES:
        settings |= MOE
    if family.startswith("qwen3_5"):
        settings |= LINEAR_ATTENTION
    settings |= OWN_SETTINGS.get(family, {}) | changes
    torch.manual_seed(seed)
    if family == "gemma3":
        config = AutoConfig.for_model(family, text_config=settings, vision_config=VISION, pad_token_id=0)
    else:
        config = AutoConfig.for_model(MODEL_TYPES.get(family, family), **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(batch: int = 2, length: int = 7, *, seed: int = 0) -> Tensor:
    """(B, T) random token ids without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(model: torch.nn.Module, *, seed: int = 1, std: float = 0.3) -> None:
    """Every adapter and router away from its start, as after training."""
    generator, roles = torch.Generator().manual_seed(seed), parameter_roles(model)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            own = roles[name] in (Role.router, Role.lora, Role.attn_lora)
            if own and name.rsplit(".", 1)[-1] in ("lora_A", "lora_B", "weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
