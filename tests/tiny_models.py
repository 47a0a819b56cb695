"""Random models of two layers and a few thousand parameters, built from their configs alone."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

VOCAB = 64
DENSE_FAMILIES = (
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "glm4",
)


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
    if family in ("mixtral", "qwen3_moe"):
        settings |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if family == "qwen3_5_text":  # every fourth layer has full attention, the others linear attention
        heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        settings |= {"num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **heads}
    set_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(settings | changes))).eval()


def tokens(batch: int = 2, length: int = 7, *, seed: int = 0) -> Tensor:
    """(B, T) random token ids without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(model: torch.nn.Module, *, seed: int = 1, std: float = 0.3) -> None:
    """Every adapter and router away from its start, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B") or name.endswith(".router.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
