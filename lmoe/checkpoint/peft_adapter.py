"""Write and read an adapter directory as PEFT has it: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from lmoe.checkpoint.peft_layout import native_routers, peft_parts, peft_tensors, read_peft_tensors
from lmoe.checkpoint.write import write_whole
from lmoe.errors import CheckpointError
from lmoe.injection.record import injected
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.stacked_lora import StackedLoRA

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_peft(model: nn.Module, folder: Path, *, base_model: str) -> Path:
    """Write the adapter that makes `peft` compute what an injected model computes.

    Args:
        model: injected with dense_lora or native_moe_expert_lora.
        folder: made if missing; files of the same names are replaced.
        base_model: hub name or directory of the backbone.

    Raises:
        CheckpointError: a strategy that PEFT cannot express, or a folder that cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in peft_tensors(model).items()}
    config = json.dumps(peft_config(model, base_model), indent=2) + "\n"
    write_whole(folder, {WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}), CONFIG_FILE: config.encode("utf-8")})
    return folder


def peft_config(model: nn.Module, base_model: str) -> dict[str, Any]:
    """adapter_config.json; targets by their full path, so that no suffix reaches another one."""
    injection, parts = injected(model).injection, peft_parts(model)
    usual_r = Counter(part.lora_r for part in parts).most_common(1)[0][0]
    usual_alpha = Counter(part.lora_alpha for part in parts).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": usual_r,
        "lora_alpha": usual_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(
            isinstance(p.owner, LoRALinear) and isinstance(p.owner.base_layer, Conv1D) for p in parts
        ),
        "use_rslora": injection.use_rslora,
        "use_dora": injection.attn_lora.enabled and injection.attn_lora.use_dora,
        "target_modules": [part.target for part in parts if not isinstance(part.owner, StackedLoRA)],
        "target_parameters": [part.target for part in parts if isinstance(part.owner, StackedLoRA)] or None,
        "rank_pattern": {re.escape(p.target): p.lora_r for p in parts if p.lora_r != usual_r},
        "alpha_pattern": {re.escape(p.target): p.lora_alpha for p in parts if p.lora_alpha != usual_alpha},
        "modules_to_save": list(native_routers(model)) or None,
        "inference_mode": True,
    }


def load_peft(model: nn.Module, folder: Path) -> None:
    """Copy a PEFT adapter into a model that is injected in the same places with the same rank.

    Args:
        model: injected with dense_lora or native_moe_expert_lora.
        folder: with adapter_config.json and adapter_model.safetensors; pickled weights are not read.

    Raises:
        CheckpointError: no adapter there, a torn file, other targets, ranks or scaling.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: no PEFT adapter: {Path(error.filename or WEIGHTS_FILE).name} is missing"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the PEFT adapter cannot be read: {error}") from None
    own = peft_config(model, "")
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        given = config.get(key) or own[key].__class__()
        if given != own[key]:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {key} is {given!r}, and this injection has {own[key]!r}")
    read_peft_tensors(model, stored)
