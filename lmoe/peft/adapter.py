"""Write and read what was injected as PEFT has it: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path
from typing import Any

from torch import nn

from lmoe.adapter.tensor_file import stored_tensors
from lmoe.errors import CheckpointError
from lmoe.files.small_file import read_json
from lmoe.files.wording import quoted
from lmoe.injection.record import injected
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.peft.files import CONFIG_FILE, WEIGHTS_FILE, are_conv1d, lora_config, write_peft
from lmoe.peft.layout import native_routers, peft_parts, peft_tensors, read_peft_tensors


def save_peft(model: nn.Module, folder: Path, *, base_model: str) -> Path:
    """Write the adapter that makes `peft` compute what an injected model computes.

    Args:
        model: injected with dense_lora or native_moe_expert_lora.
        folder: made if missing; files of the same names are replaced.
        base_model: hub name or directory of the backbone.

    Raises:
        CheckpointError: a strategy that PEFT cannot express, or a folder that cannot be written.
    """
    return write_peft(folder, peft_config(model, base_model), peft_tensors(model))


def peft_config(model: nn.Module, base_model: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        CheckpointError: a strategy that PEFT cannot express.
    """
    injection, parts = injected(model).injection, peft_parts(model)
    conv1d = are_conv1d(p.owner.base_layer for p in parts if isinstance(p.owner, LoRALinear))
    ranks, alphas = {p.target: p.lora_r for p in parts}, {p.target: p.lora_alpha for p in parts}
    return lora_config(ranks, alphas, base_model=base_model, fan_in_fan_out=conv1d) | {
        "use_rslora": injection.use_rslora,
        "use_dora": injection.attn_lora.enabled and injection.attn_lora.use_dora,
        "target_modules": [part.target for part in parts if not isinstance(part.owner, StackedLoRA)],
        "target_parameters": [part.target for part in parts if isinstance(part.owner, StackedLoRA)] or None,
        "modules_to_save": list(native_routers(model)) or None,
    }


def load_peft(model: nn.Module, folder: Path) -> None:
    """Copy a PEFT adapter into a model that is injected in the same places with the same rank.

    Args:
        model: injected with dense_lora or native_moe_expert_lora.
        folder: with adapter_config.json and adapter_model.safetensors; pickled weights are not read.

    Raises:
        CheckpointError: no adapter there, a torn file, other targets, ranks or scaling.
    """
    if missing := next((name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).exists()), None):
        raise CheckpointError(f"{folder}: no PEFT adapter: {missing} is missing")
    config, stored = read_json(folder / CONFIG_FILE), stored_tensors(folder / WEIGHTS_FILE)
    own = peft_config(model, "")
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        given = config.get(key) or own[key].__class__()
        if given != own[key]:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: {key} is {quoted(given)}, and this injection has {quoted(own[key])}"
            )
    read_peft_tensors(model, stored)
