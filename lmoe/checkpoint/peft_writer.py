"""Write one LoRA expert as a PEFT adapter."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from lmoe.checkpoint.expert_file import Branch
from lmoe.checkpoint.peft_adapter import CONFIG_FILE, WEIGHTS_FILE
from lmoe.checkpoint.peft_layout import PREFIX
from lmoe.checkpoint.write import write_whole


def write_expert(branches: Mapping[str, Branch], folder: Path, *, base_model: str, fan_in_fan_out: bool) -> Path:
    """adapter_config.json and adapter_model.safetensors; targets by their full path, ranks and alphas by pattern.

    Args:
        branches: by module path.
        folder: made if missing; files of the same names are replaced.
        base_model: hub name or directory of the backbone.
        fan_in_fan_out: whether the targets are Conv1D, which PEFT wants to be told.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    ranks = {path: branch.lora_A.shape[0] for path, branch in branches.items()}
    alphas = {path: _tidy(branch.scaling * ranks[path]) for path, branch in branches.items()}
    usual_r, usual_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": usual_r,
        "lora_alpha": usual_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "target_modules": list(branches),
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != usual_r},
        "alpha_pattern": {re.escape(path): alpha for path, alpha in alphas.items() if alpha != usual_alpha},
        "inference_mode": True,
    }
    tensors = {}
    for path, branch in branches.items():
        for half, values in (("lora_A", branch.lora_A), ("lora_B", branch.lora_B)):
            tensors[f"{PREFIX}{path}.{half}.weight"] = values.detach().cpu().contiguous().clone()
    contents = {
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }
    write_whole(folder, contents)
    return folder


def _tidy(alpha: float) -> float:
    """alpha / r * r without what rounding has added."""
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 * max(abs(alpha), 1.0) else alpha
