"""Small models as folders of Transformers with a tokenizer, and what a GGUF file holds."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.pretrain.bpe import train_bpe
from tests.tiny_models import tiny_model

TEXTS = ("it's a, b = {c}! Answer the question.", "user and assistant say hello to the user and the assistant.")
VOCAB, ROWS = 290, 296
"""Tokens, and rows of the embedding."""
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE with Qwen's way of cutting."""
    return train_bpe(TEXTS, VOCAB, 64)


def settings_of(family: str, **changes: Any) -> dict[str, Any]:
    """Settings of a tiny model that llama.cpp can compute."""
    ids = {"eos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id, "bos_token_id": None}
    normed = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    return {"vocab_size": ROWS, **ids, **normed, **changes}


def save_family(family: str, folder: Path, *, max_shard_size: str = "5GB", **changes: Any) -> PreTrainedModel:
    """Write a random model, its biases away from 0, with the tokenizer."""
    model = tiny_model(family, **settings_of(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms that differ from 1, too
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return model


def contents(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a GGUF file, as the package gguf reads them."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: tensor.data for tensor in reader.tensors}
