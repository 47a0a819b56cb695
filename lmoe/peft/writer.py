"""Write one LoRA expert as a PEFT adapter."""

from collections.abc import Mapping
from pathlib import Path

from lmoe.peft.expert_file import Branch
from lmoe.peft.files import lora_config, write_peft
from lmoe.peft.layout import PREFIX


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
    config = lora_config(ranks, alphas, base_model=base_model, fan_in_fan_out=fan_in_fan_out) | {
        "use_rslora": False,
        "target_modules": list(branches),
    }
    tensors = {}
    for path, branch in branches.items():
        tensors |= {
            f"{PREFIX}{path}.lora_A.weight": branch.lora_A,
            f"{PREFIX}{path}.lora_B.weight": branch.lora_B,
        }
    return write_peft(folder, config, tensors)


def _tidy(alpha: float) -> float:
    """alpha / r * r without what rounding has added."""
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 * max(abs(alpha), 1.0) else alpha
