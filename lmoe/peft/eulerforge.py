"""Read a mixture_lora checkpoint of EulerForge 0.1: what it keeps where.

A run directory holds resolved_config.json and the folders final, checkpoint-best and checkpoint-latest, each a whole
model: the backbone's weights, and beside a wrapped Linear's `<path>.base_layer.weight`

    <path>.router.weight (E, D), <path>.router.bias (E,), <path>.experts.<e>.loraA (R, D), .loraB (O, R)
    <path>.lora_A (R, D), .lora_B (O, R)        single LoRA, on attention

in model.safetensors or pytorch_model.bin, which is read without unpickling anything but tensors.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmoe.adapter.tensor_file import check_finite, check_names, finite_tensors, tensor_shapes
from lmoe.errors import CheckpointError
from lmoe.files.small_file import ordinary_size, read_json
from lmoe.files.wording import first_line, quoted

CONFIG_FILE, SAFE, PICKLED = "resolved_config.json", "model.safetensors", "pytorch_model.bin"
FOLDERS = ("final", "checkpoint-best", "checkpoint-latest")
EXPERT_KEY = re.compile(r"(?P<path>.+)\.experts\.(?P<expert>\d+)\.lora(?P<half>[AB])")
BASE = ".base_layer."
CONVERTIBLE = "mixture_lora"
"""EulerForge's word for the one strategy of its own that is read here."""


@dataclass(slots=True, frozen=True, kw_only=True)
class EulerForgeCheckpoint:
    """What a checkpoint of EulerForge holds, as far as it is read here.

    Args:
        folder: the one with the weights.
        config_file: resolved_config.json.
        config: what it holds.
        adapters: tensors of routers and branches, under the keys of lmoe's adapter file.
        backbone: all other tensors, under the backbone's own names.
    """

    folder: Path
    config_file: Path
    config: dict[str, Any]
    adapters: dict[str, Tensor]
    backbone: dict[str, Tensor]


def read_eulerforge(place: str | Path) -> EulerForgeCheckpoint:
    """Read what EulerForge has left of a mixture_lora.

    Args:
        place: a run directory, of which `final` is taken, or one of its checkpoint folders.

    Raises:
        CheckpointError: neither, files that cannot be read, or another strategy.
    """
    folder = Path(place).expanduser()
    run = folder if (folder / CONFIG_FILE).exists() else folder.parent
    if not (run / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE} there or above it, so this is no checkpoint of EulerForge")
    if run == folder and not any((folder / name).exists() for name in (SAFE, PICKLED)):
        folder = next((folder / name for name in FOLDERS if (folder / name).is_dir()), folder)
    config = read_json(run / CONFIG_FILE)
    injection = config.get("injection")
    strategy = injection.get("strategy") if isinstance(injection, dict) else None
    if strategy != CONVERTIBLE:
        raise CheckpointError(
            f"{run / CONFIG_FILE}: injection.strategy is {quoted(strategy)}; {CONVERTIBLE} is what can be converted"
        )
    adapters: dict[str, Tensor] = {}
    backbone: dict[str, Tensor] = {}
    tensors = _tensors(folder)
    routed = {found["path"] for key in tensors if (found := EXPERT_KEY.fullmatch(key)) is not None}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if (found := EXPERT_KEY.fullmatch(key)) is not None:
            adapters[f"{found['path']}.experts.{found['expert']}.lora_{found['half']}"] = tensor
        elif leaf in ("lora_A", "lora_B") or (path.removesuffix(".router") in routed and path.endswith(".router")):
            adapters[key] = tensor
        else:
            backbone[key.replace(BASE, ".")] = tensor
    if not routed:
        raise CheckpointError(f"{folder}: holds no experts (<path>.experts.<e>.loraA)")
    return EulerForgeCheckpoint(
        folder=folder, config_file=run / CONFIG_FILE, config=config, adapters=adapters, backbone=backbone
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / SAFE).exists():
        return finite_tensors(folder / SAFE, list(tensor_shapes(folder / SAFE)))
    if not (folder / PICKLED).exists():
        raise CheckpointError(f"{folder}: neither {SAFE} nor {PICKLED} is there; shards are not read")
    try:
        ordinary_size(folder / PICKLED)
        loaded = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, key, type, value errors
        raise CheckpointError(f"{folder / PICKLED}: cannot be read: {first_line(error)}") from None
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in loaded.items()):
        raise CheckpointError(f"{folder / PICKLED}: must hold tensors by name")
    check_names(folder / PICKLED, loaded)
    check_finite(folder / PICKLED, loaded)
    return loaded
