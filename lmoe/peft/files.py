"""The two files of a PEFT LoRA adapter, and what their configs have in common."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lmoe.files.resources import stored_base
from lmoe.files.write import write_whole

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def lora_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, base_model: str, fan_in_fan_out: bool
) -> dict[str, Any]:
    """A LoRA without dropout and bias: the commonest rank and alpha for all, the others by pattern.

    Args:
        ranks, alphas: by target, its full path, so that no suffix reaches another one.
        base_model: hub name or directory of the backbone.
        fan_in_fan_out: whether the targets are Conv1D, which PEFT wants to be told.
    """
    usual_r, usual_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": stored_base(base_model),
        "r": usual_r,
        "lora_alpha": usual_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "rank_pattern": {re.escape(target): rank for target, rank in ranks.items() if rank != usual_r},
        "alpha_pattern": {re.escape(target): alpha for target, alpha in alphas.items() if alpha != usual_alpha},
        "inference_mode": True,
    }


def are_conv1d(linears: Iterable[object]) -> bool:
    """fan_in_fan_out of an adapter on these: whether any of them is a Conv1D."""
    return any(isinstance(linear, Conv1D) for linear in linears)


def write_peft(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files.

    Args:
        folder: made if missing; files of the same names are replaced.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    contents = {
        WEIGHTS_FILE: save(stored, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }
    write_whole(folder, contents)
    return folder
