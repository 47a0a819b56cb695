"""A base with random weights, and rows of random words, of a size that is asked for."""

import json
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("add", "the", "two", "lists", "of", "small", "numbers", "and", "say", "what", "you", "find", "in", "them")
LONGEST = 8192


def write_base(folder: Path, *, hidden: int, layers: int) -> Path:
    """A Qwen3 with random weights and the tokenizer of the bundled base."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int, *, words: int, domains: int = 1) -> Path:
    """Rows of so many words each, dealt to the domains in turn."""
    draw = random.Random(0)
    lines = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=5)),
            "response": " ".join(draw.choices(WORDS, k=words)),
            "domain": f"domain {number % domains}",
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file
