"""PEFT adapters on disk for tiny models, away from their start, and the PEFT model that blends them."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

LINEARS = {
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def write_peft(base: PreTrainedModel, folder: Path, *, seed: int = 0, **changes) -> Path:
    """A PEFT adapter of rank 4 on every Linear of the family, unless changed."""
    family = base.config.model_type
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS[family], "fan_in_fan_out": family == "gpt2"}
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **(settings | changes))
    get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    return folder


def three(base: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Experts of unequal rank, scaling and targets."""
    few = LINEARS[base.config.model_type]
    return {
        "code": write_peft(base, folder / "code", seed=1),
        "chat": write_peft(base, folder / "chat", seed=2, r=8, lora_alpha=8, use_rslora=True, target_modules=few[:2]),
        "sql": write_peft(base, folder / "sql", seed=3, r=2, lora_alpha=5, target_modules=few[1:]),
    }


def peft_blend(base: PreTrainedModel, places: Mapping[str, Path], weights: Mapping[str, float]) -> PreTrainedModel:
    """PEFT's own weighted combination: ranks side by side."""
    names = list(places)
    model = PeftModel.from_pretrained(copy.deepcopy(base), places[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(places[name], name)
    model.base_model.add_weighted_adapter(list(weights), list(weights.values()), "mixed", combination_type="cat")
    model.set_adapter("mixed")
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor, **inputs) -> Tensor:
    """(B, T, V)."""
    return model(input_ids=ids, **inputs).logits
