"""Made tests/checkpoint/fixtures/format_1, once. A change of the format gets its own fixture; this one stays.

The base's weights lie beside the adapter, so that the fixture depends on no random generator.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import lmoe
from lmoe.adapter.folder import save_adapter
from tests.tiny_models import randomise, tiny_model

BASE = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": True,
}
TOKENS = [3, 7, 11, 5]


def write(name: str, moe: dict, *, reward_head: bool = False) -> None:
    """The four files of one fixture."""
    folder = Path(__file__).parent / "fixtures" / name
    model = tiny_model(**BASE)
    folder.mkdir(parents=True)
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / "base.safetensors")
    lmoe.inject(model, {"lora_r": 2, "num_experts": 3}, moe, reward_head=reward_head)
    randomise(model)
    save_adapter(model, folder, {"name": "tiny random Qwen3", "revision": None, "precision": "float32"})
    ids = torch.tensor([TOKENS])
    recorded = {"base": BASE, "tokens": TOKENS, "logits": model(ids).logits[0, -1, :8].tolist()}
    if reward_head:
        recorded["reward"] = lmoe.reward(model, ids, torch.ones_like(ids)).tolist()
    (folder / "logits.json").write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    write("format_1", {})
