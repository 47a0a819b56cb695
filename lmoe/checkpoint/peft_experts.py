"""Each expert of a mixture as a PEFT adapter of its own."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from lmoe.checkpoint.expert_branches import SiteBranch, expert_branches, refuse_what_is_no_branch
from lmoe.checkpoint.grow import new_names
from lmoe.checkpoint.peft_adapter import CONFIG_FILE, WEIGHTS_FILE
from lmoe.checkpoint.peft_layout import PREFIX
from lmoe.checkpoint.write import write_whole
from lmoe.injection.record import injected


def expert_names(model: nn.Module) -> list[str]:
    """Names of a model's experts; `expert<e>` where they have none."""
    record = injected(model)
    return list(record.expert_names) or new_names([], max(record.plan.routers.values(), default=0))


def save_peft_experts(model: nn.Module, folder: Path, *, base_model: str) -> dict[str, Path]:
    """Write an adapter for each expert, which makes `peft` compute what the mixture does when it decides alone.

    Args:
        model: injected with mixture_lora.
        folder: gets a folder by the name of each expert.
        base_model: hub name or directory of the backbone.

    Returns:
        The folders by name.

    Raises:
        CheckpointError: what an adapter cannot hold, or a folder that cannot be written.
    """
    refuse_what_is_no_branch(model)
    names = expert_names(model)
    branches = [expert_branches(model, expert) for expert in range(len(names))]  # a refusal leaves no folder behind
    written = {}
    for name, parts in zip(names, branches, strict=True):
        tensors = {
            f"{PREFIX}{part.path}.lora_{half}.weight": tensor.detach().cpu().contiguous().clone()
            for part in parts
            for half, tensor in (("A", part.lora_A), ("B", part.lora_B))
        }
        config = json.dumps(_config(model, parts, base_model), indent=2) + "\n"
        contents = {WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}), CONFIG_FILE: config.encode("utf-8")}
        write_whole(folder / name, contents)
        written[name] = folder / name
    return written


def _config(model: nn.Module, parts: list[SiteBranch], base_model: str) -> dict[str, Any]:
    """adapter_config.json; targets by their full path, so that no suffix reaches another one."""
    rslora = injected(model).injection.use_rslora
    ranks = {part.path: len(part.lora_A) for part in parts}
    alphas = {p.path: p.scaling * (math.sqrt(ranks[p.path]) if rslora else ranks[p.path]) for p in parts}
    usual_r = Counter(ranks.values()).most_common(1)[0][0]
    usual_alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": usual_r,
        "lora_alpha": usual_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(part.base_layer, Conv1D) for part in parts),
        "use_rslora": rslora,
        "use_dora": False,
        "target_modules": [part.path for part in parts],
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != usual_r},
        "alpha_pattern": {re.escape(path): alpha for path, alpha in alphas.items() if alpha != usual_alpha},
        "inference_mode": True,
    }
