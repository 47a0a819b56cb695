"""Qwen3 and Qwen3-MoE models with random weights, copies that share them, and batches of random tokens."""

import copy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

FFN_LINEARS = ("gate_proj", "up_proj", "down_proj")
"""The sites of every contestant."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Size:
    """Shape of a model.

    Args:
        ffn: inner width; of each expert where there are experts.
        experts: E of each layer; 0: a dense model.
        top_k: experts that a native router chooses for each token.
        needs_accelerator: too large to be timed on a CPU.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    top_k: int = 0
    needs_accelerator: bool = False


# The last two are the published shapes of Qwen3-0.6B and Qwen3-4B.
SIZES = {
    "micro": Size(hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocab=64),
    "45m": Size(hidden=640, ffn=1920, layers=8, heads=10, kv_heads=5, head_dim=64, vocab=8192),
    "0.6b": Size(
        hidden=1024, ffn=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=151_936, needs_accelerator=True
    ),
    "4b": Size(
        hidden=2560, ffn=9728, layers=36, heads=32, kv_heads=8, head_dim=128, vocab=151_936, needs_accelerator=True
    ),
}

NATIVE_SIZES = {
    "micro": Size(hidden=32, ffn=16, layers=2, heads=4, kv_heads=2, head_dim=8, vocab=64, experts=4, top_k=2),
    # The output layer has a share of the multiplications like that of Qwen3-30B-A3B: a sixth of what the experts have.
    "54m": Size(hidden=512, ffn=256, layers=4, heads=8, kv_heads=4, head_dim=64, vocab=2048, experts=32, top_k=4),
}
"""Mixtures by nature."""


@dataclass(slots=True, frozen=True)
class Batch:
    """(B, T) tokens, which are their own labels, and a mask without padding."""

    input_ids: Tensor
    attention_mask: Tensor


def random_model(size: Size, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A frozen causal language model with SDPA attention, in training mode and without dropout."""
    shape = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "tie_word_embeddings": True,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    mixture = {
        "moe_intermediate_size": size.ffn,
        "num_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "norm_topk_prob": True,
    }
    config = Qwen3MoeConfig(**shape, **mixture) if size.experts else Qwen3Config(**shape)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).train()


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same tensors: adapters can be put into it, and no weight is held twice."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def random_batch(size: Size, tokens: tuple[int, int], device: torch.device) -> Batch:
    """The same tokens for every contestant.

    Args:
        tokens: (B, T).
    """
    input_ids = torch.randint(3, size.vocab, tokens, generator=torch.Generator().manual_seed(0)).to(device)
    return Batch(input_ids, torch.ones_like(input_ids))
